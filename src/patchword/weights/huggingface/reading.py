"""From the names, shapes and configuration of Hugging Face files to what they hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from patchword.spec.model import ModelSpec, PreprocessSpec, ViTSpec
from patchword.spec.parse import PatchwordError, nearest
from patchword.weights.huggingface import processor
from patchword.weights.huggingface.names import ACTIVATIONS, PARTS, PartNames, rules_for
from patchword.weights.mapping import Reading
from patchword.weights.shapes import (
    Config,
    Hints,
    Shapes,
    count,
    guess_heads,
    image_size_for,
    shape_of,
    spec_of,
)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What holds for a `model_type` where its files are silent."""

    norm_eps: float = 1e-12
    activation: str = "gelu"
    preprocess: PreprocessSpec


_IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_DINO = Kind(norm_eps=1e-6, preprocess=PreprocessSpec(**_IMAGENET))
_STRETCHED = PreprocessSpec(resize="stretch")
_SIGLIP = Kind(norm_eps=1e-6, activation="gelu_pytorch_tanh", preprocess=_STRETCHED)
KINDS = {
    "vit": Kind(preprocess=PreprocessSpec(interpolation="bilinear", resize="stretch")),
    "deit": Kind(preprocess=PreprocessSpec(**_IMAGENET)),
    "vit_mae": Kind(preprocess=PreprocessSpec(**_IMAGENET, resize="stretch")),
    "dinov2": _DINO,
    "dinov2_with_registers": _DINO,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
}

LEFT_OUT = {
    r"(.*\.)?pooler\..*": "the pooler (a dense layer and tanh after the class token)",
    r"decoder\..*": "the decoder",
    r"text_model\..*": "the text model",
    r"(.*\.)?embeddings\.(mask_token|position_ids)|logit_(scale|bias)": "",
}
"""What files hold that our models do not, and how to say so, if at all."""
_PATCH = re.compile(r"(.*\.)??embeddings\.patch_embeddings?(\.projection)?\.weight")


def recognises(shapes: Shapes, config: Config) -> bool:
    """Whether the names are those of a Vision Transformer in transformers."""
    return any(_PATCH.fullmatch(name) for name in shapes)


def find(shapes: Shapes, config: Config, hints: Hints) -> Reading:
    """The model of a file. `config` is `config.json`, with `preprocessor_config.json` under
    `preprocessor`; both may be missing.

    Raises `PatchwordError` if the model is of a kind or has an activation that is not known here,
    or if the tensors contradict the configuration.
    """
    match = next(m for m in map(_PATCH.fullmatch, sorted(shapes)) if m)
    prefix = match[1] or ""
    parts = _parts(shapes, prefix)
    kind = _kind(shapes, config, prefix, parts)
    body = config.get("vision_config", config)
    if not isinstance(body, Mapping):
        raise PatchwordError("config.json: vision_config is no object")
    spec = _spec(shapes, config, body, hints, prefix, parts, kind)
    ignored, notes = _left_out(shapes, prefix, spec, parts)
    if not config.keys() - {"preprocessor"}:
        notes.append(
            f"no config.json: {spec.heads} heads, LayerNorm eps {spec.norm_eps:g} and "
            f"{spec.activation} assumed"
        )
    processed = config.get("preprocessor", {})
    if not isinstance(processed, Mapping):
        raise PatchwordError("preprocessor_config.json is no object")
    preprocess, more = processor.read(processed, spec, KINDS[kind].preprocess)
    if not processed:
        notes.append("no preprocessor_config.json: that of the kind's published models assumed")
    query = re.compile(rf".*\.{re.escape(parts.attention[0])}\.bias")
    return Reading(
        spec=spec,
        rules=rules_for(spec, parts, prefix, qkv_bias=any(map(query.fullmatch, shapes))),
        preprocess=preprocess,
        classes=_classes(config, spec),
        ignored=ignored,
        notes=(*notes, *more),
    )


def _parts(shapes: Shapes, prefix: str) -> PartNames:
    """The family that explains most of the names."""

    def explained(parts: PartNames) -> int:
        layers = [*parts.norms, *parts.attention, *parts.hidden, parts.output]
        names = [re.escape(name) + r"\.(?:weight|bias)" for name in layers]
        names += map(re.escape, parts.scales)
        pattern = re.compile(_blocks(prefix, parts) + rf"(?:{'|'.join(names)})")
        return sum(pattern.fullmatch(name) is not None for name in shapes)

    best = max(PARTS.values(), key=explained)
    if not explained(best):
        raise PatchwordError(
            "the names are those of transformers, but of no architecture known here: "
            + ", ".join(KINDS)
        )
    return best


def _blocks(prefix: str, parts: PartNames) -> str:
    """A regular expression of how names of blocks begin, with one group, the number."""
    return re.escape(prefix + parts.block).replace(r"\{i\}", r"(\d+)")


def _kind(shapes: Shapes, config: Config, prefix: str, parts: PartNames) -> str:
    """The `model_type`, from the configuration or else from names."""
    if "model_type" in config:
        kind = str(config["model_type"])
        if kind not in KINDS:
            raise PatchwordError(
                f"config.json: patchword does not have model_type {kind!r:.40}"
                + nearest(kind, KINDS)
            )
        return kind
    if parts is PARTS["siglip"]:
        return "siglip_vision_model"
    if parts.scales:
        return "dinov2"
    if f"{prefix}embeddings.distillation_token" in shapes:
        return "deit"
    return "vit_mae" if "decoder.mask_token" in shapes else "vit"


