"""Google's npz files of google-research/vision_transformer: ViT (paper; AugReg, arXiv 2106.10270),
hybrids and MLP-Mixer (arXiv 2105.01601), by the names of its `models_*.py`.

Numerics of that code: GELU is Flax's default, the tanh approximation; LayerNorm and GroupNorm have
eps 1e-6; weight standardisation divides by (std + 1e-5); `pre_logits` is followed by tanh. It
evaluates on images stretched to the model's size, bilinear (there without antialiasing).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from patchword.models.model import Model
from patchword.spec.model import MixerSpec, StemSpec, ViTSpec
from patchword.spec.parse import PatchwordError
from patchword.weights.google.flax import (
    GROUP_SCALE,
    LINEN,
    check_depth,
    classes_in,
    convolution,
    dense,
    encoder_block,
    head_in,
    ignored_for,
    image_size,
    norm,
    patch_embedding,
    prefix_of,
    preprocess,
    with_hints,
)
from patchword.weights.mapping import (
    Config,
    Found,
    Rule,
    Shapes,
    Written,
    count,
    prefixed,
    repeated,
    rule,
    shape_of,
)
from patchword.weights.mapping import write as write_tensors

PARTS = ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
"""of the published files, which are also written; the current code names them as `LINEN`"""
POSITIONS = "Transformer/posembed_input/pos_embedding"
PLACED = re.compile(rf"[\w/]*?{POSITIONS}")
"""Positions within the encoder: big_vision, whose blocks may be named alike, has them outside."""
OURS = re.compile(
    r"[\w/]*?(Transformer/encoderblock_\d+/MultiHeadDotProductAttention_1|MixerBlock_\d+)/.*"
)

LAYER_NUMERICS: dict[str, tuple[Any, ...]] = {"activation": ("gelu_tanh",), "norm_eps": (1e-6,)}
VIT_FIXED = LAYER_NUMERICS | {
    "pool": ("token", "gap"),
    "pool_norm": (False,),
    "position": ("learned-1d",),
    "position_at": ("stem",),
    "layer_scale": (None,),
    "registers": (0,),
    "distillation": ("none",),
    "qk_norm": (False,),
}
STEM_FIXED: dict[str, tuple[Any, ...]] = {
    "norm_eps": (1e-6,),
    "weight_eps": (1e-5,),
    "weight_eps_in": ("std",),
}
"""The values of the fields of a spec that the format can mean; it stores none of them."""


def recognises(shapes: Shapes, config: Config) -> bool:
    """Whether the names are those of a ViT, a hybrid or a Mixer of this format."""
    return any(OURS.fullmatch(name) or PLACED.fullmatch(name) for name in shapes)


def find(shapes: Shapes, config: Config, hints: dict[str, Any]) -> Found:
    """The model that names and shapes tell. Raises `PatchwordError` if they tell none."""
    stem = prefix_of(shapes, "stem/kernel")
    if stem + "stem/kernel" in shapes:
        prefix, spec = stem, _mixer(shapes, stem, hints)
    else:
        prefix = prefix_of(shapes, "embedding/kernel")
        spec = _vit(shapes, prefix, hints)
    ignored = ignored_for(prefix)
    if not spec.num_classes:
        ignored += (f"{prefix}pre_logits/.*",)
    return Found(
        spec=spec,
        rules=_rules(spec, prefix, _parts(shapes, prefix)),
        preprocess=preprocess(spec.in_channels, resize="stretch"),
        ignored=ignored,
    )


def write(model: Model) -> Written:
    """A ViT, hybrid or Mixer under the names of this format. Raises `PatchwordError` if the format
    cannot hold the model."""
    spec = model.spec
    if isinstance(spec, ViTSpec):
        _check(spec, VIT_FIXED)
        if spec.stem is not None:
            _check(spec.stem, STEM_FIXED)
    elif isinstance(spec, MixerSpec):
        _check(spec, LAYER_NUMERICS)
    else:
        raise PatchwordError(
            "Google's vision_transformer format holds ViTs, hybrids and Mixers only; write another "
            "format"
        )
    return Written(tensors=write_tensors(model.state_dict(), _rules(spec, "", PARTS)))


def _check(spec: ViTSpec | MixerSpec | StemSpec, fixed: Mapping[str, tuple[Any, ...]]) -> None:
    for name, allowed in fixed.items():
        value = getattr(spec, name)
        if value not in allowed:
            raise PatchwordError(
                f"Google's vision_transformer format means {name} "
                f"{' or '.join(map(str, allowed))}, this model has {value}; write another format, "
                f"or, if the difference does not matter, load the model with that {name} first"
            )


# Specs from shapes --------------------------------------------------------------------------------


def _vit(shapes: Shapes, prefix: str, hints: dict[str, Any]) -> ViTSpec:
    rows, columns, channels, width = shape_of(shapes, f"{prefix}embedding/kernel", 4)
    encoder = f"{prefix}Transformer/encoderblock_"
    depth = check_depth(count(shapes, rf"{encoder}(\d+)/"))
    parts = _parts(shapes, prefix)
    query = shape_of(shapes, f"{encoder}0/{parts[1]}/query/kernel", 3)
    head, head_width = head_in(shapes, prefix, width)
    stem, in_channels = None, channels
    if f"{prefix}conv_root/kernel" in shapes:
        root = shape_of(shapes, f"{prefix}conv_root/kernel", 4)
        stem, in_channels = _stem(shapes, prefix, root[3]), root[2]
    stride = 1 if stem is None else stem.stride
    patch = (rows * stride, columns * stride)
    token = f"{prefix}cls" in shapes
    entries = shape_of(shapes, prefix + POSITIONS, 3)[1] - token
    spec = ViTSpec(
        image_size=image_size(entries, patch, hints, prefix + POSITIONS),
        in_channels=in_channels,
        num_classes=classes_in(shapes, f"{prefix}head/kernel"),
        depth=depth,
        width=width,
        mlp_width=shape_of(shapes, f"{encoder}0/{parts[3]}/Dense_0/kernel", 2)[1],
        heads=query[1],
        patch_size=patch,
        stem=stem,
        pool="token" if token else "gap",
        head=head,
        head_width=head_width,
        activation="gelu_tanh",
    )
    return with_hints(spec, hints)


def _parts(shapes: Shapes, prefix: str) -> tuple[str, ...]:
    """What an encoder block's layers are called."""
    attention = f"{prefix}Transformer/encoderblock_0/{LINEN[1]}/"
    return LINEN if any(name.startswith(attention) for name in shapes) else PARTS


