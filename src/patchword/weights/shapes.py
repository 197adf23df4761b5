"""What the names and shapes of foreign tensors tell of a spec."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from operator import floordiv
from typing import Any, TypeVar

from patchword.spec.model import ModelSpec
from patchword.spec.parse import PatchwordError, parse

Shapes = Mapping[str, tuple[int, ...]]
Config = Mapping[str, Any]
"""A `config.json`."""
Hints = Mapping[str, Any]
"""Fields of the spec that a user set because the tensors do not tell them; they win."""
Spec = TypeVar("Spec", bound=ModelSpec)


def count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest number that `pattern`'s group matches among the names; 0 for none.

    `count(shapes, r"blocks\\.(\\d+)\\.")` is the depth. Raises `PatchwordError` if a number is
    larger than there are tensors."""
    largest = 0
    for name in shapes:
        match = re.match(pattern, name)
        if match:
            if len(match[1]) > 6 or int(match[1]) > len(shapes):
                raise PatchwordError(
                    f"the number in the tensor name {name[:100]!r} is larger than there are "
                    "tensors; the file is incomplete or damaged"
                )
            largest = max(largest, int(match[1]) + 1)
    return largest


def shape_of(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor that tells the architecture. Raises `PatchwordError` if it is missing
    or has another number of axes."""
    shape = shapes.get(name)
    if shape is None or len(shape) != axes:
        what = "is missing" if shape is None else f"is {list(shape)}, not of {axes} axes"
        raise PatchwordError(f"the tensor {name} {what}; the file is incomplete or damaged")
    return tuple(shape)


HEADS = {1280: 16, 1408: 16, 1664: 16, 1152: 16}
"""Heads of the widths whose heads are not 64 wide: H, g, G, So400m (table 1)."""


def guess_heads(width: int) -> int:
    """The heads of a published model of this width: the tensors do not tell them."""
    return HEADS.get(width, max(1, width // 64))


def say_heads(width: int, hints: Hints) -> list[str]:
    """The note that the heads were guessed, unless the user set them."""
    heads = guess_heads(width)
    note = f"assumed: {heads} heads, as models {width} wide have; heads=... says otherwise"
    return [] if "heads" in hints else [note]


def classes_of(shapes: Shapes, weight: str) -> int:
    """The classes of the head whose weight, `[classes, ...]`, is called so; 0 if there is none."""
    return shapes[weight][0] if shapes.get(weight) else 0


def image_size_for(
    entries: int, patch: Sequence[int], sizes: Iterable[Sequence[int] | None], where: str
) -> tuple[int, int]:
    """The image size that a table `where` of `entries` patches is for: the first of `sizes` with so
    many, else the square one. Raises `PatchwordError` if no square grid has so many."""
    for size in sizes:
        if size is not None and min(patch) and math.prod(map(floordiv, size, patch)) == entries:
            return (size[0], size[1])
    side = math.isqrt(entries)
    if side * side != entries:
        raise PatchwordError(
            f"{where}: a position table of {entries} patches is for no square image; say which "
            "with image_size=(height, width)"
        )
    return (side * patch[0], side * patch[1])


def spec_of(family: type[Spec], fields: Mapping[str, Any], hints: Hints) -> Spec:
    """The spec of what was inferred, and of what the user set, which wins; the image size is among
    `fields`. Raises `UsageError` on unknown fields and bad values."""
    return parse(family, {**fields, **{k: v for k, v in hints.items() if k != "image_size"}})
