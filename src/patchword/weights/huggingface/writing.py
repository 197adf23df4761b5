"""A model as a class of Hugging Face transformers, if there is one that computes the same."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from patchword.models.model import Model
from patchword.models.position import PositionTable
from patchword.models.vit import ViT
from patchword.spec.model import ViTSpec
from patchword.spec.parse import PatchwordError
from patchword.weights import mapping
from patchword.weights.huggingface import processor
from patchword.weights.huggingface.names import ACTIVATIONS, LAYOUTS, rules_for
from patchword.weights.mapping import Written

CLASSES = {
    ("token", "none", False, False, True): ("ViTForImageClassification", "vit", "vit."),
    ("token", "none", False, False, False): ("ViTModel", "vit", ""),
    ("token", "token", False, False, True): ("DeiTForImageClassification", "deit", "deit."),
    ("token", "head", False, False, True): (
        "DeiTForImageClassificationWithTeacher",
        "deit",
        "deit.",
    ),
    ("token", "token", False, False, False): ("DeiTModel", "deit", ""),
    ("token+gap", "none", True, False, True): ("Dinov2ForImageClassification", "dinov2", "dinov2."),
    ("token", "none", True, False, False): ("Dinov2Model", "dinov2", ""),
    ("token+gap", "none", True, True, True): (
        "Dinov2WithRegistersForImageClassification",
        "dinov2_with_registers",
        "dinov2_with_registers.",
    ),
    ("token", "none", True, True, False): (
        "Dinov2WithRegistersModel",
        "dinov2_with_registers",
        "",
    ),
    ("map", "none", False, False, False): (
        "SiglipVisionModel",
        "siglip_vision_model",
        "vision_model.",
    ),
    ("gap", "none", False, False, False): (
        "SiglipVisionModel",
        "siglip_vision_model",
        "vision_model.",
    ),
    ("gap", "none", False, False, True): (
        "SiglipForImageClassification",
        "siglip",
        "vision_model.",
    ),
}
"""The class, its `model_type` and how names of its body begin, for (pooling, distillation token,
LayerScale, registers, classes)."""


def write(model: Model) -> Written:
    """The tensors, `config.json` and `preprocessor_config.json` of the class that computes what the
    model does; positions that the model adds at its stem, of whatever kind, become a table.

    Raises `PatchwordError` if there is no such class.
    """
    spec = model.spec
    if not isinstance(spec, ViTSpec) or not isinstance(model, ViT):
        raise _refusal("models other than Vision Transformers")
    for condition, reason in _obstacles(spec):
        if condition:
            raise _refusal(reason)
    scaled, classified = spec.layer_scale is not None, spec.num_classes > 0
    distillation = "token" if spec.distillation == "head" and not classified else spec.distillation
    key = (spec.pool, distillation, scaled, spec.registers > 0, classified)
    if key not in CLASSES:
        raise _refusal(
            f"pool={spec.pool}, distillation={spec.distillation}, layer_scale={spec.layer_scale}, "
            f"registers={spec.registers} and num_classes={spec.num_classes} together"
        )
    name, kind, prefix = CLASSES[key]
    if kind not in ("vit", "deit") and spec.image_size[0] != spec.image_size[1]:
        raise _refusal(f"images that are not square in {name}")
    if _layout(spec) == "siglip" and spec.patch_size[0] != spec.patch_size[1]:
        raise _refusal(f"patches that are not square in {name}")
    tensors = {n: v for n, v in model.state_dict().items() if not n.startswith("positions.")}
    tensors["positions.0.table"] = _position_table(model)
    rules = rules_for(spec, LAYOUTS[_layout(spec)], prefix, mask_token=scaled)
    return Written(
        tensors=mapping.write(tensors, rules),
        config=_config(model, spec, name, kind),
        preprocessor=processor.write(spec, model.preprocess),
    )


def _layout(spec: ViTSpec) -> str:
    if spec.pool in ("map", "gap"):
        return "siglip"
    if spec.layer_scale is None:
        return "vit"
    return "dinov2 swiglu" if spec.activation == "swiglu" else "dinov2"


def _refusal(reason: str) -> PatchwordError:
    return PatchwordError(
        f"transformers has no class for {reason}; save in patchword's own format, or try timm's"
    )


def _obstacles(spec: ViTSpec) -> list[tuple[bool, str]]:
    """Features that no class has, and whether the model has them."""
    swiglu, scaled = spec.activation == "swiglu", spec.layer_scale is not None
    return [
        (spec.stem is not None, "a ResNet stem"),
        (spec.qk_norm, "qk_norm"),
        (spec.pool_norm, "pool_norm"),
        (spec.head == "mlp" and spec.num_classes > 0, "a hidden layer in the head"),
        (
            spec.position in ("relative", "rotary")
            or (spec.position != "none" and spec.position_at != "stem"),
            f"position {spec.position} at {spec.position_at}",
        ),
        (swiglu and not scaled, "SwiGLU without LayerScale"),
        (
            scaled and _mlp_ratio(spec) is None,
            f"LayerScale with an MLP {spec.mlp_width} wide, {spec.mlp_width / spec.width:.3g} "
            "times the model",
        ),
    ]


def _mlp_ratio(spec: ViTSpec) -> int | None:
    """DINOv2's `mlp_ratio`, whole; with SwiGLU, two thirds of it, rounded up to 8, are used."""

    def width(ratio: int) -> int:
        full = spec.width * ratio
        return (int(full * 2 / 3) + 7) // 8 * 8 if spec.activation == "swiglu" else full

    ratios = range(1, 2 * spec.mlp_width // spec.width + 2)
    return next((ratio for ratio in ratios if width(ratio) == spec.mlp_width), None)


@torch.no_grad()
def _position_table(model: ViT) -> Tensor:
    """What is added at the stem to leading tokens and patches, `[1, leading + N, D]`."""
    spec = model.spec
    tokens = spec.leading + math.prod(spec.grid)
    table = model.patch_embedding.weight.new_zeros(1, tokens, spec.width)
    if len(model.positions):
        position = model.positions[0]
        assert isinstance(position, PositionTable)
        values = position()
        table[:, tokens - values.shape[1] :] = values
    return table


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
