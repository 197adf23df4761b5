"""What the embeddings have learned: filters of the patches, similarity of the positions.

Paper section 4.5 and D.7: figure 7 left and centre, figure 10.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from patchword.parsing import PatchwordError


def embedding_filters(
    weight: torch.Tensor | ArrayLike,
    patch_size: tuple[int, int],
    channels: int,
    count: int = 28,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Top principal components of the patch-embedding filters (figure 7 left).

    `weight` is `[D, P_h * P_w * C]`: D filters over a patch flattened as (row, column, channel).
    Returns the unit-norm components `[count, P_h, P_w, C]`, largest variance first, and the share
    of the filters' variance that each explains `[count]`. The sign, which is arbitrary, is chosen
    so that the entry of largest magnitude is positive. There are never more components than the
    rank of the centred filters. Raises `PatchwordError` where the shape does not fit, a weight is
    not finite, or all filters are the same.
    """
    filters = _matrix(weight)
    expected = patch_size[0] * patch_size[1] * channels
    if filters.ndim != 2 or filters.shape[1] != expected:
        raise PatchwordError(
            f"patch embedding of shape {list(filters.shape)} does not fit patches of "
            f"{patch_size[0]} x {patch_size[1]} x {channels}; pass the weight as [D, {expected}]"
        )
    _, scale, components = np.linalg.svd(filters - filters.mean(axis=0), full_matrices=False)
    tolerance = np.abs(filters).max() * max(filters.shape) * np.finfo(np.float32).eps
    rank = int((scale > tolerance).sum())
    if rank == 0:
        raise PatchwordError("all patch-embedding filters are the same; train the model first")
    components = components[: min(count, rank)]
    largest = np.abs(components).argmax(axis=1)
    components *= np.sign(components[np.arange(len(components)), largest])[:, None]
    explained = scale**2 / (scale**2).sum()
    return components.reshape(-1, *patch_size, channels), explained[: len(components)]


def position_similarity(
    table: torch.Tensor | ArrayLike, grid: tuple[int, int]
) -> NDArray[np.float64]:
    """Cosine similarity of the position embeddings of all patches (figures 7 centre and 10).

    `table` is `[N, D]`, the patches row by row, without the class token and registers; N is
    rows x columns of `grid`. Returns `[rows, cols, rows, cols]` in [-1, 1]: entry (i, j) is the
    map of similarities with the patch in row i and column j. An all-zero embedding has similarity
    0 with everything. Raises `PatchwordError` where table and grid do not fit.
    """
    vectors = _matrix(table)
    rows, cols = grid
    if vectors.ndim != 2 or len(vectors) != rows * cols:
        raise PatchwordError(
            f"position table of shape {list(vectors.shape)} does not fit a grid of {rows} x {cols} "
            f"patches; pass [{rows * cols}, D], without the class token and registers"
        )
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(norms > 0, norms, 1.0)
    return np.clip(unit @ unit.T, -1.0, 1.0).reshape(rows, cols, rows, cols)


def _matrix(values: torch.Tensor | ArrayLike) -> NDArray[np.float64]:
    if isinstance(values, torch.Tensor):
        values = cast(Any, values.detach().cpu().double().numpy())
    matrix = np.asarray(values, dtype=np.float64)
    if not np.isfinite(matrix).all():
        raise PatchwordError("the embedding holds NaN or Inf; use an earlier checkpoint")
    return matrix
