"""What flows between the layers: batches, model outputs, and the evaluator's signature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images as they leave the loader."""

    images: Tensor
    """uint8 `[B, C, H, W]`, 0 to 255, not yet normalised"""
    labels: Tensor
    """int64 `[B]`, class indices"""
    mask: Tensor
    """bool `[B]`, False for padding and for images that could not be read (evaluation only)"""
    indices: Tensor
    """int64 `[B]`, positions in the source"""
    bad: tuple[tuple[int, str], ...] = ()
    """(position in the source, reason) of the images that could not be decoded"""


Grid = tuple[int, int]
"""Patches along height and width, (rows, columns)."""


class Outputs(NamedTuple):
    """What a model knows of a batch before its head."""

    pooled: Tensor
    """float `[B, D]`"""
    tokens: Tensor
    """float `[B, N, D]`, the patches, row by row: after the last LayerNorm, but before it with
    `ViTSpec.pool_norm`, for then it is the norm of their mean and never acts on a patch"""
    grid: Grid
    """N = their product"""


Forward = Callable[..., Tensor]
"""Normalised float images `[B, C, H, W]` to logits `[B, K]`, or to features where there is no head;
with draws of a self-supervised objective after the images, to its predictions."""


class Evaluator(Protocol):
    """Measures a model; called by the training loop at each evaluation."""

    def __call__(self, forward: Forward) -> dict[str, Any]: ...
