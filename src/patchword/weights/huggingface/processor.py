"""`preprocessor_config.json` of Hugging Face transformers to `PreprocessSpec` and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from patchword.spec.model import ModelSpec, PreprocessSpec
from patchword.spec.parse import PatchwordError, parse, to_dict

RESAMPLE = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers."""


def read(
    values: Mapping[str, Any], spec: ModelSpec, default: PreprocessSpec
) -> tuple[PreprocessSpec, list[str]]:
    """The preprocessing for a model, and what a user should know; `default` holds for what
    `values` leave open. Raises `PatchwordError` on values that make no sense."""
    notes: list[str] = []
    fields: dict[str, Any] = {}
    resample = values.get("resample", -1)
    if type(resample) is int and resample in RESAMPLE:
        fields["interpolation"] = RESAMPLE[resample]
    elif resample != -1:
        notes.append(
            f"resampling {resample!r:.20} is not known here; {default.interpolation} instead"
        )
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        value = values.get(theirs, getattr(default, ours))
        plain = value if isinstance(value, (list, tuple)) else [value] * spec.in_channels
        fields[ours] = list(plain)
    resize, more = _resize(values, spec)
    kept = to_dict(default) | fields | resize
    preprocess = parse(PreprocessSpec, kept, "preprocessor_config.json")
    return _scaled(values, preprocess, spec), [*notes, *more]


def _scaled(
    values: Mapping[str, Any], preprocess: PreprocessSpec, spec: ModelSpec
) -> PreprocessSpec:
    """Mean and standard deviation for pixels in [0, 1], whatever they were scaled to."""
    if len(preprocess.mean) != spec.in_channels:
        half = (0.5,) * spec.in_channels
        preprocess = replace(preprocess, mean=half, std=half)
    if values.get("do_normalize") is False:
        preprocess = replace(
            preprocess, mean=(0.0,) * spec.in_channels, std=(1.0,) * spec.in_channels
        )
    factor = values.get("rescale_factor", 1 / 255)
    if not isinstance(factor, (int, float)) or not factor > 0:
        raise PatchwordError(f"preprocessor_config.json: rescale_factor is {factor!r:.40}")
    scale = 255.0 if values.get("do_rescale") is False else 255 * factor
    if abs(scale - 1) < 1e-6:
        return preprocess
    return replace(
        preprocess,
        mean=tuple(value / scale for value in preprocess.mean),
        std=tuple(value / scale for value in preprocess.std),
    )


def _resize(values: Mapping[str, Any], spec: ModelSpec) -> tuple[dict[str, Any], list[str]]:
    """The fields `resize` and `crop_fraction`, and notes."""
    size = values.get("size")
    if size is None or values.get("do_resize") is False:
        return {}, []
    kind = str(values.get("image_processor_type", values.get("feature_extractor_type", "")))
    if isinstance(size, int) and kind.startswith(("Bit", "CLIP")):
        size = {"shortest_edge": size}
    crop = None
    if values.get("do_center_crop") and values.get("crop_size") is not None:
        crop = _sides(values["crop_size"], "crop_size")
    notes: list[str] = []
    if isinstance(size, Mapping) and "shortest_edge" in size:
        sides = _sides(size["shortest_edge"], "size")
        stretch = False
    else:
        sides = _sides(size, "size")
        stretch = crop is None or crop == sides
        if not stretch and crop is not None:
            notes.append(
                f"the processor squeezes images to {sides[0]}x{sides[1]} px and cuts out "
                f"{crop[0]}x{crop[1]}; here the aspect ratio is kept"
            )
    output = crop or sides
    if output != spec.image_size:
        notes.append(
            f"the processor makes images of {output[0]}x{output[1]} px, the model is for "
            f"{spec.image_size[0]}x{spec.image_size[1]}; load with image_size={output[0]} to do "
            "as it does"
        )
    if stretch:
        return {"resize": "stretch"}, notes
    return {"resize": "short", "crop_fraction": min(1.0, min(output) / min(sides))}, notes


def _sides(value: Any, name: str) -> tuple[int, int]:
    """(height, width) of one side, two, or an object of both."""
    if isinstance(value, Mapping):
        value = (value.get("height"), value.get("width"))
    sides = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(sides) != 2 or any(type(side) is not int or not 0 < side < 1 << 20 for side in sides):
        raise PatchwordError(f"preprocessor_config.json: {name} is {value!r:.40}, not pixels")
    return (sides[0], sides[1])


def write(spec: ModelSpec, preprocess: PreprocessSpec) -> dict[str, Any]:
    """`preprocessor_config.json`: a ViTImageProcessor for `stretch`, a BitImageProcessor, which
    crops, for `short` (the short side in whole pixels)."""
    height, width = spec.image_size
    values: dict[str, Any] = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
        "resample": next(k for k, name in RESAMPLE.items() if name == preprocess.interpolation),
        "rescale_factor": 1 / 255,
    }
    if preprocess.resize == "stretch":
        return values | {
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": height, "width": width},
        }
    return values | {
        "image_processor_type": "BitImageProcessor",
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "size": {"shortest_edge": round(min(height, width) / preprocess.crop_fraction)},
    }