def _stem(shapes: Shapes, prefix: str, width: int) -> StemSpec:
    stages = max(count(shapes, rf"{prefix}block(\d+)/unit\d+/") - 1, 0)  # numbered from 1
    units = (count(shapes, rf"{prefix}block{stage + 1}/unit(\d+)/") - 1 for stage in range(stages))
    return StemSpec(layers=tuple(units), width=width)


def _mixer(shapes: Shapes, prefix: str, hints: dict[str, Any]) -> MixerSpec:
    rows, columns, channels, width = shape_of(shapes, f"{prefix}stem/kernel", 4)
    mixing = f"{prefix}MixerBlock_0/{{}}_mixing/Dense_0/kernel"
    name = mixing.format("token")
    entries, tokens_mlp_width = shape_of(shapes, name, 2)
    spec = MixerSpec(
        image_size=image_size(entries, (rows, columns), hints, name),
        in_channels=channels,
        num_classes=classes_in(shapes, f"{prefix}head/kernel"),
        depth=check_depth(count(shapes, rf"{prefix}MixerBlock_(\d+)/")),
        width=width,
        tokens_mlp_width=tokens_mlp_width,
        channels_mlp_width=shape_of(shapes, mixing.format("channel"), 2)[1],
        patch_size=(rows, columns),
        activation="gelu_tanh",
    )
    return with_hints(spec, hints)


# Rules --------------------------------------------------------------------------------------------


def _rules(spec: ViTSpec | MixerSpec, prefix: str, parts: Sequence[str]) -> list[Rule]:
    rules = _mixer_rules(spec) if isinstance(spec, MixerSpec) else _vit_rules(spec, parts)
    if spec.num_classes:
        rules += dense("head", "head")
    return prefixed(rules, prefix)


def _vit_rules(spec: ViTSpec, parts: Sequence[str]) -> list[Rule]:
    stem, (rows, columns) = spec.stem, spec.patch_size
    stride, channels = (1, spec.in_channels) if stem is None else (stem.stride, stem.channels)
    block = encoder_block("Transformer/encoderblock_{i}", parts, spec.width, spec.heads)
    rules = [
        *(_stem_rules(stem) if stem is not None else ()),
        *patch_embedding("embedding", (rows // stride, columns // stride, channels, spec.width)),
        rule("positions.0.table", POSITIONS),
        *repeated(block, spec.depth),
        *norm("norm", "Transformer/encoder_norm"),
    ]
    if spec.pool == "token":
        rules.append(rule("class_token", "cls"))
    if spec.head == "mlp" and spec.num_classes:
        rules += dense("pre_logits", "pre_logits")
    return rules


def _stem_rules(stem: StemSpec) -> list[Rule]:
    rules = [
        *convolution("stem.root", "conv_root"),
        *norm("stem.root_norm", "gn_root", GROUP_SCALE),
    ]
    for stage, units in enumerate(stem.layers):
        for unit in range(units):
            ours, theirs = f"stem.stages.{stage}.{unit}", f"block{stage + 1}/unit{unit + 1}"
            for k in (1, 2, 3):
                rules += convolution(f"{ours}.conv{k}", f"{theirs}/conv{k}")
                rules += norm(f"{ours}.norm{k}", f"{theirs}/gn{k}", GROUP_SCALE)
        rules += convolution(
            f"stem.stages.{stage}.0.downsample", f"block{stage + 1}/unit1/conv_proj"
        )
        rules += norm(
            f"stem.stages.{stage}.0.downsample_norm", f"block{stage + 1}/unit1/gn_proj", GROUP_SCALE
        )
    return rules


def _mixer_rules(spec: MixerSpec) -> list[Rule]:
    block = [
        *norm("blocks.{i}.norm1", "MixerBlock_{i}/LayerNorm_0"),
        *dense("blocks.{i}.tokens.hidden", "MixerBlock_{i}/token_mixing/Dense_0"),
        *dense("blocks.{i}.tokens.output", "MixerBlock_{i}/token_mixing/Dense_1"),
        *norm("blocks.{i}.norm2", "MixerBlock_{i}/LayerNorm_1"),
        *dense("blocks.{i}.channels.hidden", "MixerBlock_{i}/channel_mixing/Dense_0"),
        *dense("blocks.{i}.channels.output", "MixerBlock_{i}/channel_mixing/Dense_1"),
    ]
    return [
        *patch_embedding("stem", (*spec.patch_size, spec.in_channels, spec.width)),
        *repeated(block, spec.depth),
        *norm("norm", "pre_head_layer_norm"),
    ]
