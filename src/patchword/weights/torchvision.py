"""torchvision's Vision Transformers (torchvision/models/vision_transformer.py): state dicts alone,
no configuration."""

from __future__ import annotations

import dataclasses
from typing import Any

from patchword.models.model import Model
from patchword.models.vit import ViT
from patchword.models.zoo import variant_name
from patchword.spec.model import PreprocessSpec, ViTSpec
from patchword.spec.parse import PatchwordError, parse
from patchword.weights import mapping
from patchword.weights.mapping import (
    Config,
    Found,
    Rule,
    Shapes,
    Written,
    count,
    guess_heads,
    layer,
    patches,
    repeated,
    rule,
    shape_of,
    square_grid,
)

LAYER = "encoder.layers.encoder_layer_{i}."
BLOCK = [
    *layer("blocks.{i}.norm1", f"{LAYER}ln_1"),
    rule("blocks.{i}.attention.qkv.weight", f"{LAYER}self_attention.in_proj_weight"),
    rule("blocks.{i}.attention.qkv.bias", f"{LAYER}self_attention.in_proj_bias"),
    *layer("blocks.{i}.attention.projection", f"{LAYER}self_attention.out_proj"),
    *layer("blocks.{i}.norm2", f"{LAYER}ln_2"),
    *layer("blocks.{i}.mlp.hidden", f"{LAYER}mlp.0"),
    *layer("blocks.{i}.mlp.output", f"{LAYER}mlp.3"),
]
PREPROCESS = PreprocessSpec(
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation="bilinear",
    crop_fraction=224 / 256,
)
"""of most of torchvision's ImageNet weights"""
V1, END_TO_END, LINEAR = (f"IMAGENET1K_{name}V1" for name in ("", "SWAG_E2E_", "SWAG_LINEAR_"))
PUBLISHED: dict[tuple[str, int], tuple[str, int]] = {
    ("ViT-B/16", 224): (V1, 256),
    ("ViT-B/32", 224): (V1, 256),
    ("ViT-L/16", 224): (V1, 242),
    ("ViT-L/32", 224): (V1, 256),
    ("ViT-B/16", 384): (END_TO_END, 384),
    ("ViT-L/16", 512): (END_TO_END, 512),
    ("ViT-H/14", 518): (END_TO_END, 518),
    ("ViT-H/14", 224): (LINEAR, 224),
}
"""Variant and side in pixels to torchvision's weights and the side that they resize to before the
crop; those of SWAG are bicubic (torchvision/models/vision_transformer.py)."""
TWINS = ("ViT-B/16", "ViT-L/16")
"""They have `LINEAR` weights at 224 pixels too, which no shape tells from `V1`."""
NORM_EPS = 1e-6


def rules(spec: ViTSpec) -> list[Rule]:
    found = [
        *layer("patch_embedding", "conv_proj", patches(spec.patch_size, spec.in_channels)),
        rule("class_token", "class_token"),
        rule("positions.0.table", "encoder.pos_embedding"),
        *repeated(BLOCK, spec.depth),
        *layer("norm", "encoder.ln"),
    ]
    if spec.num_classes:
        found += layer("head", "heads.head")
        found += layer("pre_logits", "heads.pre_logits") if spec.head == "mlp" else []
    return found


def recognises(shapes: Shapes, config: Config) -> bool:
    """Whether names are those of torchvision's VisionTransformer."""
    return "conv_proj.weight" in shapes and "encoder.pos_embedding" in shapes


