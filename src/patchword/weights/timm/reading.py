"""What timm's names, shapes and `config.json` say of a Vision Transformer."""

from __future__ import annotations

import math
import re
from typing import Any

from patchword.spec.model import StemSpec, ViTSpec
from patchword.spec.parse import PatchwordError
from patchword.weights.mapping import Reading
from patchword.weights.shapes import (
    Config,
    Hints,
    Shapes,
    classes_of,
    count,
    guess_heads,
    image_size_for,
    say_heads,
    shape_of,
    spec_of,
)
from patchword.weights.timm.config import (
    NOT_OURS,
    VIT_DEFAULTS,
    Arguments,
    architecture,
    input_sizes,
    reading_of,
    table,
    vit_arguments,
)
from patchword.weights.timm.names import (
    CONV_EPS,
    GROUP_EPS,
    LEFTOVERS,
    STEM,
    TokenLayout,
    rules_for,
)

NOT_OUR_TENSORS = (
    (r"norm_pre\.", "a norm before its blocks, as CLIP's"),
    (r"blocks\.\d+\.(attns\.|ffns\.|in_proj\.)", "parallel blocks"),
    (r"blocks\.\d+\.attn\.(norm|lambda|gate)", "another attention"),
    (r"blocks\.\d+\.mlp\.(fc1_g|norm)", "another MLP"),
)


def recognises(shapes: Shapes) -> bool:
    return "patch_embed.proj.weight" in shapes and any(
        name.startswith("blocks.") and ".attn" in name for name in shapes
    )


def find(shapes: Shapes, config: Config, hints: Hints) -> Reading:
    """The spec and the rules of a ViT's names and shapes; see `timm.find`."""
    _refuse(shapes, config)
    notes: list[str] = []
    named = _arguments(config)
    width, channels, *kernel = shape_of(shapes, "patch_embed.proj.weight", 4)
    stem = _stem(shapes)
    stride = 1
    if stem is not None:
        stride, channels = stem.stride, shape_of(shapes, _root(shapes), 4)[1]
    patch = (kernel[0] * stride, kernel[1] * stride)
    hidden = shape_of(shapes, "blocks.0.mlp.fc1.weight", 2)[0]
    mlp_width = shape_of(shapes, "blocks.0.mlp.fc2.weight", 2)[1]
    fields: dict[str, Any] = {
        "stem": None if stem is None else vars(stem),
        "patch_size": list(patch),
        "in_channels": channels,
        "num_classes": classes_of(shapes, "head.weight"),
        "width": width,
        "depth": count(shapes, r"blocks\.(\d+)\."),
        "mlp_width": mlp_width,
        "heads": _heads(shapes, width, named, hints, notes),
        "activation": "swiglu" if hidden == 2 * mlp_width else activation(named),
        "norm_eps": named.get("norm_eps", VIT_DEFAULTS["norm_eps"]),
        "qk_norm": "blocks.0.attn.q_norm.weight" in shapes,
        "head": "mlp" if "pre_logits.fc.weight" in shapes else "linear",
    }
    if "blocks.0.ls1.gamma" in shapes:
        fields["layer_scale"] = float(named.get("init_values") or 1e-5)
    fields |= _pool(shapes, config, named)
    tokens = _tokens(shapes, fields["pool"])
    leading = (fields["pool"] == "token") + (fields["distillation"] != "none")
    prefix = sum(number for _, number in tokens)
    fields["registers"] = prefix - leading
    _check_pooled_tokens(fields["pool"], prefix, named)
    size, embedded = _positions(shapes, config, hints, patch, prefix)
    fields |= {
        "position": "learned-1d" if "pos_embed" in shapes else "none",
        "image_size": list(size),
    }
    notes += _assumed(fields, config, hints)
    spec = spec_of(ViTSpec, fields, hints)
    layout = TokenLayout(
        tokens,
        embedded,
        norm="fc_norm" if "fc_norm.weight" in shapes else "norm",
        qkv_bias="blocks.0.attn.qkv.bias" in shapes,
    )
    ignored = LEFTOVERS if spec.pool == "map" else (*LEFTOVERS, r"attn_pool\..*")
    return reading_of(spec, rules_for(spec, layout), config, notes, ignored)


def _assumed(fields: dict[str, Any], config: Config, hints: Hints) -> list[str]:
    """What the file does not say, and was taken to be so."""
    notes: list[str] = []
    if fields["position"] == "none" and not input_sizes(config, hints):
        height, width = fields["image_size"]
        notes.append(f"assumed: images of {height} x {width} px; image_size=... says otherwise")
    if not config:
        notes.append(f"assumed: {fields['activation']}, LayerNorm eps {fields['norm_eps']}")
    if fields["distillation"] == "head" and not fields["num_classes"]:
        notes.append("features are the class token's, timm's the mean of both tokens'")
    return notes


