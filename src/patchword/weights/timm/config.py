"""timm's `config.json`: names of architectures, their arguments, preprocessing and labels.

`{"architecture", "num_classes", "model_args", "pretrained_cfg": {...}, "label_names"}`, as
timm/models/_hub.py reads and writes it; arguments are those of timm's model classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from patchword.models.model import Model
from patchword.spec.model import ModelSpec, PreprocessSpec
from patchword.spec.parse import PatchwordError, parse
from patchword.weights.mapping import Reading, Rule
from patchword.weights.shapes import Config, Hints

Arguments = dict[str, Any]

VIT_DEFAULTS: Arguments = {
    "img_size": 224,
    "in_chans": 3,
    "patch_size": 16,
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "mlp_ratio": 4.0,
    "class_token": True,
    "global_pool": "token",
    "fc_norm": None,
    "pool_include_prefix": False,
    "no_embed_class": False,
    "reg_tokens": 0,
    "pos_embed": "learn",
    "pre_norm": False,
    "qk_norm": False,
    "init_values": None,
    "act_layer": "gelu",
    "mlp_layer": "mlp",
    "norm_eps": 1e-6,
    "distilled": False,
    "stem": None,
}
"""Arguments of timm's VisionTransformer, and of ours the last four, which are no strings there."""
FIXED = ("mlp_layer", "norm_eps", "distilled", "stem")
"""what a name alone decides: no `model_args` can"""

