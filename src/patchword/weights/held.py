"""What a format can hold of a spec: one table for each format, one check before it is written."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchword.models.position import PositionTable
from patchword.models.vit import ViT
from patchword.spec.model import ModelSpec
from patchword.spec.parse import PatchwordError

logger = logging.getLogger("patchword")
ANY = object()
"""A field that a format holds whatever its value."""


@dataclass(frozen=True)
class Near:
    """A number that a library has fixed in its layers of a kind: a model with another is written,
    and the log says that its outputs will differ a little."""

    value: float
    layer: str


Fields = Mapping[str, Any]
"""By the name of a field: `ANY`, a `Near`, a tuple of the values held, or the `Fields` of a nested
spec. A field that is not in the table is held at its default only."""
Held = Mapping[type[ModelSpec], Fields]
"""The families that a format has."""

COMMON: Fields = dict.fromkeys(
    ("image_size", "in_channels", "num_classes", "probability", "depth", "width", "patch_size"), ANY
)
VIT: Fields = {**COMMON, "mlp_width": ANY, "heads": ANY}
MIXER: Fields = {**COMMON, "tokens_mlp_width": ANY, "channels_mlp_width": ANY}
"""What every format has of a family; a `probability` that a file does not tell is said."""
TRAINING = ("dropout", "drop_path", "patch_dropout")
"""Fields that no format holds and that change nothing of what a written model computes."""


def check_held(spec: ModelSpec, held: Held, title: str) -> None:
    """Raises `PatchwordError` that names a field of a model's spec which a format cannot hold."""
    fields = next((fields for family, fields in held.items() if isinstance(spec, family)), None)
    if fields is None:
        raise no_place(title, f"place for a {type(spec).__name__.removesuffix('Spec')}")
    idle = set(TRAINING)
    if not spec.num_classes:
        idle |= {"head", "head_width"}
    if getattr(spec, "position", None) == "none":
        idle |= {"position_at"}
    _check(spec, {**fields, **dict.fromkeys(idle, ANY)}, title)


def _check(spec: Any, held: Fields, title: str, prefix: str = "") -> None:
    for field in dataclasses.fields(spec):
        name, value = prefix + field.name, getattr(spec, field.name)
        allowed = held.get(field.name, (field.default,))
        if isinstance(allowed, Near):
            say_eps(title, allowed.layer, value, allowed.value)
        elif isinstance(allowed, Mapping) and value is not None:
            _check(value, allowed, title, f"{name}.")
        elif isinstance(allowed, tuple) and value not in allowed:
            only = f" {value} (only {' or '.join(map(str, allowed))})"
            raise no_place(title, name + ("" if dataclasses.is_dataclass(value) else only))


def say_eps(title: str, layer: str, ours: float, theirs: float) -> None:
    """Log that a library's layer has another eps than that of a model that is written for it."""
    if ours != theirs:
        logger.warning(
            "%s's %s has eps %g, the model %g: its outputs will differ a little",
            *(title, layer, theirs, ours),
        )


def no_place(title: str, what: str) -> PatchwordError:
    """The error of a format that cannot hold something of a model."""
    return PatchwordError(f"{title} has no {what}; save the model in patchword's own format")


@torch.no_grad()
def position_table(model: ViT) -> Tensor:
    """What a model adds at its stem to leading tokens and patches, `[1, leading + N, D]`, as one
    table, which is all that other libraries have; zeros without positions."""
    spec = model.spec
    tokens = spec.leading + math.prod(spec.grid)
    table = model.patch_embedding.weight.new_zeros(1, tokens, spec.width)
    for position in model.positions:
        assert isinstance(position, PositionTable)
        values = position()
        table[:, tokens - values.shape[1] :] = values
    return table
