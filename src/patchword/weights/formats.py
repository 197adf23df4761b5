"""The foreign formats, and which of them a file is."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from patchword.models.model import Model
from patchword.parsing import PatchwordError
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


ROWS = (
    ("huggingface", "Hugging Face transformers", "huggingface", ()),
    ("torchvision", "torchvision", "torchvision", (".safetensors", ".pth")),
    ("bit-npz", "Google BiT", "bit_npz", ()),
    ("big-vision-npz", "Google big_vision", "big_vision", ()),
    ("google-npz", "Google vision_transformer", "google_npz", (".npz",)),
    ("timm", "timm", "timm", (".safetensors", ".pth")),
)


def _formats() -> tuple[Format, ...]:
    found = []
    for name, title, file, suffixes in ROWS:
        try:
            module = importlib.import_module(f"patchword.weights.{file}")
        except ImportError:
            continue
        found.append(
            Format(
                name=name,
                title=title,
                recognises=module.recognises,
                find=module.find,
                write=getattr(module, "write", None),
                suffixes=suffixes,
            )
        )
    return tuple(found)


FORMATS = _formats()


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