SIZES: dict[str, Arguments] = {
    "tiny": {"embed_dim": 192, "num_heads": 3},
    "small": {"embed_dim": 384, "num_heads": 6},
    "medium": {"embed_dim": 512, "num_heads": 8},
    "base": {},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
    "giant": {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11},
    "gigantic": {"embed_dim": 1664, "depth": 48, "num_heads": 16, "mlp_ratio": 64 / 13},
    "so400m": {"embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 3.7362},
    "giantopt": {"embed_dim": 1536, "depth": 40, "num_heads": 16},
}
"""by the word after `vit_`, `deit_` or `deit3_`"""

TANH = r"_(patch32_siglip|giantopt_.*siglip|large_patch16_siglip_(gap_)?512|so400m_patch16_siglip)"
TRAITS: tuple[tuple[str, Arguments], ...] = (
    (r"^vit_base_patch16_gap_", {"num_heads": 16}),
    (r"^deit3_", {"no_embed_class": True, "init_values": 1e-6}),
    (r"^deit_\w+_distilled_", {"distilled": True}),
    (r"_dinov2$", {"init_values": 1e-5, "img_size": 518}),
    (r"_reg4_dinov2$", {"reg_tokens": 4, "no_embed_class": True}),
    (
        r"_giant_\w+_dinov2$",
        {"embed_dim": 1536, "num_heads": 24, "mlp_ratio": 8192 / 1536}
        | {"mlp_layer": "swiglu", "act_layer": "silu"},
    ),
    (r"_siglip_", {"class_token": False, "global_pool": "map"}),
    (r"_gap_\d+$", {"class_token": False, "global_pool": "avg"}),
    (r"_siglip_gap_", {"fc_norm": False}),
    (TANH, {"act_layer": "gelu_tanh"}),
    (r"_clip_", {"norm_eps": 1e-5, "pre_norm": True}),
    (r"^vit_\w+_r(26|50)?_", {"patch_size": 1}),
    (r"^vit_\w+_r_s16_p8_", {"stem": (), "patch_size": 8}),
    (r"^vit_\w+_r26_s32_", {"stem": (2, 2, 2, 2)}),
    (r"^vit_\w+_r50_s16_", {"stem": (3, 4, 9)}),
    (r"^vit_\w+_r50_s32_", {"stem": (3, 4, 6, 3)}),
    (r"^test_vit2?$", {"embed_dim": 64, "num_heads": 2}),
    (r"^test_vit[34]$", {"embed_dim": 96, "num_heads": 3}),
    (r"^test_vit3$", {"pool_include_prefix": True}),
)
"""What parts of a name say beyond the size; later rows win (timm/models/vision_transformer.py,
deit.py, vision_transformer_hybrid.py)."""
NOT_OURS = (
    ("quickgelu", "activation"),
    ("_rpn_", "order of norms"),
    ("radio|mci|resnet\\d", "stem"),
)
"""Names of models that have our tensors but compute something else."""

VIT_NAMES = (
    *("vit_base_patch16_224", "vit_tiny_patch16_224", "vit_tiny_patch16_384"),
    *(f"vit_small_{rest}" for rest in ("patch16_224", "patch16_384", "patch32_224", "patch32_384")),
    *("vit_small_patch8_224", "vit_base_patch16_384", "vit_base_patch32_224"),
    *("vit_base_patch32_384", "vit_base_patch8_224", "vit_large_patch16_224"),
    *("vit_large_patch16_384", "vit_large_patch32_224", "vit_large_patch32_384"),
    *("vit_large_patch14_224", "vit_huge_patch14_224", "vit_giant_patch14_224"),
    *("vit_gigantic_patch14_224", "vit_base_patch16_clip_224"),
    *(f"deit_{size}_distilled_patch16_224" for size in ("base", "tiny", "small")),
    "deit_base_distilled_patch16_384",
    *(f"deit3_{size}_patch16_224" for size in ("small", "medium", "base", "large")),
    *(f"deit3_{size}_patch16_384" for size in ("small", "base", "large")),
    "deit3_huge_patch14_224",
    *(f"vit_{size}_patch14_dinov2" for size in ("small", "base", "large", "giant")),
    *(f"vit_{size}_patch14_reg4_dinov2" for size in ("small", "base", "large", "giant")),
    *(f"vit_base_patch16_siglip_{size}" for size in (224, 256, 384, 512)),
    *("vit_large_patch16_siglip_256", "vit_large_patch16_siglip_384"),
    *("vit_so400m_patch14_siglip_224", "vit_so400m_patch14_siglip_384"),
    *("vit_tiny_r_s16_p8_224", "vit_tiny_r_s16_p8_384", "vit_small_r26_s32_224"),
    *("vit_small_r26_s32_384", "vit_base_r26_s32_224", "vit_base_r50_s16_224"),
    *("vit_base_r50_s16_384", "vit_large_r50_s32_224", "vit_large_r50_s32_384"),
)
"""The names under which models are written; the first of those that differ least is chosen."""


def vit_arguments(name: str) -> Arguments:
    """The arguments that the name of a ViT stands for, those it does not say at their defaults."""
    arguments = dict(VIT_DEFAULTS)
    size = re.match(r"(?:vit|deit3?)_([a-z0-9]+)_", name)
    arguments |= SIZES.get(size[1], {}) if size else {}
    for key, pattern in (("patch_size", r"_patch(\d+)"), ("img_size", r"_(\d{3})$")):
        number = re.search(pattern, name)
        arguments |= {key: int(number[1])} if number else {}
    for pattern, more in TRAITS:
        if re.search(pattern, name):
            arguments |= more
    return arguments


def nearest_vit(wanted: Arguments) -> tuple[str, Arguments]:
    """The name whose arguments differ least from `wanted`, and those that differ.

    Raises `PatchwordError` if timm has none with the parts that only a name can say."""
    best: tuple[str, Arguments] | None = None
    for name in VIT_NAMES:
        known = vit_arguments(name)
        known["mlp_ratio"] = ratio(int(known["embed_dim"] * known["mlp_ratio"]), known["embed_dim"])
        if any(known[key] != wanted[key] for key in FIXED):
            continue
        differing = {key: value for key, value in wanted.items() if known[key] != value}
        if best is None or len(differing) < len(best[1]):
            best = name, differing
    if best is None:
        parts = ", ".join(f"{key} {wanted[key]}" for key in FIXED)
        raise PatchwordError(
            f"timm names no model with {parts} together; save it in patchword's own format"
        )
    return best


def ratio(hidden: int, width: int) -> float:
    """The `mlp_ratio` from which timm computes `hidden`: it rounds the product down."""
    value = hidden / width
    return value if int(width * value) == hidden else (hidden + 0.5) / width


def side(size: tuple[int, int]) -> int | list[int]:
    """A size as timm's JSON has it: one number for a square."""
    return size[0] if size[0] == size[1] else list(size)


def sides(value: Any) -> tuple[int, int] | None:
    """The reverse of `side`; None if it is no size."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return (value[0], value[1]) if all(isinstance(n, int) for n in value) else None
    return None


def table(config: Config, key: str) -> Mapping[str, Any]:
    """A JSON object inside of a configuration; empty if it is not there."""
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}


def architecture(config: Config) -> str:
    """The name without its tag, or "" where there is none."""
    name = config.get("architecture")
    return name.split(".")[0] if isinstance(name, str) else ""


def input_sizes(config: Config, hints: Hints) -> list[tuple[int, int]]:
    """The image sizes that hints and configuration name, the surest first."""
    pretrained = table(config, "pretrained_cfg")
    named = pretrained.get("input_size")
    last = named[1:] if isinstance(named, (list, tuple)) else None
    values = (hints.get("image_size"), table(config, "model_args").get("img_size"), last)
    return [size for size in map(sides, values) if size is not None]


def reading_of(
    spec: ModelSpec,
    rules: list[Rule],
    config: Config,
    notes: list[str],
    ignored: tuple[str, ...] = (),
) -> Reading:
    """What a configuration says besides the architecture, with the spec and its rules."""
    preprocess = preprocess_in(config, spec.in_channels, notes)
    classes = labels_in(config, spec.num_classes)
    return Reading(
        spec=spec,
        rules=rules,
        preprocess=preprocess,
        classes=classes,
        ignored=ignored,
        notes=tuple(notes),
    )


def preprocess_in(config: Config, channels: int, notes: list[str]) -> PreprocessSpec:
    """The preprocessing that a configuration names; what is assumed instead is added to `notes`."""
    values = table(config, "pretrained_cfg")
    if not values:
        notes.append("preprocessing assumed: mean and std 0.5, bicubic, as in most of timm's ViTs")
        return PreprocessSpec(mean=(0.5,) * channels, std=(0.5,) * channels)
    fields: dict[str, Any] = {}
    for key in ("mean", "std"):
        value = values.get(key)
        if isinstance(value, (list, tuple)) and value:
            same = len(value) == channels
            fields[key] = list(value) if same else [sum(value) / len(value)] * channels
        else:
            fields[key] = [0.5] * channels
    if values.get("interpolation") in ("bilinear", "bicubic"):
        fields["interpolation"] = values["interpolation"]
    elif "interpolation" in values:
        notes.append(f"interpolation bicubic in place of timm's {values['interpolation']}")
    fields["crop_fraction"] = values.get("crop_pct") or 0.875
    mode = values.get("crop_mode") or "center"
    if mode == "squash":
        if fields["crop_fraction"] != 1:
            notes.append(
                f"the whole image in place of the middle {fields['crop_fraction']:g} of it"
            )
        fields |= {"resize": "stretch", "crop_fraction": 1.0}
    elif mode != "center":
        notes.append(f"a centre crop in place of timm's {mode}")
    return parse(PreprocessSpec, fields)


def labels_in(config: Config, num_classes: int) -> tuple[str, ...]:
    """The names of the classes, if there is one for each."""
    values = config.get("label_names") or table(config, "pretrained_cfg").get("label_names")
    names = tuple(map(str, values)) if isinstance(values, (list, tuple)) else ()
    return names if len(names) == num_classes else ()


def config_of(
    model: Model,
    name: str,
    arguments: Arguments,
    *,
    first_conv: str = "patch_embed.proj",
    classifier: str | list[str] = "head",
    fixed_size: bool = True,
) -> dict[str, Any]:
    """`config.json` of a model that is written under `name` with these `model_args`;
    `first_conv` and `classifier` name its first and last layers."""
    spec, preprocess = model.spec, model.preprocess
    config: dict[str, Any] = {
        "architecture": name,
        "num_classes": spec.num_classes,
        "model_args": {"num_classes": spec.num_classes} | arguments,
        "pretrained_cfg": {
            "num_classes": spec.num_classes,
            "input_size": [spec.in_channels, *spec.image_size],
            "fixed_input_size": fixed_size,
            "interpolation": preprocess.interpolation,
            "crop_pct": preprocess.crop_fraction,
            "crop_mode": "squash" if preprocess.resize == "stretch" else "center",
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "first_conv": first_conv,
            "classifier": classifier,
        },
    }
    if model.classes:
        config["label_names"] = list(model.classes)
    return config