def _spec(
    shapes: Shapes,
    config: Config,
    body: Mapping[str, Any],
    hints: Hints,
    prefix: str,
    parts: PartNames,
    kind: str,
) -> ViTSpec:
    width, channels, *patch = shape_of(shapes, f"{prefix}{parts.patch}.weight", 4)
    if min(patch) < 1:
        raise PatchwordError(f"patches are {patch} pixels; the file is damaged")
    output = f"{prefix}{parts.block}{parts.output}.weight".replace("{i}", "0")
    told = {  # by the tensors, which the configuration may not contradict
        "hidden_size": width,
        "num_hidden_layers": count(shapes, _blocks(prefix, parts)),
        "intermediate_size": shape_of(shapes, output, 2)[1],
        "num_channels": channels,
    }
    for name, value in told.items():
        if body.get(name, value) != value:
            raise PatchwordError(
                f"config.json: {name} is {body[name]!r:.40}, the tensors say {value}"
            )
    tokens = _tokens(shapes, prefix, parts)
    known = bool(config.keys() - {"preprocessor"})
    leading = (tokens["pool"] in ("token", "token+gap")) + (tokens["distillation"] != "none")
    siglip = parts is PARTS["siglip"]
    entries = shape_of(shapes, prefix + parts.position, 2 if siglip else 3)[-2] - leading
    sizes = [hints.get("image_size"), body.get("image_size", 224 if known else None)]
    activation = str(body.get("hidden_act", KINDS[kind].activation))
    if parts.activation is None and activation not in ACTIVATIONS:
        raise PatchwordError(
            f"config.json: hidden_act {activation!r:.40} is not known here"
            + nearest(activation, ACTIVATIONS)
        )
    several = config.get("problem_type") == "multi_label_classification"
    values: dict[str, Any] = {
        "image_size": _image_size(entries, patch, sizes),
        "in_channels": channels,
        "depth": told["num_hidden_layers"],
        "width": width,
        "mlp_width": told["intermediate_size"],
        "heads": body.get("num_attention_heads", 12 if known else guess_heads(width)),
        "patch_size": patch,
        "activation": parts.activation or ACTIVATIONS[activation],
        "layer_scale": body.get("layerscale_value", 1.0) if parts.scales else None,
        "norm_eps": body.get("layer_norm_eps", KINDS[kind].norm_eps),
        "probability": "sigmoid" if several else "softmax",
    }
    return spec_of(ViTSpec, values | tokens, hints)


def _tokens(shapes: Shapes, prefix: str, parts: PartNames) -> dict[str, Any]:
    """The fields of the spec on tokens, pooling and classes."""
    teacher = "distillation_classifier.weight" in shapes
    head = "cls_classifier.weight" if teacher else "classifier.weight"
    classes = shape_of(shapes, head, 2)[0] if head in shapes else 0
    registers = f"{prefix}embeddings.register_tokens"
    if parts is PARTS["siglip"]:
        pool = "map" if f"{prefix}head.probe" in shapes and not classes else "gap"
        return {"pool": pool, "num_classes": classes, "distillation": "none"}
    distilled = f"{prefix}embeddings.distillation_token" in shapes
    return {
        "pool": "token+gap" if parts.scales and classes else "token",
        "num_classes": classes,
        "registers": shape_of(shapes, registers, 3)[1] if registers in shapes else 0,
        "distillation": "head" if teacher else "token" if distilled else "none",
    }


def _image_size(entries: int, patch: list[int], sizes: list[Any]) -> list[int]:
    """The first of `sizes` that a position table of so many patches is for; without any, a
    square."""
    known = [[size] * 2 if isinstance(size, int) else size for size in sizes if size is not None]
    for size in known:
        if not isinstance(size, (list, tuple)) or [type(side) for side in size] != [int, int]:
            raise PatchwordError(f"image_size is {size!r:.40}, not (height, width)")
        if (size[0] // patch[0]) * (size[1] // patch[1]) == entries:
            return list(size)
    if known:
        raise PatchwordError(
            f"the position table is of {entries} patches, those of images of {known[-1][0]}x"
            f"{known[-1][1]} px are another number; correct image_size in config.json"
        )
    return list(image_size_for(entries, patch, (), "no config.json"))


def _left_out(
    shapes: Shapes, prefix: str, spec: ViTSpec, parts: PartNames
) -> tuple[tuple[str, ...], list[str]]:
    """Patterns of the tensors that our model does not need, and what to say of them."""
    table = dict(LEFT_OUT)
    if parts is PARTS["siglip"] and spec.pool == "gap":
        table[re.escape(prefix) + r"head\..*"] = "the attention pooling, which this class skips"
    present = {p: what for p, what in table.items() if any(re.fullmatch(p, n) for n in shapes)}
    return tuple(present), [f"left out: {what}" for what in present.values() if what]


def _classes(config: Config, spec: ModelSpec) -> tuple[str, ...]:
    """The names of the classes; none where they are placeholders (LABEL_0) or incomplete."""
    labels = config.get("id2label")
    if not isinstance(labels, Mapping):
        return ()
    names = {str(key): str(value) for key, value in labels.items()}
    keys = [str(number) for number in range(spec.num_classes)]
    placeholders = all(re.fullmatch(r"LABEL_\d+", name) for name in names.values())
    return () if sorted(names) != sorted(keys) or placeholders else tuple(names[k] for k in keys)
