"""Figures of what the embeddings have learned (paper, figure 7 left and centre)."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from patchword.inspection.figures.drawing import GREY, INK, label_bar, new_figure, style


def draw_filters(components: ArrayLike, explained: ArrayLike, columns: int = 7) -> Figure:
    """The filters of `embedding_filters`, `[count, P_h, P_w, C]`, as small patches (figure 7 left).

    Each is scaled to its own range, and labelled with the share of variance it explains. Three
    channels show as red, green and blue; any other number as the mean over the channels.
    """
    filters = np.asarray(components, dtype=np.float64)
    shares = np.asarray(explained, dtype=np.float64)
    columns = min(columns, len(filters))
    rows = -(-len(filters) // columns)
    aspect = filters.shape[1] / filters.shape[2]
    figure = new_figure(max(0.8 * columns, 3.2), (0.74 * aspect + 0.16) * rows + 0.4)
    title = "Principal components of the patch embedding"
    figure.suptitle(title, fontsize=10, color=INK, x=0.01, ha="left")
    for place, (patch, share) in enumerate(zip(filters, shares, strict=True)):
        axes = figure.add_subplot(rows, columns, place + 1)
        image = patch if patch.shape[2] == 3 else patch.mean(axis=2)
        low, high = image.min(), image.max()
        image = (image - low) / (high - low if high > low else 1.0)
        axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(f"{100 * share:.1f} %", fontsize=6, color=GREY, pad=2)
    return figure


def shown_patches(count: int, most: int = 16) -> NDArray[np.int64]:
    """Which of so many rows or columns are shown where there are too many: `most`, evenly spaced,
    the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def draw_position_similarity(
    similarity: ArrayLike,
    *,
    title: str = "Position embedding similarity",
    unit: str = "cosine similarity",
    note: str = "",
) -> Figure:
    """The grid of grids of `position_similarity`, or of the mean over the heads of `induced_bias`,
    `[rows, cols, rows, cols]` (figure 7 centre), for the patches of `shown_patches` as queries.

    The colours run to the largest similarity between different patches, as far as 1: a patch's
    similarity with itself is always 1. `note` is written below.
    """
    values = np.asarray(similarity, dtype=np.float64)
    rows, cols = values.shape[:2]
    down, across = shown_patches(rows), shown_patches(cols)
    gap = max(1, round(min(rows, cols) / 8))
    mosaic = np.full((len(down) * (rows + gap) - gap, len(across) * (cols + gap) - gap), np.nan)
    for i, row in enumerate(down):
        for j, column in enumerate(across):
            top, left = i * (rows + gap), j * (cols + gap)
            mosaic[top : top + rows, left : left + cols] = values[row, column]
    flat = values.reshape(rows * cols, rows * cols)
    others = np.abs(flat[~np.eye(rows * cols, dtype=bool)])
    largest = float(others.max(initial=0.0)) or 1.0
    step = 10 ** np.floor(np.log10(largest))  # the limit has one digit
    limit = float(np.ceil(largest / step - 1e-9) * step)
    width = 5.4
    figure = new_figure(width, min(width * len(mosaic) / mosaic.shape[1], 12.0) * 0.82 + 0.5)
    axes = figure.add_subplot()
    axes.set_facecolor("#D1D5DB")
    image = axes.imshow(mosaic, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set_xticks(np.arange(len(across)) * (cols + gap) + (cols - 1) / 2, across)
    axes.set_yticks(np.arange(len(down)) * (rows + gap) + (rows - 1) / 2, down)
    style(axes, title, "column of the patch" + f"\n{note}" * bool(note), "row of the patch")
    axes.spines[:].set_visible(False)
    extend = "max" if values.max() > limit else "neither"
    label_bar(figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, extend=extend), unit)
    return figure
