"""Google's npz files of google-research/vision_transformer: ViT (paper; AugReg, arXiv 2106.10270),
hybrids and MLP-Mixer (arXiv 2105.01601), by the names of its `models_*.py`.

Numerics of that code: GELU is Flax's default, the tanh approximation; LayerNorm and GroupNorm have
eps 1e-6; weight standardisation divides by (std + 1e-5); `pre_logits` is followed by tanh. It
evaluates on images stretched to the model's size, bilinear (there without antialiasing).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from patchword.models.model import Model
from patchword.spec.model import MixerSpec, StemSpec, ViTSpec
from patchword.weights.google import flax
from patchword.weights.held import ANY, MIXER, VIT, Held, check_held
from patchword.weights.mapping import Reading, Rule, Written, prefixed, repeated, rule
from patchword.weights.mapping import write as write_tensors
from patchword.weights.shapes import Config, Hints, Shapes, count, image_size_for, shape_of, spec_of

PARTS = ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
"""of the published files, which are also written; the current code names them as `LINEN`"""
POSITIONS = "Transformer/posembed_input/pos_embedding"
PLACED = re.compile(rf"[\w/]*?{POSITIONS}")
"""Positions within the encoder: big_vision, whose blocks may be named alike, has them outside."""
OURS = re.compile(
    r"[\w/]*?(Transformer/encoderblock_\d+/MultiHeadDotProductAttention_1|MixerBlock_\d+)/.*"
)

GELU = {"activation": ("gelu_tanh",)}
HELD: Held = {
    ViTSpec: {
        **VIT,
        **GELU,
        "stem": {"layers": ANY, "width": ANY},
        "pool": ("token", "gap"),
        "head": ANY,
        "head_width": ANY,
    },
    MixerSpec: {**MIXER, **GELU},
}
"""Where the defaults of a spec are that code's numerics, which no file stores."""


def recognises(shapes: Shapes, config: Config) -> bool:
    """Whether the names are those of a ViT, a hybrid or a Mixer of this format."""
    return any(OURS.fullmatch(name) or PLACED.fullmatch(name) for name in shapes)


def find(shapes: Shapes, config: Config, hints: Hints) -> Reading:
    """The model that names and shapes tell. Raises `PatchwordError` if they tell none."""
    prefix = flax.prefix_of(shapes, "stem/kernel")
    if prefix + "stem/kernel" in shapes:
        spec: ViTSpec | MixerSpec = _mixer(shapes, prefix, hints)
    else:
        prefix = flax.prefix_of(shapes, "embedding/kernel")
        spec = _vit(shapes, prefix, hints)
    return Reading(
        spec=spec,
        rules=_rules(spec, prefix, _parts(shapes, prefix)),
        preprocess=flax.preprocess(spec.in_channels, resize="stretch"),
        ignored=flax.ignored_for(prefix, spec),
    )


def write(model: Model) -> Written:
    """A ViT, hybrid or Mixer under the names of this format. Raises `PatchwordError` if the format
    cannot hold the model."""
    spec = model.spec
    check_held(spec, HELD, "Google's vision_transformer")
    assert isinstance(spec, ViTSpec | MixerSpec)
    return Written(tensors=write_tensors(model.state_dict(), _rules(spec, "", PARTS)))


# Specs from shapes --------------------------------------------------------------------------------


def _vit(shapes: Shapes, prefix: str, hints: Hints) -> ViTSpec:
    fields = flax.vit_fields(shapes, prefix, _parts(shapes, prefix))
    if f"{prefix}conv_root/kernel" in shapes:
        *_, channels, width = shape_of(shapes, f"{prefix}conv_root/kernel", 4)
        stem = _stem(shapes, prefix, width)
        rows, columns = fields["patch_size"]
        patch = (rows * stem.stride, columns * stem.stride)
        fields |= {"stem": vars(stem), "in_channels": channels, "patch_size": patch}
    table, sizes = prefix + POSITIONS, [hints.get("image_size")]
    entries = shape_of(shapes, table, 3)[1] - (fields["pool"] == "token")
    fields["image_size"] = image_size_for(entries, fields["patch_size"], sizes, table)
    return spec_of(ViTSpec, fields, hints)


def _parts(shapes: Shapes, prefix: str) -> tuple[str, ...]:
    """What an encoder block's layers are called."""
    attention = f"{prefix}Transformer/encoderblock_0/{flax.LINEN[1]}/"
    return flax.LINEN if any(name.startswith(attention) for name in shapes) else PARTS


