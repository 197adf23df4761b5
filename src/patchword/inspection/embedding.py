"""What the embeddings have learned: filters of the patches, similarity of the positions.

Paper section 4.5 and D.7: figure 7 left and centre, figure 10.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from patchword.inspection.recorder import attention_inputs, batched, require_vit
from patchword.inspection.tokens import finite_array, unit_rows
from patchword.models.model import Model
from patchword.models.vit import ViT
from patchword.spec.batch import Grid
from patchword.spec.parse import PatchwordError


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
    filters = finite_array(weight)
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
    vectors = finite_array(table)
    rows, cols = grid
    if vectors.ndim != 2 or len(vectors) != rows * cols:
        raise PatchwordError(
            f"position table of shape {list(vectors.shape)} does not fit a grid of {rows} x {cols} "
            f"patches; pass [{rows * cols}, D], without the class token and registers"
        )
    unit = unit_rows(vectors)
    return np.clip(unit @ unit.T, -1.0, 1.0).reshape(rows, cols, rows, cols)


@dataclass(frozen=True)
class PositionStructure:
    """What a grid of similarities says, in differences and means of them; None where the grid has
    no such pairs of patches."""

    row: float | None
    """how much more alike patches of the same row are than patches as far from each other that
    share neither row nor column; in [-2, 2], about 0 for random tables and for similarity that
    depends on the distance alone"""
    column: float | None
    """likewise of the same column"""
    neighbour: float | None
    """mean similarity of patches side by side or one above the other, in [-1, 1]"""
    far: float | None
    """mean similarity of patches at least half the longest distance on the grid apart, in
    [-1, 1]"""


def position_structure(similarity: ArrayLike) -> PositionStructure:
    """Row and column structure of `position_similarity`, `[rows, cols, rows, cols]` (section 4.5:
    closer patches are more alike, and so are patches of the same row or column).

    Distances are counted in patches. `row` and `column` are means over all pairs of the row or
    column as far apart as some pairs that share neither, at least sqrt(2): each pair less the mean
    similarity of those, linear between the distances at which there are any.
    """
    values = np.asarray(similarity, dtype=np.float64)
    rows, cols = values.shape[:2]
    y, x = (axis.ravel() for axis in np.mgrid[:rows, :cols])
    down, across = np.abs(y[:, None] - y), np.abs(x[:, None] - x)
    square = down**2 + across**2
    flat = values.reshape(rows * cols, rows * cols)
    neither = (down > 0) & (across > 0)
    return PositionStructure(
        row=_excess(flat, (down == 0) & (across > 0), neither, square),
        column=_excess(flat, (down > 0) & (across == 0), neither, square),
        neighbour=_mean(flat[square == 1]),
        far=_mean(flat[(square > 0) & (4 * square >= square.max())]),
    )


def _excess(
    values: NDArray[np.float64],
    some: NDArray[np.bool_],
    others: NDArray[np.bool_],
    square: NDArray[np.int64],
) -> float | None:
    """Mean over the pairs `some` of how much they exceed the mean of the `others` as far apart."""
    levels, place = np.unique(square[others], return_inverse=True)
    if not len(levels):
        return None
    curve = np.bincount(place, values[others]) / np.bincount(place)
    near = some & (square >= levels[0]) & (square <= levels[-1])
    expected = np.interp(np.sqrt(square[near]), np.sqrt(levels), curve)
    return _mean(values[near] - expected)


def _mean(values: NDArray[np.float64]) -> float | None:
    return float(values.mean()) if values.size else None


def position_vectors(model: Model, grid: Grid | None = None) -> NDArray[np.float64] | None:
    """The table of positions that the model adds to its patches at the input, `[N, D]`, row by row,
    without class token and registers: learned 1-D or 2-D, or sin-cos; for a grid, by default that
    of the spec. None if it has none."""
    if not isinstance(model, ViT):
        return None
    table, _ = model.positions_of(None, grid or model.spec.grid)
    return None if table is None else finite_array(table[0, model.spec.prefix :])


def induced_bias(model: Model, layer: int, images: torch.Tensor) -> NDArray[np.float64]:
    """What a position rule does to a layer's attention between patches, `[heads, rows, cols, rows,
    cols]`, on the grid of `images`: entry (h, i, j) is the map of the patch in row i and column j
    as a query.

    Relative positions (D.4): what is added to the logits (after the scale) for the mean query over
    all patches of `images`, normalised `[B, C, H, W]`. Rotary: the mean over the pairs of channels
    of the cosine of the angle between query and key, in [-1, 1]: the factor on the logits of
    queries and keys whose pairs agree; the same for all heads, layers and images. Raises
    `PatchwordError` where no rule acts in the layer (0 first).
    """
    vit = require_vit(model)
    vit.check(images)
    spec, grid = vit.spec, vit.grid_of(images)
    rule = vit.positions_of(layer, grid)[1] if 0 <= layer < spec.depth else None
    if rule is None:
        raise PatchwordError(
            f"no relative or rotary positions act in layer {layer} of position "
            f"{spec.position!r}; tables have a position_similarity instead"
        )
    size = (1, spec.heads, spec.prefix + math.prod(grid), spec.width // spec.heads)
    if spec.position == "rotary":
        ones = torch.ones(size, dtype=torch.float64, device=images.device)
        q, k, _ = rule(ones, ones)
        bias = q @ k.transpose(-2, -1) / size[-1]
    else:
        mean = _mean_query(vit, layer, images)[None, :, None].expand(size)
        with torch.no_grad():
            bias = cast(torch.Tensor, rule(mean, mean)[2])
    return finite_array(bias[0, :, spec.prefix :, spec.prefix :]).reshape(spec.heads, *grid, *grid)


def _mean_query(vit: ViT, layer: int, images: torch.Tensor) -> torch.Tensor:
    """The mean over patches and images of what a layer's patches ask for, `[h, d]`, before the rule
    acts."""
    total = 0
    for part in batched(vit, images):
        attention, x, _ = next(itertools.islice(attention_inputs(vit, part), layer, None))
        with torch.no_grad():
            query = attention.heads_of(x)[0][:, :, vit.spec.prefix :]  # [b, h, N, d]
        total = total + query.mean(2).sum(0)
    return cast(torch.Tensor, total) / len(images)
