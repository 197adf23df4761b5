"""What there is to see in a given model: which arrays apply to it, and how they are called."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from patchword.inspection.embedding import (
    PositionStructure,
    embedding_filters,
    induced_bias,
    position_similarity,
    position_structure,
    position_vectors,
)
from patchword.inspection.figures.embedding import draw_position_similarity
from patchword.models.mixer import Mixer
from patchword.models.model import Model
from patchword.models.vit import ViT
from patchword.spec.parse import PatchwordError

Array = NDArray[np.float64]


class NotApplicable(PatchwordError):
    """The model has nothing of the kind. The message says why."""


def model_filters(model: Model, count: int = 28) -> tuple[Array, Array]:
    """`embedding_filters` of a model that cuts the image itself into patches: components
    `[count, P_h, P_w, C]` and the share of variance of each `[count]`. Raises `NotApplicable` for
    hybrids and ResNets."""
    if isinstance(model, ViT) and model.stem is not None:
        raise NotApplicable("a hybrid's patches are cut from a feature map, not from the image")
    if not isinstance(model, ViT | Mixer):
        raise NotApplicable(f"a {type(model).__name__} does not cut the image into patches")
    embedding = model.patch_embedding
    return embedding_filters(embedding.weight, embedding.patch_size, model.spec.in_channels, count)


@dataclass(frozen=True, eq=False)
class Positions:
    """How the patches' positions relate to each other."""

    kind: str
    """the spec's `position`"""
    values: Array
    """`[rows, cols, rows, cols]`: `position_similarity` of a table, or the mean over the heads of
    `induced_bias` in the first layer"""
    structure: PositionStructure
    """of `values`"""
    title: str
    unit: str

    def draw(self) -> Figure:
        """The grid of grids, with the structure in words."""
        named = {
            "same row": self.structure.row,
            "same column": self.structure.column,
            "neighbours": self.structure.neighbour,
            "far": self.structure.far,
        }
        signs = ("+.2f", "+.2f", ".2f", ".2f")
        note = "; ".join(
            f"{name} {round(value, 2) + 0.0:{sign}}"  # never -0.00
            for (name, value), sign in zip(named.items(), signs, strict=True)
            if value is not None
        )
        return draw_position_similarity(self.values, title=self.title, unit=self.unit, note=note)


def model_positions(model: Model, images: Tensor) -> Positions:
    """How the model tells positions apart on the grid of `images`, normalised `[B, C, H, W]`, at
    least one; what they show counts for relative positions only. Raises `NotApplicable` where it
    has no position embedding."""
    if not isinstance(model, ViT):
        raise NotApplicable(f"a {type(model).__name__} has no position embedding")
    kind = model.spec.position
    model.check(images)
    grid = model.grid_of(images)
    vectors = position_vectors(model, grid)
    if vectors is not None:
        values = position_similarity(vectors, grid)
        title, unit = "Position embedding similarity", "cosine similarity"
    elif kind in ("rotary", "relative"):
        values = induced_bias(model, 0, images).mean(axis=0)
        title = f"Bias of the {kind} positions in layer 0"
        unit = "added to the logits" if kind == "relative" else "factor on the logits"
    else:
        raise NotApplicable("the model has no position embedding")
    return Positions(kind, values, position_structure(values), title, unit)
