"""The foreign formats, and which of them a file is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from patchword.models.model import Model
from patchword.spec.parse import PatchwordError
from patchword.weights import huggingface, timm, torchvision
from patchword.weights.google import big_vision, bit_npz, google_npz
from patchword.weights.mapping import Reading, Written
from patchword.weights.shapes import Config, Shapes


@dataclass(frozen=True)
class WeightFormat:
    """A foreign format. `hints` are fields of the spec that a user set because the tensors do not
    tell them (heads, activation, norm_eps, image_size); they win over what is inferred."""

    name: str
    title: str
    recognises: Callable[[Shapes, Config], bool]
    find: Callable[[Shapes, Config, dict[str, Any]], Reading]
    write: Callable[[Model], Written] | None = None
    suffixes: tuple[str, ...] = ()
    """of the files that are written, the first by default; empty for a directory"""
    tolerance: float = 1e-4
    """of the logits of what is written, relative to the largest: float32 rounds to 1e-5 at most"""


HF, TV, TENSORS = huggingface, torchvision, (".safetensors", ".pth")
FIXED_EPS = 1e-3
"""Tolerance where a library has the eps of its norms fixed: a model with Hugging Face's 1e-12 comes
out 2e-6 apart if it was trained, 3e-4 if it was not."""
FORMATS = (
    WeightFormat("huggingface", "Hugging Face transformers", HF.recognises, HF.find, HF.write),
    WeightFormat(
        "torchvision", "torchvision", TV.recognises, TV.find, TV.write, TENSORS, FIXED_EPS
    ),
    WeightFormat("bit-npz", "Google BiT", bit_npz.recognises, bit_npz.find),
    WeightFormat("big-vision-npz", "Google big_vision", big_vision.recognises, big_vision.find),
    WeightFormat(
        *("google-npz", "Google vision_transformer", google_npz.recognises, google_npz.find),
        *(google_npz.write, (".npz",)),
    ),
    WeightFormat("timm", "timm", timm.recognises, timm.find, timm.write, TENSORS, FIXED_EPS),
)


def recognise(shapes: Shapes, config: Config, where: str) -> WeightFormat:
    """The format that names and shapes are in. Raises `PatchwordError` if it is none we know."""
    for known in FORMATS:
        if known.recognises(shapes, config):
            return known
    some = ", ".join(sorted(shapes)[:3])
    raise PatchwordError(
        f"{where} is in no format that patchword knows (its tensors: {some}, ...); known: "
        f"patchword, {', '.join(known.title for known in FORMATS)}"
    )
