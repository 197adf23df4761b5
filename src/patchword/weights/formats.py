"""The foreign formats, and which of them a file is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from patchword.models.model import Model
from patchword.spec.parse import PatchwordError
from patchword.weights import huggingface, timm, torchvision
from patchword.weights.google import big_vision, bit_npz, google_npz
from patchword.weights.mapping import Config, Found, Shapes, Written


@dataclass(frozen=True, kw_only=True)
class Format:
    """A foreign format. `hints` are fields of the spec that a user set because the tensors do not
    tell them (heads, activation, norm_eps, image_size); they win over what is inferred."""

    name: str
    title: str
    recognises: Callable[[Shapes, Config], bool]
    find: Callable[[Shapes, Config, dict[str, Any]], Found]
    write: Callable[[Model], Written] | None = None
    suffixes: tuple[str, ...] = ()
    """of the files that are written, the first by default; empty for a directory"""


FORMATS = (
    Format(
        name="huggingface",
        title="Hugging Face transformers",
        recognises=huggingface.recognises,
        find=huggingface.find,
        write=huggingface.write,
    ),
    Format(
        name="torchvision",
        title="torchvision",
        recognises=torchvision.recognises,
        find=torchvision.find,
        write=torchvision.write,
        suffixes=(".safetensors", ".pth"),
    ),
    Format(
        name="bit-npz",
        title="Google BiT",
        recognises=bit_npz.recognises,
        find=bit_npz.find,
    ),
    Format(
        name="big-vision-npz",
        title="Google big_vision",
        recognises=big_vision.recognises,
        find=big_vision.find,
    ),
    Format(
        name="google-npz",
        title="Google vision_transformer",
        recognises=google_npz.recognises,
        find=google_npz.find,
        write=google_npz.write,
        suffixes=(".npz",),
    ),
    Format(
        name="timm",
        title="timm",
        recognises=timm.recognises,
        find=timm.find,
        write=timm.write,
        suffixes=(".safetensors", ".pth"),
    ),
)


def recognise(shapes: Shapes, config: Config, where: str) -> Format:
    """The format that names and shapes are in. Raises `PatchwordError` if it is none we know."""
    for known in FORMATS:
        if known.recognises(shapes, config):
            return known
    some = ", ".join(sorted(shapes)[:3])
    raise PatchwordError(
        f"{where} is in no format that patchword knows (its tensors: {some}, ...); known: "
        f"patchword, {', '.join(f.title for f in FORMATS)}"
    )
