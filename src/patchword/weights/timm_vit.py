"""timm's Vision Transformers, DeiTs and hybrids (timm/models/vision_transformer.py, deit.py,
vision_transformer_hybrid.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchword.architecture import StemSpec, ViTSpec
from patchword.models.position import PositionTable
from patchword.models.vit import ViT
from patchword.parsing import PatchwordError, parse, to_dict
from patchword.weights import mapping
from patchword.weights.mapping import (
    SAME,
    Config,
    Found,
    Op,
    Rule,
    Shapes,
    Tensors,
    Written,
    count,
    each,
    guess_heads,
    layer,
    patches,
    repeated,
    rule,
    shape_of,
    square_grid,
)
from patchword.weights.timm_config import (
    NOT_OURS,
    VIT_DEFAULTS,
    Arguments,
    architecture,
    classes_in,
    config_of,
    input_sizes,
    labels_in,
    nearest_vit,
    preprocess_in,
    ratio,
    refuse_named,
    side,
    table,
    vit_arguments,
)

BLOCK = [
    *layer("blocks.{i}.norm1", "blocks.{i}.norm1"),
    rule("blocks.{i}.attention.qkv.weight", "blocks.{i}.attn.qkv.weight"),
    *layer("blocks.{i}.attention.projection", "blocks.{i}.attn.proj"),
    *layer("blocks.{i}.norm2", "blocks.{i}.norm2"),
    *layer("blocks.{i}.mlp.hidden", "blocks.{i}.mlp.fc1"),
    *layer("blocks.{i}.mlp.output", "blocks.{i}.mlp.fc2"),
]
QKV_BIAS = rule("blocks.{i}.attention.qkv.bias", "blocks.{i}.attn.qkv.bias")
QK_NORM = [
    *layer("blocks.{i}.attention.query_norm", "blocks.{i}.attn.q_norm"),
    *layer("blocks.{i}.attention.key_norm", "blocks.{i}.attn.k_norm"),
]
LAYER_SCALE = [
    rule("blocks.{i}.scale1", "blocks.{i}.ls1.gamma"),
    rule("blocks.{i}.scale2", "blocks.{i}.ls2.gamma"),
]
POOL = [
    rule("pool.probe", "attn_pool.latent"),
    *layer("pool.query", "attn_pool.q"),
    *layer("pool.key_value", "attn_pool.kv"),
    *layer("pool.projection", "attn_pool.proj"),
    *layer("pool.norm", "attn_pool.norm"),
    *layer("pool.mlp.hidden", "attn_pool.mlp.fc1"),
    *layer("pool.mlp.output", "attn_pool.mlp.fc2"),
]
LEFTOVERS = (r"mask_token", r"decoder_.*")
"""of masked pre-training"""

GROUP_EPS = 1e-5
CONV_EPS = 1e-8
"""of timm's GroupNorms, and of its weight standardisation, added to the variance"""
STEM = "patch_embed.backbone."


@dataclass(frozen=True)
class Layout:
    """What timm's tensors hold beyond what the spec says."""

    tokens: tuple[tuple[str, int], ...]
    """the tokens before the patches, by name, and how many each is"""
    embedded: bool
    """the position table begins with those tokens"""
    norm: str = "norm"
    qkv_bias: bool = True

    @property
    def prefix(self) -> int:
        return sum(number for _, number in self.tokens)


