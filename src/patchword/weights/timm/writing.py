"""A Vision Transformer in timm's terms."""

from __future__ import annotations

from patchword.models.vit import ViT
from patchword.spec.model import ViTSpec
from patchword.weights import mapping
from patchword.weights.held import no_place, position_table, say_eps
from patchword.weights.mapping import Written
from patchword.weights.timm.config import (
    VIT_DEFAULTS,
    Arguments,
    config_of,
    nearest_vit,
    ratio,
    side,
)
from patchword.weights.timm.names import LAYER_EPS, STEM, TokenLayout, rules_for


def write(model: ViT) -> Written:
    """A ViT as timm has it; see `timm.write`."""
    spec = model.spec
    distilled = spec.distillation == "head" and spec.num_classes > 0
    for together, present in {
        "pool map with activation swiglu": spec.pool == "map" and spec.activation == "swiglu",
        "distillation head and registers together": distilled and spec.registers > 0,
        "distillation head with position none": distilled and spec.position == "none",
    }.items():
        if present:
            raise no_place("timm", together)
    tensors = {k: v for k, v in model.state_dict().items() if not k.startswith("positions.")}
    tokens = [("cls_token", int(spec.pool == "token"))]
    extra = spec.registers + (0 if distilled else int(spec.distillation != "none"))
    tokens += [("dist_token", int(distilled)), ("reg_token", extra)]
    used, embedded = tuple((name, number) for name, number in tokens if number), False
    if spec.position != "none":
        table = tensors["positions.0.table"] = position_table(model)
        embedded = bool(used) and (distilled or bool(table[:, : spec.leading].any()))
    layout = TokenLayout(used, embedded, norm="fc_norm" if spec.pool_norm else "norm")
    wanted = _arguments_of(spec, layout)
    name, arguments = nearest_vit(wanted)
    say_eps("timm", "LayerNorm", spec.norm_eps, wanted["norm_eps"])
    first_conv = "patch_embed.proj"
    if spec.stem is not None:
        first_conv = f"{STEM}stem.conv" if spec.stem.layers else f"{STEM}conv"
    return Written(
        tensors=mapping.write(tensors, rules_for(spec, layout)),
        config=config_of(
            model,
            name,
            arguments,
            first_conv=first_conv,
            classifier=["head", "head_dist"] if distilled else "head",
        ),
    )


def _arguments_of(spec: ViTSpec, layout: TokenLayout) -> Arguments:
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
    return 1e-5 if plain and spec.norm_eps > 3e-6 else LAYER_EPS
