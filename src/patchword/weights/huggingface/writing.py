"""A model as a class of Hugging Face transformers, if there is one that computes the same."""

from __future__ import annotations

from typing import Any

from patchword.models.model import Model
from patchword.models.vit import ViT
from patchword.spec.model import ViTSpec
from patchword.weights import mapping
from patchword.weights.held import ANY, VIT, Held, check_held, no_place, position_table
from patchword.weights.huggingface import processor
from patchword.weights.huggingface.names import ACTIVATIONS, PARTS, rules_for
from patchword.weights.mapping import Written

SIGLIP, WITH = (
    ("SiglipVisionModel", "siglip_vision_model", "vision_model."),
    "dinov2_with_registers",
)
CLASSES = {
    "token none - - classes": ("ViTForImageClassification", "vit", "vit."),
    "token none - - -": ("ViTModel", "vit", ""),
    "token token - - classes": ("DeiTForImageClassification", "deit", "deit."),
    "token head - - classes": ("DeiTForImageClassificationWithTeacher", "deit", "deit."),
    "token token - - -": ("DeiTModel", "deit", ""),
    "token+gap none scaled - classes": ("Dinov2ForImageClassification", "dinov2", "dinov2."),
    "token none scaled - -": ("Dinov2Model", "dinov2", ""),
    "token+gap none scaled registers classes": (
        *("Dinov2WithRegistersForImageClassification", WITH, f"{WITH}."),
    ),
    "token none scaled registers -": ("Dinov2WithRegistersModel", WITH, ""),
    "map none - - -": SIGLIP,
    "gap none - - -": SIGLIP,
    "gap none - - classes": ("SiglipForImageClassification", "siglip", "vision_model."),
}
"""The class, its `model_type` and how names of its body begin, for pooling, distillation token,
LayerScale, registers and classes."""
HELD: Held = {
    ViTSpec: {
        **VIT,
        "pool": ANY,
        "position": ("none", "learned-1d", "learned-2d", "sincos2d"),
        "activation": ANY,
        "layer_scale": ANY,
        "registers": ANY,
        "distillation": ANY,
        "norm_eps": ANY,
    }
}
"""one by one; together as `CLASSES` has them"""
TITLE = "transformers"


def write(model: Model) -> Written:
    """The tensors, `config.json` and `preprocessor_config.json` of the class that computes what the
    model does; positions that the model adds at its stem, of whatever kind, become a table.

    Raises `PatchwordError` if there is no such class.
    """
    check_held(model.spec, HELD, TITLE)
    assert isinstance(model, ViT)
    spec = model.spec
    name, kind, prefix = _class_for(spec)
    tensors = {n: v for n, v in model.state_dict().items() if not n.startswith("positions.")}
    tensors["positions.0.table"] = position_table(model)
    rules = rules_for(spec, PARTS[_parts(spec)], prefix, mask_token=spec.layer_scale is not None)
    return Written(
        tensors=mapping.write(tensors, rules),
        config=_config(model, spec, name, kind),
        preprocessor=processor.write(spec, model.preprocess),
    )


def _class_for(spec: ViTSpec) -> tuple[str, str, str]:
    """The row of `CLASSES`. Raises `PatchwordError` if no class has all of a spec's parts."""
    scaled, classified = spec.layer_scale is not None, spec.num_classes > 0
    distillation = "token" if spec.distillation == "head" and not classified else spec.distillation
    parts = {"scaled": scaled, "registers": spec.registers > 0, "classes": classified}
    key = " ".join([spec.pool, distillation, *(n if has else "-" for n, has in parts.items())])
    if spec.activation == "swiglu" and not scaled:
        raise no_place(TITLE, "activation swiglu without layer_scale")
    if scaled and _mlp_ratio(spec) is None:
        times = f"{spec.mlp_width / spec.width:.3g} times the model"
        raise no_place(TITLE, f"layer_scale with mlp_width {spec.mlp_width}, {times}")
    if key not in CLASSES:
        raise no_place(
            TITLE,
            f"class for pool {spec.pool}, distillation {spec.distillation}, layer_scale "
            f"{spec.layer_scale}, registers {spec.registers} and num_classes {spec.num_classes} "
            "together",
        )
    name, kind, _ = CLASSES[key]
    if kind not in ("vit", "deit") and spec.image_size[0] != spec.image_size[1]:
        raise no_place(TITLE, f"image_size that is not square in {name}")
    if _parts(spec) == "siglip" and spec.patch_size[0] != spec.patch_size[1]:
        raise no_place(TITLE, f"patch_size that is not square in {name}")
    return CLASSES[key]


def _parts(spec: ViTSpec) -> str:
    if spec.pool in ("map", "gap"):
        return "siglip"
    if spec.layer_scale is None:
        return "vit"
    return "dinov2 swiglu" if spec.activation == "swiglu" else "dinov2"


def _mlp_ratio(spec: ViTSpec) -> int | None:
    """DINOv2's `mlp_ratio`, whole; with SwiGLU, two thirds of it, rounded up to 8, are used."""

    def width(ratio: int) -> int:
        full = spec.width * ratio
        return (int(full * 2 / 3) + 7) // 8 * 8 if spec.activation == "swiglu" else full

    ratios = range(1, 2 * spec.mlp_width // spec.width + 2)
    return next((ratio for ratio in ratios if width(ratio) == spec.mlp_width), None)


def _config(model: ViT, spec: ViTSpec, name: str, kind: str) -> dict[str, Any]:
    """`config.json`."""
    square = spec.image_size[0] == spec.image_size[1]
    plain = spec.patch_size[0] == spec.patch_size[1]
    activations = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    values: dict[str, Any] = {
        "hidden_act": activations.get(spec.activation, "gelu"),
        "hidden_size": spec.width,
        "image_size": spec.image_size[0] if square else list(spec.image_size),
        "layer_norm_eps": spec.norm_eps,
        "num_attention_heads": spec.heads,
        "num_channels": spec.in_channels,
        "num_hidden_layers": spec.depth,
        "patch_size": spec.patch_size[0] if plain else list(spec.patch_size),
    }
    if spec.layer_scale is None:
        values["intermediate_size"] = spec.mlp_width
    else:
        values["layerscale_value"] = spec.layer_scale
        values["mlp_ratio"] = _mlp_ratio(spec)
        values["use_swiglu_ffn"] = spec.activation == "swiglu"
    if spec.registers:
        values["num_register_tokens"] = spec.registers
    if kind.startswith("siglip"):
        values["vision_use_head"] = spec.pool == "map"
    else:
        values |= {"qkv_bias": True, "hidden_dropout_prob": 0.0}
    if kind == "siglip":
        values = {"vision_config": values | {"model_type": "siglip_vision_model"}}
    dtype = str(model.patch_embedding.weight.dtype).removeprefix("torch.")
    values |= {"architectures": [name], "model_type": kind, "torch_dtype": dtype}
    if spec.num_classes:
        labels = model.classes or tuple(f"LABEL_{i}" for i in range(spec.num_classes))
        values["id2label"] = {str(i): label for i, label in enumerate(labels)}
        values["label2id"] = {label: i for i, label in enumerate(labels)}
        several = spec.probability == "sigmoid"
        values["problem_type"] = f"{'multi' if several else 'single'}_label_classification"
    return values
