"""timm's BiT ResNets and MLP-Mixers (timm/models/resnetv2.py, mlp_mixer.py)."""

from __future__ import annotations

from typing import Any

from patchword.models.model import Model
from patchword.models.resnet import BIT_WIDTH
from patchword.spec.model import MixerSpec, ResNetSpec
from patchword.weights import mapping
from patchword.weights.held import no_place
from patchword.weights.mapping import Reading, Rule, Written, layer, patches, repeated, rule, viewed
from patchword.weights.shapes import (
    Config,
    Hints,
    Shapes,
    classes_of,
    count,
    image_size_for,
    shape_of,
    spec_of,
)
from patchword.weights.timm.config import Arguments, config_of, input_sizes, ratio, reading_of, side
from patchword.weights.timm.names import CONV_EPS, GROUP_EPS, LAYER_EPS, same_filters, stage_rules

BITS = {
    ((3, 4, 6, 3), 1): "resnetv2_50x1_bit",
    ((3, 4, 6, 3), 3): "resnetv2_50x3_bit",
    ((3, 4, 23, 3), 1): "resnetv2_101x1_bit",
    ((3, 4, 23, 3), 3): "resnetv2_101x3_bit",
    ((3, 8, 36, 3), 2): "resnetv2_152x2_bit",
    ((3, 8, 36, 3), 4): "resnetv2_152x4_bit",
}
"""timm's names by blocks per stage and width factor, which only a name can say."""
MIXERS = {
    (8, 512, 32): "mixer_s32_224",
    (8, 512, 16): "mixer_s16_224",
    (12, 768, 32): "mixer_b32_224",
    (12, 768, 16): "mixer_b16_224",
    (24, 1024, 32): "mixer_l32_224",
    (24, 1024, 16): "mixer_l16_224",
}
"""By depth, width and patch size, which only a name can say."""
MIXER_BLOCK = [
    *layer("blocks.{i}.norm1", "blocks.{i}.norm1"),
    *layer("blocks.{i}.tokens.hidden", "blocks.{i}.mlp_tokens.fc1"),
    *layer("blocks.{i}.tokens.output", "blocks.{i}.mlp_tokens.fc2"),
    *layer("blocks.{i}.norm2", "blocks.{i}.norm2"),
    *layer("blocks.{i}.channels.hidden", "blocks.{i}.mlp_channels.fc1"),
    *layer("blocks.{i}.channels.output", "blocks.{i}.mlp_channels.fc2"),
]


# BiT ----------------------------------------------------------------------------------------------


def is_bit(shapes: Shapes) -> bool:
    return "stem.conv.weight" in shapes and "stages.0.blocks.0.conv3.weight" in shapes


def _bit_rules(spec: ResNetSpec) -> list[Rule]:
    filters = same_filters(spec.weight_eps, "variance")
    rules = [
        rule("root.weight", "stem.conv.weight", filters),
        *layer("norm", "norm"),
        *stage_rules(spec.layers, "", "", filters, down_norm=False),
    ]
    if spec.num_classes:
        width = BIT_WIDTH * spec.width_factor * 4 * 2 ** (len(spec.layers) - 1)
        fully = viewed((spec.num_classes, width), (spec.num_classes, width, 1, 1))
        rules += layer("head", "head.fc", fully)
    return rules


def find_bit(shapes: Shapes, config: Config, hints: Hints) -> Reading:
    width, channels = shape_of(shapes, "stem.conv.weight", 4)[:2]
    fields: dict[str, Any] = {
        "layers": [count(shapes, rf"stages\.{stage}\.blocks\.(\d+)\.") for stage in range(4)],
        "width_factor": max(width // BIT_WIDTH, 1),
        "in_channels": channels,
        "num_classes": classes_of(shapes, "head.fc.weight"),
        "image_size": [*input_sizes(config, hints), (224, 224)][0],
        "norm_eps": GROUP_EPS,
        "weight_eps": CONV_EPS,
    }
    spec = spec_of(ResNetSpec, fields, hints)
    return reading_of(spec, _bit_rules(spec), config, [])


def write_bit(model: Model, spec: ResNetSpec) -> Written:
    name = BITS.get((spec.layers, spec.width_factor))
    if name is None:
        raise no_place("timm", f"BiT of layers {spec.layers} and width_factor {spec.width_factor}")
    arguments = {"in_chans": spec.in_channels} if spec.in_channels != 3 else {}
    layers: Arguments = {"first_conv": "stem.conv", "classifier": "head.fc"}
    return Written(
        tensors=mapping.write(model.state_dict(), _bit_rules(spec)),
        config=config_of(model, name, arguments, **layers, fixed_size=False),
    )


# Mixer --------------------------------------------------------------------------------------------


def is_mixer(shapes: Shapes) -> bool:
    return "stem.proj.weight" in shapes and "blocks.0.mlp_tokens.fc1.weight" in shapes


def _mixer_rules(spec: MixerSpec) -> list[Rule]:
    rules = [
        *layer("patch_embedding", "stem.proj", patches(spec.patch_size, spec.in_channels)),
        *repeated(MIXER_BLOCK, spec.depth),
        *layer("norm", "norm"),
    ]
    return [*rules, *layer("head", "head")] if spec.num_classes else rules


def find_mixer(shapes: Shapes, config: Config, hints: Hints) -> Reading:
    width, channels, *patch = shape_of(shapes, "stem.proj.weight", 4)
    tokens, entries = shape_of(shapes, "blocks.0.mlp_tokens.fc1.weight", 2)
    fields: dict[str, Any] = {
        "patch_size": patch,
        "in_channels": channels,
        "image_size": image_size_for(entries, patch, input_sizes(config, hints), "mlp_tokens"),
        "num_classes": classes_of(shapes, "head.weight"),
        "depth": count(shapes, r"blocks\.(\d+)\."),
        "width": width,
        "tokens_mlp_width": tokens,
        "channels_mlp_width": shape_of(shapes, "blocks.0.mlp_channels.fc1.weight", 2)[0],
        "activation": "gelu",
    }
    spec = spec_of(MixerSpec, fields, hints)
    notes = [] if config else [f"assumed: gelu, LayerNorm eps {LAYER_EPS}"]
    return reading_of(spec, _mixer_rules(spec), config, notes)


def write_mixer(model: Model, spec: MixerSpec) -> Written:
    name = MIXERS.get((spec.depth, spec.width, spec.patch_size[0]))
    if name is None or spec.patch_size[0] != spec.patch_size[1]:
        raise no_place(
            "timm",
            f"Mixer of depth {spec.depth}, width {spec.width} and patch_size {spec.patch_size}",
        )
    widths = (spec.tokens_mlp_width, spec.channels_mlp_width)
    default: Arguments = {"img_size": 224, "in_chans": 3, "mlp_ratio": [0.5, 4.0]}
    arguments: Arguments = {
        "img_size": side(spec.image_size),
        "in_chans": spec.in_channels,
        "mlp_ratio": [ratio(hidden, spec.width) for hidden in widths],
    }
    arguments = {key: value for key, value in arguments.items() if default[key] != value}
    return Written(
        tensors=mapping.write(model.state_dict(), _mixer_rules(spec)),
        config=config_of(model, name, arguments, first_conv="stem.proj"),
    )