def rules(spec: ViTSpec, layout: Layout) -> list[Rule]:
    stride, channels = 1, spec.in_channels
    stem: list[Rule] = []
    if spec.stem is not None:
        stride, channels = spec.stem.stride, spec.stem.channels
        stem = stem_rules(spec.stem)
    patch = (spec.patch_size[0] // stride, spec.patch_size[1] // stride)
    block = list(BLOCK)
    block += [QKV_BIAS] if layout.qkv_bias else []
    block += QK_NORM if spec.qk_norm else []
    block += LAYER_SCALE if spec.layer_scale is not None else []
    found = [
        *stem,
        *layer("patch_embedding", "patch_embed.proj", patches(patch, channels)),
        *token_rules(spec, layout),
        *repeated(block, spec.depth),
        *layer("norm", layout.norm),
    ]
    if not layout.qkv_bias:
        found += repeated([_zero_bias(spec.width)], spec.depth)
    found += POOL if spec.pool == "map" else []
    if spec.num_classes:
        found += layer("head", "head")
        found += layer("pre_logits", "pre_logits.fc") if spec.head == "mlp" else []
        if spec.distillation == "head":
            found += layer("distillation_head", "head_dist")
    return found


def _zero_bias(width: int) -> Rule:
    """Ours has a bias that theirs leaves out; read only."""
    return Rule(
        ("blocks.{i}.attention.qkv.bias",),
        (),
        Op(lambda _: [torch.zeros(3 * width)], lambda _: []),
    )


def token_rules(spec: ViTSpec, layout: Layout) -> list[Rule]:
    """Tokens and their positions. Ours gives registers no position: theirs, where they have one,
    becomes part of the register. Theirs may give none to any token (`no_embed_class`)."""
    ours = [("class_token", int(spec.pool == "token"))]
    ours += [("distillation_token", int(spec.distillation != "none"))]
    ours += [("registers", spec.registers)]
    ours = [(name, number) for name, number in ours if number]
    positions = spec.position != "none"
    if not layout.tokens:
        return [rule("positions.0.table", "pos_embed")] if positions else []
    names = tuple(name for name, _ in ours), tuple(name for name, _ in layout.tokens)
    sizes = [number for _, number in ours], [number for _, number in layout.tokens]
    leading, prefix = spec.leading, layout.prefix
    table = (("positions.0.table",), ("pos_embed",)) if positions else ((), ())

    def read(tensors: Tensors) -> Tensors:
        tokens = torch.cat(tensors[: len(sizes[1])], dim=1)
        if not positions:
            return list(tokens.split(sizes[0], dim=1))
        positions_of, patch = _split(tensors[-1], prefix if layout.embedded else 0)
        if not layout.embedded:
            positions_of = torch.zeros_like(tokens)
        registers = tokens[:, leading:] + positions_of[:, leading:]
        tokens = torch.cat([tokens[:, :leading], registers], dim=1)
        whole = torch.cat([positions_of[:, :leading], patch], dim=1)
        return [*tokens.split(sizes[0], dim=1), whole]

    def write(tensors: Tensors) -> Tensors:
        tokens = torch.cat(tensors[: len(sizes[0])], dim=1)
        parts = [part.clone() for part in tokens.split(sizes[1], dim=1)]
        if not positions:
            return parts
        first, patch = _split(tensors[-1], leading)
        if layout.embedded:
            none = first.new_zeros(1, prefix - leading, first.shape[2])
            patch = torch.cat([first, none, patch], dim=1)
        return [*parts, patch]

    return [Rule(names[0] + table[0], names[1] + table[1], Op(read, write))]


def _split(table: Tensor, at: int) -> tuple[Tensor, Tensor]:
    return table[:, :at], table[:, at:]


def stem_rules(spec: StemSpec) -> list[Rule]:
    """The ResNet of a hybrid."""
    scaled = same_filters(spec.weight_eps, spec.weight_eps_in)
    root = f"{STEM}stem." if spec.layers else STEM
    found = [rule("stem.root.weight", f"{root}conv.weight", scaled)]
    found += layer("stem.root_norm", f"{root}norm")
    for stage, blocks in enumerate(spec.layers):
        ours, theirs = f"stem.stages.{stage}.", f"{STEM}stages.{stage}.blocks."
        block: list[Rule] = []
        for k in (1, 2, 3):
            block.append(
                rule(f"{ours}{{i}}.conv{k}.weight", f"{theirs}{{i}}.conv{k}.weight", scaled)
            )
            block += layer(f"{ours}{{i}}.norm{k}", f"{theirs}{{i}}.norm{k}")
        found += repeated(block, blocks)
        down = f"{ours}0.downsample", f"{theirs}0.downsample"
        found.append(rule(f"{down[0]}.weight", f"{down[1]}.conv.weight", scaled))
        found += layer(f"{down[0]}_norm", f"{down[1]}.norm")
    return found


def same_filters(eps: float, eps_in: str) -> Op:
    """Filters whose standardisation with another eps than timm's gives the same: scaled, which
    standardisation undoes but for eps. The filters themselves if eps is timm's."""
    if (eps, eps_in) == (CONV_EPS, "variance"):
        return SAME

    def write(weight: Tensor) -> Tensor:
        flat = weight.double().flatten(1)
        std = flat.std(1, correction=0)
        added = eps if eps_in == "variance" else 2 * eps * std + eps * eps
        scale = torch.full_like(std, CONV_EPS).div(added).sqrt()
        return (flat * scale[:, None]).to(weight.dtype).view_as(weight)

    return each(lambda weight: weight, write)


# Reading ------------------------------------------------------------------------------------------


def recognises(shapes: Shapes) -> bool:
    return "patch_embed.proj.weight" in shapes and any(
        name.startswith("blocks.") and ".attn" in name for name in shapes
    )


def find(shapes: Shapes, config: Config, hints: dict[str, Any]) -> Found:
    """The spec and the rules of a ViT's names and shapes; see `timm.find`."""
    notes: list[str] = []
    refuse_named(config, NOT_OURS)
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
        "num_classes": classes_in(shapes, "head.weight"),
        "width": width,
        "depth": count(shapes, r"blocks\.(\d+)\."),
        "mlp_width": mlp_width,
        "heads": _heads(shapes, width, named, notes if "heads" not in hints else []),
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
    if not config:
        notes.append(f"assumed: {fields['activation']}, LayerNorm eps {fields['norm_eps']}")
    fields |= {key: value for key, value in hints.items() if key != "image_size"}
    spec = parse(ViTSpec, fields)
    layout = Layout(
        tokens,
        embedded,
        norm="fc_norm" if "fc_norm.weight" in shapes else "norm",
        qkv_bias="blocks.0.attn.qkv.bias" in shapes,
    )
    return Found(
        spec=spec,
        rules=rules(spec, layout),
        preprocess=preprocess_in(config, channels, notes),
        classes=labels_in(config, spec.num_classes),
        ignored=LEFTOVERS if spec.pool == "map" else (*LEFTOVERS, r"attn_pool\..*"),
        notes=tuple(notes),
    )


def _arguments(config: Config) -> Arguments:
    """What the configuration says, its name's defaults below its own arguments; {} without."""
    name = architecture(config)
    return (vit_arguments(name) if name else {}) | dict(table(config, "model_args"))


def _heads(shapes: Shapes, width: int, named: Arguments, notes: list[str]) -> Any:
    if "blocks.0.attn.q_norm.weight" in shapes:
        per_head = shape_of(shapes, "blocks.0.attn.q_norm.weight", 1)[0]
        return width // max(per_head, 1)
    if "num_heads" in named and named.get("embed_dim") == width:
        return named["num_heads"]
    heads = guess_heads(width)
    notes.append(f"assumed: {heads} heads, as models {width} wide have; heads=... says otherwise")
    return heads


def activation(named: Arguments) -> str:
    known = {"gelu": "gelu", "gelu_tanh": "gelu_tanh"}
    name = named.get("act_layer") or "gelu"
    if name not in known:
        raise PatchwordError(f"timm's activation {name!r} is none that patchword has; use timm")
    return known[name]


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
    wanted = [name for name in ("cls_token", "dist_token", "reg_token") if name in shapes]
    if pool == "token" and "cls_token" not in wanted:
        shape_of(shapes, "cls_token", 3)
    return tuple((name, shape_of(shapes, name, 3)[1]) for name in wanted)


def _check_pooled_tokens(pool: str, prefix: int, named: Arguments) -> None:
    """Ours pools by attention over all tokens, and averages over the patches alone."""
    included = bool(named.get("pool_include_prefix", False))
    if prefix and ((pool == "map" and not included) or (pool == "gap" and included)):
        raise PatchwordError(
            f"timm's pool_include_prefix={included} with {prefix} tokens before the patches is "
            f"nothing patchword's {pool} pooling does; use timm"
        )


def _positions(
    shapes: Shapes, config: Config, hints: dict[str, Any], patch: tuple[int, int], prefix: int
) -> tuple[tuple[int, int], bool]:
    """The image size that the position table is for, and whether it begins with the tokens."""
    sizes = input_sizes(config, hints)
    if "pos_embed" not in shapes:
        return (sizes[0] if sizes else (224, 224)), False
    entries = shape_of(shapes, "pos_embed", 3)[1]
    orders = (False, True) if "reg_token" in shapes else (True, False)
    for embedded in orders if prefix else (False,):
        left = entries - embedded * prefix
        for height, width in sizes:
            if (height // patch[0]) * (width // patch[1]) == left:
                return (height, width), embedded
    for embedded in orders if prefix else (False,):
        left = entries - embedded * prefix
        if left > 0 and math.isqrt(left) ** 2 == left:
            return square_grid(left, patch, "pos_embed"), embedded
    return square_grid(entries - prefix, patch, "pos_embed"), True


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


# Writing ------------------------------------------------------------------------------------------


def write(model: ViT) -> Written:
    """A ViT as timm has it; see `timm.write`."""
    spec, tensors = model.spec, dict(model.state_dict())
    _check_writable(spec)
    if spec.position in ("sincos2d", "learned-2d"):
        spec, tensors = _with_table(model)
    tokens = [("cls_token", int(spec.pool == "token"))]
    distilled = spec.distillation == "head" and spec.num_classes > 0
    extra = spec.registers + (0 if distilled else int(spec.distillation != "none"))
    tokens += [("dist_token", int(distilled)), ("reg_token", extra)]
    used = tuple((name, number) for name, number in tokens if number)
    first = tensors["positions.0.table"][:, : spec.leading] if spec.position != "none" else None
    embedded = bool(used) and first is not None and (distilled or bool(first.any()))
    layout = Layout(used, embedded, norm="fc_norm" if spec.pool_norm else "norm")
    wanted = _arguments_of(spec, layout)
    name, arguments = nearest_vit(wanted)
    mapping.warn_eps("timm", "LayerNorm", spec.norm_eps, wanted["norm_eps"])
    first_conv = "patch_embed.proj"
    if spec.stem is not None:
        mapping.warn_eps("timm", "GroupNorm", spec.stem.norm_eps, GROUP_EPS)
        first_conv = f"{STEM}stem.conv" if spec.stem.layers else f"{STEM}conv"
    return Written(
        tensors=mapping.write(tensors, rules(spec, layout)),
        config=config_of(
            model,
            name,
            arguments,
            first_conv=first_conv,
            classifier=["head", "head_dist"] if distilled else "head",
        ),
    )


def _check_writable(spec: ViTSpec) -> None:
    """Raises `PatchwordError` if timm has no place for something."""
    inside = spec.position in ("relative", "rotary") or (
        spec.position != "none" and spec.position_at != "stem"
    )
    averaged = spec.distillation == "head" and spec.num_classes > 0
    problems = {
        f"position {spec.position} (at {spec.position_at})": inside,
        "pool token+gap": spec.pool == "token+gap",
        "head mlp": spec.head == "mlp" and spec.num_classes > 0,
        "pool map with activation swiglu": spec.pool == "map" and spec.activation == "swiglu",
        "a distillation head and registers": averaged and spec.registers > 0,
        "a distillation head without positions": averaged and spec.position == "none",
        f"stem width {spec.stem and spec.stem.width}": spec.stem is not None
        and spec.stem.width != 64,
    }
    for problem, present in problems.items():
        if present:
            raise PatchwordError(f"timm has no {problem}; save the model in patchword's own format")


def _with_table(model: ViT) -> tuple[ViTSpec, dict[str, Tensor]]:
    """The model with its positions as one learned table, which is all that timm has."""
    module, spec = model.positions[0], model.spec
    assert isinstance(module, PositionTable)
    patch = module().detach()
    none = patch.new_zeros(1, spec.leading, spec.width)
    tensors = {k: v for k, v in model.state_dict().items() if not k.startswith("positions.")}
    tensors["positions.0.table"] = torch.cat([none, patch], dim=1)
    return parse(ViTSpec, to_dict(spec) | {"position": "learned-1d"}), tensors


def _arguments_of(spec: ViTSpec, layout: Layout) -> Arguments:
    """timm's arguments for a spec."""
    swiglu, tokens = spec.activation == "swiglu", dict(layout.tokens)
    stride = 1 if spec.stem is None else spec.stem.stride
    return VIT_DEFAULTS | {
        "img_size": side(spec.image_size),
        "in_chans": spec.in_channels,
        "patch_size": side((spec.patch_size[0] // stride, spec.patch_size[1] // stride)),
        "embed_dim": spec.width,
        "depth": spec.depth,
        "num_heads": spec.heads,
        "mlp_ratio": ratio(spec.mlp_width * (2 if swiglu else 1), spec.width),
        "class_token": "cls_token" in tokens,
        "global_pool": {"token": "token", "gap": "avg", "map": "map"}[spec.pool],
        "fc_norm": False if spec.pool == "gap" and not spec.pool_norm else None,
        "pool_include_prefix": spec.pool == "map" and layout.prefix > 0,
        "no_embed_class": layout.prefix > 0 and not layout.embedded,
        "reg_tokens": tokens.get("reg_token", 0),
        "pos_embed": "none" if spec.position == "none" else "learn",
        "qk_norm": spec.qk_norm,
        "init_values": None if spec.layer_scale is None else spec.layer_scale or 1e-5,
        "act_layer": "silu" if swiglu else spec.activation,
        "mlp_layer": "swiglu" if swiglu else "mlp",
        "norm_eps": _nearest_eps(spec),
        "distilled": "dist_token" in tokens,
        "stem": None if spec.stem is None else spec.stem.layers,
    }


def _nearest_eps(spec: ViTSpec) -> float:
    """The eps of a LayerNorm in timm that is nearest: only its plain ViTs can have 1e-5."""
    plain = spec.stem is None and spec.activation != "swiglu" and spec.distillation != "head"
    return 1e-5 if plain and spec.norm_eps > 3e-6 else 1e-6
