"""The named variants, one row each, and `create_model`."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import torch

from patchword.models.vit import ViT, macs
from patchword.parsing import UsageError, nearest, parse, to_dict
from patchword.specs import PreprocessSpec, ViTSpec


@dataclass(frozen=True)
class Shape:
    """A row of table 1."""

    depth: int
    width: int
    mlp_width: int
    heads: int


SHAPES = {
    "mu": Shape(1, 32, 128, 2),  # for tests, after big_vision
    "Ti": Shape(12, 192, 768, 3),
    "S": Shape(12, 384, 1536, 6),
    "b": Shape(12, 384, 1536, 12),  # B with every hidden dimension halved (figure 4)
    "B": Shape(12, 768, 3072, 12),
    "L": Shape(24, 1024, 4096, 16),
    "H": Shape(32, 1280, 5120, 16),
    "So400m": Shape(27, 1152, 4304, 16),
    "g": Shape(40, 1408, 6144, 16),
    "G": Shape(48, 1664, 8192, 16),
}
PATCHES = (8, 14, 16, 32)
NAME = re.compile(r"ViT-(\w+)/([1-9]\d*)")


def list_models() -> list[str]:
    """Names of the standard variants, in the order of table 1 and by patch size. Other patch sizes
    work too: `ViT-Ti/4`."""
    return [f"ViT-{shape}/{patch}" for shape in SHAPES for patch in PATCHES]


def model_spec(
    name: str,
    *,
    num_classes: int = 1000,
    image_size: int | tuple[int, int] = 224,
    in_channels: int = 3,
    **options: Any,
) -> ViTSpec:
    """The spec of a named variant with some fields changed. Names are case-sensitive (`ViT-b` is
    not `ViT-B`). Raises `UsageError` on unknown names and options, with the nearest valid."""
    match = NAME.fullmatch(name)
    if not match or match[1] not in SHAPES:
        raise UsageError(f"unknown model {name!r}{nearest(name, list_models())}")
    fields = {f.name for f in dataclasses.fields(ViTSpec)}
    for option in options:
        if option not in fields:
            raise UsageError(f"unknown model option {option!r}{nearest(option, sorted(fields))}")
    patch = int(match[2])
    base = ViTSpec(
        **vars(SHAPES[match[1]]),
        patch_size=(patch, patch),
        image_size=(patch, patch),
    )
    if isinstance(options.get("patch_size"), int):
        options["patch_size"] = (options["patch_size"],) * 2
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    values = to_dict(base) | {
        "num_classes": num_classes,
        "image_size": size,
        "in_channels": in_channels,
    }
    return parse(ViTSpec, values | options)


def create_model(
    name: str,
    num_classes: int = 1000,
    image_size: int | tuple[int, int] = 224,
    in_channels: int = 3,
    *,
    preprocess: PreprocessSpec | None = None,
    classes: tuple[str, ...] = (),
    **options: Any,
) -> ViT:
    """A freshly initialised model.

    `image_size` in pixels, one side or (height, width), multiples of the patch size.
    `num_classes=0` leaves out the head. `options` are fields of `ViTSpec`:
    `create_model("ViT-B/16", pool="gap", drop_path=0.1)`, `create_model("ViT-Ti/4", 10, 32,
    depth=9)`. Raises `UsageError` on unknown names, options and values, naming the nearest valid.
    """
    spec = model_spec(
        name, num_classes=num_classes, image_size=image_size, in_channels=in_channels, **options
    )
    return ViT(spec, preprocess=preprocess, classes=classes)


def variant_name(spec: ViTSpec) -> str:
    """The name of a spec's variant, such as `ViT-S/16`; `ViT-6x128/4` (depth, width) if it is none
    of the table's."""
    shape = Shape(spec.depth, spec.width, spec.mlp_width, spec.heads)
    known = next((name for name, row in SHAPES.items() if row == shape), None)
    rows, columns = spec.patch_size
    patch = str(rows) if rows == columns else f"{rows}x{columns}"
    return f"ViT-{known or f'{spec.depth}x{spec.width}'}/{patch}"


def model_cost(spec: ViTSpec) -> tuple[int, int]:
    """(parameters, multiply-accumulates per image), without allocating the model."""
    with torch.device("meta"):
        model = ViT(spec)
    return sum(p.numel() for p in model.parameters()), macs(spec)