def find(shapes: Shapes, config: Config, hints: dict[str, Any]) -> Found:
    """The spec and the rules of torchvision's names and shapes; there is no `config`. `hints` are
    fields of the spec that win over what is inferred. Raises `PatchwordError` if tensors that tell
    the architecture are missing or of another shape."""
    width, channels, *patch = shape_of(shapes, "conv_proj.weight", 4)
    entries = shape_of(shapes, "encoder.pos_embedding", 3)[1] - 1
    size = hints.get("image_size")
    if size is None or (size[0] // patch[0]) * (size[1] // patch[1]) != entries:
        size = square_grid(entries, (patch[0], patch[1]), "encoder.pos_embedding")
    hidden = width
    if "heads.pre_logits.weight" in shapes:
        hidden = shape_of(shapes, "heads.pre_logits.weight", 2)[0]
    notes: list[str] = []
    if "heads" not in hints:
        notes.append(
            f"assumed: {guess_heads(width)} heads, as models {width} wide have; heads=... says "
            "otherwise"
        )
    fields: dict[str, Any] = {
        "image_size": list(size),
        "in_channels": channels,
        "num_classes": shapes["heads.head.weight"][0] if shapes.get("heads.head.weight") else 0,
        "patch_size": patch,
        "depth": count(shapes, r"encoder\.layers\.encoder_layer_(\d+)\."),
        "width": width,
        "mlp_width": shape_of(shapes, "encoder.layers.encoder_layer_0.mlp.0.weight", 2)[0],
        "heads": guess_heads(width),
        "head": "mlp" if "heads.pre_logits.weight" in shapes else "linear",
        "head_width": None if hidden == width else hidden,
        "norm_eps": NORM_EPS,
    }
    fields |= {key: value for key, value in hints.items() if key != "image_size"}
    spec = parse(ViTSpec, fields)
    preprocess, note = _preprocess(spec)
    notes.append(f"preprocessing assumed: {note}")
    return Found(spec=spec, rules=rules(spec), preprocess=preprocess, notes=tuple(notes))


def _preprocess(spec: ViTSpec) -> tuple[PreprocessSpec, str]:
    """The preprocessing, which no file holds: that of the published weights of this model and size,
    else of most of them; and what was assumed, in words."""
    channels, name, side = spec.in_channels, variant_name(spec), spec.image_size[0]
    if channels != 3:
        return PreprocessSpec(mean=(0.5,) * channels, std=(0.5,) * channels), "mean and std 0.5"
    if (name, side) not in PUBLISHED or spec.image_size[1] != side:
        share = PREPROCESS.crop_fraction
        return PREPROCESS, f"bilinear, the middle {share:g}, as most of torchvision's weights"
    weights, resized = PUBLISHED[name, side]
    kind = "bilinear" if weights == V1 else "bicubic"
    note = f"that of {weights}: {kind}, resized to {resized} px"
    if name in TWINS and weights == V1:
        note += f" ({LINEAR}, of the same shapes, has bicubic, {side} px)"
    crop = side / resized
    return dataclasses.replace(PREPROCESS, interpolation=kind, crop_fraction=crop), note


def write(model: Model) -> Written:
    """A state dict for torchvision's VisionTransformer. Raises `PatchwordError` if it has no such
    model."""
    if not isinstance(model, ViT):
        raise PatchwordError(f"torchvision's format has no place for a {type(model).__name__}")
    spec = model.spec
    square = spec.image_size[0] == spec.image_size[1] and spec.patch_size[0] == spec.patch_size[1]
    problems = {
        "hybrid": spec.stem is not None,
        f"pool {spec.pool}": spec.pool != "token",
        f"position {spec.position} (at {spec.position_at})": (spec.position, spec.position_at)
        != ("learned-1d", "stem"),
        f"activation {spec.activation}": spec.activation != "gelu",
        "LayerScale": spec.layer_scale is not None,
        "registers": spec.registers > 0,
        "distillation token": spec.distillation != "none",
        "qk_norm": spec.qk_norm,
        "images or patches that are not square": not square,
    }
    for problem, present in problems.items():
        if present:
            raise PatchwordError(
                f"torchvision has no {problem}; save the model in patchword's own format"
            )
    mapping.warn_eps("torchvision", "LayerNorm", spec.norm_eps, NORM_EPS)
    return Written(tensors=mapping.write(model.state_dict(), rules(spec)))
