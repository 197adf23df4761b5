"""torchvision's Vision Transformers (torchvision/models/vision_transformer.py): state dicts alone,
no configuration."""

from __future__ import annotations

import dataclasses
from typing import Any

from patchword.models.model import Model
from patchword.models.zoo import variant_name
from patchword.spec.model import PreprocessSpec, ViTSpec
from patchword.weights import mapping
from patchword.weights.held import ANY, VIT, Held, Near, check_held, no_place
from patchword.weights.mapping import Reading, Rule, Written, layer, patches, repeated, rule
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
HELD: Held = {
    ViTSpec: {**VIT, "head": ANY, "head_width": ANY, "norm_eps": Near(NORM_EPS, "LayerNorm")}
}


def rules_for(spec: ViTSpec) -> list[Rule]:
    rules = [
        *layer("patch_embedding", "conv_proj", patches(spec.patch_size, spec.in_channels)),
        rule("class_token", "class_token"),
        rule("positions.0.table", "encoder.pos_embedding"),
        *repeated(BLOCK, spec.depth),
        *layer("norm", "encoder.ln"),
    ]
    if spec.num_classes:
        rules += layer("head", "heads.head")
        rules += layer("pre_logits", "heads.pre_logits") if spec.head == "mlp" else []
    return rules


def recognises(shapes: Shapes, config: Config) -> bool:
    """Whether names are those of torchvision's VisionTransformer."""
    return "conv_proj.weight" in shapes and "encoder.pos_embedding" in shapes


def find(shapes: Shapes, config: Config, hints: Hints) -> Reading:
    """The spec and the rules of torchvision's names and shapes; there is no `config`. `hints` are
    fields of the spec that win over what is inferred. Raises `PatchwordError` if tensors that tell
    the architecture are missing or of another shape."""
    width, channels, *patch = shape_of(shapes, "conv_proj.weight", 4)
    table = "encoder.pos_embedding"
    entries, sizes = shape_of(shapes, table, 3)[1] - 1, [hints.get("image_size")]
    hidden = width
    if "heads.pre_logits.weight" in shapes:
        hidden = shape_of(shapes, "heads.pre_logits.weight", 2)[0]
    fields: dict[str, Any] = {
        "image_size": image_size_for(entries, patch, sizes, table),
        "in_channels": channels,
        "num_classes": classes_of(shapes, "heads.head.weight"),
        "patch_size": patch,
        "depth": count(shapes, r"encoder\.layers\.encoder_layer_(\d+)\."),
        "width": width,
        "mlp_width": shape_of(shapes, "encoder.layers.encoder_layer_0.mlp.0.weight", 2)[0],
        "heads": guess_heads(width),
        "head": "mlp" if "heads.pre_logits.weight" in shapes else "linear",
        "head_width": None if hidden == width else hidden,
        "norm_eps": NORM_EPS,
    }
    spec = spec_of(ViTSpec, fields, hints)
    preprocess, note = _preprocess(spec)
    notes = (*say_heads(width, hints), f"preprocessing assumed: {note}")
    return Reading(spec=spec, rules=rules_for(spec), preprocess=preprocess, notes=notes)


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
    spec = model.spec
    check_held(spec, HELD, "torchvision")
    assert isinstance(spec, ViTSpec)
    for name, (height, width) in {
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
    }.items():
        if height != width:
            raise no_place("torchvision", f"{name} that is not square ({height} x {width})")
    return Written(tensors=mapping.write(model.state_dict(), rules_for(spec)))
