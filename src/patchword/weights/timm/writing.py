"""A Vision Transformer in timm's terms."""

from __future__ import annotations

import torch
from torch import Tensor

from patchword.models.position import PositionTable
from patchword.models.vit import ViT
from patchword.spec.model import ViTSpec
from patchword.spec.parse import PatchwordError, parse, to_dict
from patchword.weights import mapping
from patchword.weights.mapping import Written
from patchword.weights.timm.config import (
    VIT_DEFAULTS,
    Arguments,
    config_of,
    nearest_vit,
    ratio,
    side,
)
from patchword.weights.timm.names import GROUP_EPS, STEM, Layout, rules


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
