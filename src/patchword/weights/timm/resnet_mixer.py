"""timm's BiT ResNets and MLP-Mixers (timm/models/resnetv2.py, mlp_mixer.py)."""

from __future__ import annotations

from typing import Any

from patchword.models.mixer import Mixer
from patchword.models.resnet import BIT_WIDTH, ResNet
from patchword.spec.model import MixerSpec, ResNetSpec
from patchword.spec.parse import PatchwordError, parse
from patchword.weights import mapping
from patchword.weights.mapping import (
    Config,
    Found,
    Rule,
    Shapes,
    Written,
    count,
    layer,
    patches,
    repeated,
    rule,
    shape_of,
    square_grid,
    viewed,
)
from patchword.weights.timm.config import (
    Arguments,
    classes_in,
    config_of,
    input_sizes,
    labels_in,
    preprocess_in,
    ratio,
    side,
)
from patchword.weights.timm.names import CONV_EPS, GROUP_EPS, same_filters

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
    scaled = same_filters(spec.weight_eps, "variance")
    found = [rule("root.weight", "stem.conv.weight", scaled), *layer("norm", "norm")]
    for stage, blocks in enumerate(spec.layers):
        ours, theirs = f"stages.{stage}.", f"stages.{stage}.blocks."
        block: list[Rule] = []
        for k in (1, 2, 3):
            block.append(
                rule(f"{ours}{{i}}.conv{k}.weight", f"{theirs}{{i}}.conv{k}.weight", scaled)
            )
            block += layer(f"{ours}{{i}}.norm{k}", f"{theirs}{{i}}.norm{k}")
        found += repeated(block, blocks)
        down = f"{theirs}0.downsample.conv.weight"
        found.append(rule(f"{ours}0.downsample.weight", down, scaled))
    if spec.num_classes:
        width = BIT_WIDTH * spec.width_factor * 4 * 2 ** (len(spec.layers) - 1)
        fully = viewed((spec.num_classes, width), (spec.num_classes, width, 1, 1))
        found += layer("head", "head.fc", fully)
    return found


def find_bit(shapes: Shapes, config: Config, hints: dict[str, Any]) -> Found:
    width, channels = shape_of(shapes, "stem.conv.weight", 4)[:2]
    notes: list[str] = []
    sizes = input_sizes(config, hints)
    fields: dict[str, Any] = {
        "layers": [count(shapes, rf"stages\.{stage}\.blocks\.(\d+)\.") for stage in range(4)],
        "width_factor": max(width // BIT_WIDTH, 1),
        "in_channels": channels,
        "num_classes": classes_in(shapes, "head.fc.weight"),
        "image_size": list(sizes[0] if sizes else (224, 224)),
        "norm_eps": GROUP_EPS,
        "weight_eps": CONV_EPS,
    }
    spec = parse(ResNetSpec, fields | {k: v for k, v in hints.items() if k != "image_size"})
    return Found(
        spec=spec,
        rules=_bit_rules(spec),
        preprocess=preprocess_in(config, channels, notes),
        classes=labels_in(config, spec.num_classes),
        notes=tuple(notes),
    )


def write_bit(model: ResNet) -> Written:
    spec = model.spec
    name = BITS.get((spec.layers, spec.width_factor))
    if name is None:
        raise PatchwordError(
            f"timm names no BiT of {spec.layers} blocks and width factor {spec.width_factor}; "
            "save the model in patchword's own format"
        )
    mapping.warn_eps("timm", "GroupNorm", spec.norm_eps, GROUP_EPS)
    return Written(
        tensors=mapping.write(model.state_dict(), _bit_rules(spec)),
        config=config_of(
            model,
            name,
            {"in_chans": spec.in_channels} if spec.in_channels != 3 else {},
            first_conv="stem.conv",
            classifier="head.fc",
            fixed_size=False,
        ),
    )


# Mixer --------------------------------------------------------------------------------------------


def is_mixer(shapes: Shapes) -> bool:
    return "stem.proj.weight" in shapes and "blocks.0.mlp_tokens.fc1.weight" in shapes


def _mixer_rules(spec: MixerSpec) -> list[Rule]:
    found = [
        *layer("patch_embedding", "stem.proj", patches(spec.patch_size, spec.in_channels)),
        *repeated(MIXER_BLOCK, spec.depth),
        *layer("norm", "norm"),
    ]
    return [*found, *layer("head", "head")] if spec.num_classes else found


def find_mixer(shapes: Shapes, config: Config, hints: dict[str, Any]) -> Found:
    width, channels, *patch = shape_of(shapes, "stem.proj.weight", 4)
    tokens, entries = shape_of(shapes, "blocks.0.mlp_tokens.fc1.weight", 2)
    sizes = [
        size
        for size in input_sizes(config, hints)
        if (size[0] // patch[0]) * (size[1] // patch[1]) == entries
    ]
    size = sizes[0] if sizes else square_grid(entries, (patch[0], patch[1]), "mlp_tokens")
    notes: list[str] = [] if config else ["assumed: gelu, LayerNorm eps 1e-06"]
    fields: dict[str, Any] = {
        "patch_size": patch,
        "in_channels": channels,
        "image_size": list(size),
        "num_classes": classes_in(shapes, "head.weight"),
        "depth": count(shapes, r"blocks\.(\d+)\."),
        "width": width,
        "tokens_mlp_width": tokens,
        "channels_mlp_width": shape_of(shapes, "blocks.0.mlp_channels.fc1.weight", 2)[0],
        "activation": "gelu",
    }
    spec = parse(MixerSpec, fields | {k: v for k, v in hints.items() if k != "image_size"})
    return Found(
        spec=spec,
        rules=_mixer_rules(spec),
        preprocess=preprocess_in(config, channels, notes),
        classes=labels_in(config, spec.num_classes),
        notes=tuple(notes),
    )


def write_mixer(model: Mixer) -> Written:
    spec = model.spec
    name = MIXERS.get((spec.depth, spec.width, spec.patch_size[0]))
    if name is None or spec.patch_size[0] != spec.patch_size[1]:
        raise PatchwordError(
            f"timm names no Mixer of depth {spec.depth}, width {spec.width} and patches of "
            f"{spec.patch_size}; save the model in patchword's own format"
        )
    if spec.activation != "gelu":
        raise PatchwordError(
            f"timm's Mixers have the exact GELU, not {spec.activation}; save the model in "
            "patchword's own format"
        )
    mapping.warn_eps("timm", "LayerNorm", spec.norm_eps, 1e-6)
    widths = (spec.tokens_mlp_width, spec.channels_mlp_width)
    wanted: Arguments = {
        "img_size": side(spec.image_size),
        "in_chans": spec.in_channels,
        "mlp_ratio": [ratio(hidden, spec.width) for hidden in widths],
    }
    given: Arguments = {"img_size": 224, "in_chans": 3, "mlp_ratio": [0.5, 4.0]}
    return Written(
        tensors=mapping.write(model.state_dict(), _mixer_rules(spec)),
        config=config_of(
            model,
            name,
            {key: value for key, value in wanted.items() if given[key] != value},
            first_conv="stem.proj",
        ),
    )