def _refuse(shapes: Shapes, config: Config) -> None:
    """Raises `PatchwordError` if the model only looks like ours, by its name or its tensors."""
    name = architecture(config)
    for pattern, what in NOT_OURS:
        if re.search(pattern, name):
            raise PatchwordError(f"timm's {name} has another {what} than patchword's; use timm")
    for pattern, what in NOT_OUR_TENSORS:
        if any(re.match(pattern, name) for name in shapes):
            raise PatchwordError(f"this timm model has {what}, which patchword has not; use timm")


def _arguments(config: Config) -> Arguments:
    """What the configuration says, its name's defaults below its own arguments; {} without."""
    name = architecture(config)
    return (vit_arguments(name) if name else {}) | dict(table(config, "model_args"))


def _heads(shapes: Shapes, width: int, named: Arguments, hints: Hints, notes: list[str]) -> Any:
    if "blocks.0.attn.q_norm.weight" in shapes:
        per_head = shape_of(shapes, "blocks.0.attn.q_norm.weight", 1)[0]
        return width // max(per_head, 1)
    if "num_heads" in named and named.get("embed_dim") == width:
        return named["num_heads"]
    notes += say_heads(width, hints)
    return guess_heads(width)


def activation(named: Arguments) -> str:
    name = named.get("act_layer") or "gelu"
    if name not in ("gelu", "gelu_tanh"):
        raise PatchwordError(f"timm's activation {name!r} is none that patchword has; use timm")
    return name


def _pool(shapes: Shapes, config: Config, named: Arguments) -> dict[str, Any]:
    """The fields `pool`, `pool_norm` and `distillation`."""
    pools = {"token": "token", "avg": "gap", "map": "map"}
    own = table(config, "model_args").get("global_pool") or config.get("global_pool")
    fc_norm, named_pool = "fc_norm.weight" in shapes, named.get("global_pool", "token")
    if own is None and "attn_pool.latent" in shapes:
        own = "avg" if named_pool == "avg" else "map"
    elif own is None:
        averaged = (fc_norm and not named.get("fc_norm")) or "cls_token" not in shapes
        own = "avg" if averaged else named_pool
    if own not in pools:
        raise PatchwordError(f"timm's pooling {own!r} is none that patchword has; use timm")
    if own == "map" and fc_norm:
        raise PatchwordError("fc_norm after attention pooling is nothing patchword has; use timm")
    distilled = own == "token" and "dist_token" in shapes
    return {
        "pool": pools[own],
        "pool_norm": own == "avg" and fc_norm,
        "distillation": "head" if distilled else "none",
    }


def _tokens(shapes: Shapes, pool: str) -> tuple[tuple[str, int], ...]:
    names = ["cls_token"] if pool == "token" or "cls_token" in shapes else []
    names += [name for name in ("dist_token", "reg_token") if name in shapes]
    return tuple((name, shape_of(shapes, name, 3)[1]) for name in names)


def _check_pooled_tokens(pool: str, prefix: int, named: Arguments) -> None:
    """Ours pools by attention over all tokens, and averages over the patches alone."""
    included = bool(named.get("pool_include_prefix", False))
    if prefix and ((pool == "map" and not included) or (pool == "gap" and included)):
        raise PatchwordError(
            f"timm's pool_include_prefix={included} with {prefix} tokens before the patches is "
            f"nothing patchword's {pool} pooling does; use timm"
        )


def _positions(
    shapes: Shapes, config: Config, hints: Hints, patch: tuple[int, int], prefix: int
) -> tuple[tuple[int, int], bool]:
    """The image size that the position table is for, and whether it begins with the tokens."""
    sizes = [
        (height // patch[0] * patch[0], width // patch[1] * patch[1])
        for height, width in (*input_sizes(config, hints), (224, 224))
    ]
    if "pos_embed" not in shapes:
        return sizes[0], False
    sizes.pop()
    entries = shape_of(shapes, "pos_embed", 3)[1]
    grids = [height // patch[0] * (width // patch[1]) for height, width in sizes]
    orders = ((False, True) if "reg_token" in shapes else (True, False)) if prefix else (False,)
    numbers = [(entries - embedded * prefix, embedded) for embedded in orders]
    known = [(left, embedded) for left, embedded in numbers if left in grids]
    square = [(n, embedded) for n, embedded in numbers if n > 0 and math.isqrt(n) ** 2 == n]
    left, embedded = [*known, *square, (entries - prefix, True)][0]
    return image_size_for(left, patch, sizes, "pos_embed"), embedded


def _root(shapes: Shapes) -> str:
    return next(
        (name for name in (f"{STEM}stem.conv.weight", f"{STEM}conv.weight") if name in shapes),
        f"{STEM}stem.conv.weight",
    )


def _stem(shapes: Shapes) -> StemSpec | None:
    if not any(name.startswith(STEM) for name in shapes):
        return None
    escaped = STEM.replace(".", r"\.")
    stages = count(shapes, rf"{escaped}stages\.(\d+)\.")
    return StemSpec(
        layers=tuple(
            count(shapes, rf"{escaped}stages\.{stage}\.blocks\.(\d+)\.") for stage in range(stages)
        ),
        width=shape_of(shapes, _root(shapes), 4)[0],
        norm_eps=GROUP_EPS,
        weight_eps=CONV_EPS,
        weight_eps_in="variance",
    )