def _stem(shapes: Shapes, prefix: str, width: int) -> StemSpec:
    stages = max(count(shapes, rf"{prefix}block(\d+)/unit\d+/") - 1, 0)  # numbered from 1
    units = (count(shapes, rf"{prefix}block{stage + 1}/unit(\d+)/") - 1 for stage in range(stages))
    return StemSpec(layers=tuple(units), width=width)


def _mixer(shapes: Shapes, prefix: str, hints: Hints) -> MixerSpec:
    rows, columns, channels, width = shape_of(shapes, f"{prefix}stem/kernel", 4)
    token, channel = (
        f"{prefix}MixerBlock_0/{part}_mixing/Dense_0/kernel" for part in ("token", "channel")
    )
    entries, tokens_mlp_width = shape_of(shapes, token, 2)
    fields: dict[str, Any] = {
        "image_size": image_size_for(entries, (rows, columns), [hints.get("image_size")], token),
        "in_channels": channels,
        "num_classes": flax.classes_in(shapes, f"{prefix}head/kernel"),
        "depth": flax.check_depth(count(shapes, rf"{prefix}MixerBlock_(\d+)/")),
        "width": width,
        "tokens_mlp_width": tokens_mlp_width,
        "channels_mlp_width": shape_of(shapes, channel, 2)[1],
        "patch_size": (rows, columns),
        "activation": "gelu_tanh",
    }
    return spec_of(MixerSpec, fields, hints)


# Rules --------------------------------------------------------------------------------------------


def _rules(spec: ViTSpec | MixerSpec, prefix: str, parts: Sequence[str]) -> list[Rule]:
    rules = _mixer_rules(spec) if isinstance(spec, MixerSpec) else _vit_rules(spec, parts)
    return prefixed(rules, prefix)


def _vit_rules(spec: ViTSpec, parts: Sequence[str]) -> list[Rule]:
    stem, (rows, columns) = spec.stem, spec.patch_size
    stride, channels = (1, spec.in_channels) if stem is None else (stem.stride, stem.channels)
    block = flax.encoder_block("Transformer/encoderblock_{i}", parts, spec.width, spec.heads)
    kernel = (rows // stride, columns // stride, channels, spec.width)
    return [
        *(_stem_rules(stem) if stem is not None else ()),
        *flax.vit_rules(spec, kernel, repeated(block, spec.depth)),
        rule("positions.0.table", POSITIONS),
    ]


def _stem_rules(stem: StemSpec) -> list[Rule]:
    names = {"stem.root": "conv_root", "stem.root_norm": "gn_root"}
    for stage, units in enumerate(stem.layers):
        ours, theirs = f"stem.stages.{stage}", f"block{stage + 1}"
        for unit, k in itertools.product(range(units), (1, 2, 3)):
            names[f"{ours}.{unit}.conv{k}"] = f"{theirs}/unit{unit + 1}/conv{k}"
            names[f"{ours}.{unit}.norm{k}"] = f"{theirs}/unit{unit + 1}/gn{k}"
        names[f"{ours}.0.downsample"] = f"{theirs}/unit1/conv_proj"
        names[f"{ours}.0.downsample_norm"] = f"{theirs}/unit1/gn_proj"
    rules: list[Rule] = []
    for ours, theirs in names.items():
        is_norm = "gn" in theirs
        rules += (
            flax.norm(ours, theirs, flax.GROUP_SCALE) if is_norm else flax.convolution(ours, theirs)
        )
    return rules


def _mixer_rules(spec: MixerSpec) -> list[Rule]:
    block = [
        *flax.norm("blocks.{i}.norm1", "MixerBlock_{i}/LayerNorm_0"),
        *flax.dense("blocks.{i}.tokens.hidden", "MixerBlock_{i}/token_mixing/Dense_0"),
        *flax.dense("blocks.{i}.tokens.output", "MixerBlock_{i}/token_mixing/Dense_1"),
        *flax.norm("blocks.{i}.norm2", "MixerBlock_{i}/LayerNorm_1"),
        *flax.dense("blocks.{i}.channels.hidden", "MixerBlock_{i}/channel_mixing/Dense_0"),
        *flax.dense("blocks.{i}.channels.output", "MixerBlock_{i}/channel_mixing/Dense_1"),
    ]
    return [
        *flax.patch_embedding("stem", (*spec.patch_size, spec.in_channels, spec.width)),
        *repeated(block, spec.depth),
        *flax.norm("norm", "pre_head_layer_norm"),
        *(flax.dense("head", "head") if spec.num_classes else ()),
    ]
