"""Where tokens and features lie: the main directions of the patches, a map of a data set,
neighbours."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from patchword.spec.parse import PatchwordError

CLIPPED = 1.0
"""percent of the values that may fall outside the range of a colour, at either end"""


def token_components(
    tokens: torch.Tensor | ArrayLike, grid: tuple[int, int]
) -> NDArray[np.float64]:
    """The patch tokens `[B, N, D]` as colours, `[B, rows, cols, 3]` in [0, 1]: red, green and blue
    are the first three principal components of all tokens given (as in DINOv2, arXiv 2304.07193,
    figure 1), the same for all images of the call.

    Each component runs from its 1st percentile (0) to its 99th (1), and is clipped there; its sign,
    which is arbitrary, is such that the entry of largest magnitude is positive. A component without
    variance is 0.5. Raises `PatchwordError` where tokens and grid do not fit and where a token is
    not finite.
    """
    values = finite_array(tokens)
    rows, cols = grid
    if values.ndim != 3 or values.shape[1] != rows * cols or not len(values):
        raise PatchwordError(
            f"tokens of shape {list(values.shape)} do not fit a grid of {rows} x {cols} patches; "
            f"pass [B, {rows * cols}, D], without the class token and registers"
        )
    projected = _principal(values.reshape(-1, values.shape[2]), 3)
    low, high = np.percentile(projected, [CLIPPED, 100 - CLIPPED], axis=0)
    spread = high - low
    known = spread > 1e-6 * np.abs(values).max(initial=0.0)
    scaled = (projected - low) / np.where(known, spread, 1.0)
    return np.where(known, scaled.clip(0, 1), 0.5).reshape(-1, rows, cols, 3)


def pooled_map(features: torch.Tensor | ArrayLike) -> NDArray[np.float64]:
    """A map `[n, 2]` on which features `[n, D]` that are alike lie together: t-SNE (van der Maaten
    and Hinton, 2008; scikit-learn) of the features at length 1, after PCA to 50 dimensions.

    Distances on the map have no unit, and those between far groups no meaning. The same features
    give the same map: it starts from the first two components. Up to 4 features are mapped by PCA
    alone. Raises `PatchwordError` if the features are no matrix or not finite.
    """
    unit = unit_rows(features)
    small = _principal(unit, 50)
    if len(small) <= 4:
        return small[:, :2]
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(small) - 1) / 3)
    start = small[:, :2] / max(float(small[:, 0].std()), 1e-12) * 1e-4
    tsne = TSNE(perplexity=perplexity, init=cast(Any, start))
    return np.asarray(tsne.fit_transform(small), dtype=np.float64)


def nearest(features: torch.Tensor | ArrayLike, of: ArrayLike, count: int = 5) -> NDArray[np.int64]:
    """The nearest neighbours of some of the features, by cosine: indices `[m, count]` into
    `features` `[n, D]`, the nearest first, for the m indices `of`; never itself. Fewer where there
    are no more than `count` features. Equally near ones come in order.

    Memory: m x n float64. Raises `PatchwordError` if the features are no matrix or not finite.
    """
    unit = unit_rows(features)
    chosen = np.asarray(of, dtype=np.int64)
    similarity = unit[chosen] @ unit.T
    similarity[np.arange(len(chosen)), chosen] = -math.inf
    order = np.argsort(-similarity, axis=1, kind="stable")
    return order[:, : min(count, len(unit) - 1)]


def _principal(values: NDArray[np.float64], most: int) -> NDArray[np.float64]:
    """The rows `[n, D]` along their first principal components, `[n, most]`; zeros where there are
    fewer."""
    centred = values - values.mean(axis=0)
    variance, directions = np.linalg.eigh(centred.T @ centred)
    order = np.argsort(variance)[::-1][:most]
    directions = directions[:, order]
    largest = directions[np.abs(directions).argmax(axis=0), np.arange(directions.shape[1])]
    projected = centred @ (directions * np.sign(largest))
    return np.pad(projected, ((0, 0), (0, most - projected.shape[1])))


def unit_rows(features: torch.Tensor | ArrayLike) -> NDArray[np.float64]:
    """Rows `[n, D]` at length 1, those of zeros as they are. Raises `PatchwordError`."""
    values = finite_array(features)
    if values.ndim != 2:
        raise PatchwordError(f"features of shape {list(values.shape)}; pass [n, D]")
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.where(norms > 0, norms, 1.0)


def finite_array(values: torch.Tensor | ArrayLike) -> NDArray[np.float64]:
    """Numbers as float64 on the CPU. Raises `PatchwordError` if one is not finite."""
    if isinstance(values, torch.Tensor):
        values = cast(Any, values.detach().cpu().double().numpy())
    matrix = np.asarray(values, dtype=np.float64)
    if not np.isfinite(matrix).all():
        raise PatchwordError("a value is NaN or Inf; use an earlier checkpoint")
    return matrix
