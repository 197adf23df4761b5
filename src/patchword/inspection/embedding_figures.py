"""Figures of what the embeddings have learned (paper, figure 7 left and centre)."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from patchword.inspection.drawing import GREY, INK, encode, new_figure, style
from patchword.inspection.embedding import embedding_filters, position_similarity
from patchword.models.mixer import Mixer
from patchword.models.model import Model
from patchword.models.position import Learned1d, Learned2d
from patchword.models.vit import ViT


def embedding_figures(model: Model) -> dict[str, bytes]:
    """Title -> PNG of what the model's embeddings have learned (figure 7 left and centre): its
    filters, if it cuts the image itself into patches, and the similarity of its position
    embeddings, if it learns a table of them."""
    figures: dict[str, bytes] = {}
    if isinstance(model, Mixer) or (isinstance(model, ViT) and model.stem is None):
        embedding, channels = model.patch_embedding, model.spec.in_channels
        filters = embedding_filters(embedding.weight, embedding.patch_size, channels)
        figures["Patch embedding filters"] = encode(draw_filters(*filters))
    if isinstance(model, ViT):
        position, grid = model.position_in(0), model.spec.grid
        if isinstance(position, Learned1d | Learned2d):
            similarity = position_similarity(position()[0, -grid[0] * grid[1] :], grid)
            figures["Position embedding similarity"] = encode(draw_position_similarity(similarity))
    return figures


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
    figure.suptitle("Principal components of the patch embedding", fontsize=10, color=INK)
    for place, (patch, share) in enumerate(zip(filters, shares, strict=True)):
        axes = figure.add_subplot(rows, columns, place + 1)
        image = patch if patch.shape[2] == 3 else patch.mean(axis=2)
        low, high = image.min(), image.max()
        image = (image - low) / (high - low if high > low else 1.0)
        axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(f"{100 * share:.1f} %", fontsize=6, color=GREY, pad=2)
    return figure


def draw_position_similarity(similarity: ArrayLike, most: int = 16) -> Figure:
    """The grid of grids of `position_similarity`, `[rows, cols, rows, cols]` (figure 7 centre).

    At most `most` query patches are shown along each axis, evenly spaced. The colours run to the
    largest similarity between different patches; a patch's similarity with itself is always 1.
    """
    values = np.asarray(similarity, dtype=np.float64)
    rows, cols = values.shape[:2]
    down = np.unique(np.linspace(0, rows - 1, min(rows, most)).round().astype(int))
    across = np.unique(np.linspace(0, cols - 1, min(cols, most)).round().astype(int))
    gap = max(1, round(min(rows, cols) / 8))
    mosaic = np.full((len(down) * (rows + gap) - gap, len(across) * (cols + gap) - gap), np.nan)
    for i, row in enumerate(down):
        for j, column in enumerate(across):
            top, left = i * (rows + gap), j * (cols + gap)
            mosaic[top : top + rows, left : left + cols] = values[row, column]
    flat = values.reshape(rows * cols, rows * cols)
    others = np.abs(flat[~np.eye(rows * cols, dtype=bool)])
    limit = min(1.0, np.ceil(10 * others.max(initial=0.1) + 1e-9) / 10)
    width = 5.4
    figure = new_figure(width, min(width * len(mosaic) / mosaic.shape[1], 12.0) * 0.82 + 0.5)
    axes = figure.add_subplot()
    axes.set_facecolor("#D1D5DB")
    image = axes.imshow(mosaic, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set_xticks(np.arange(len(across)) * (cols + gap) + (cols - 1) / 2, across + 1)
    axes.set_yticks(np.arange(len(down)) * (rows + gap) + (rows - 1) / 2, down + 1)
    style(axes, "Position embedding similarity", "input patch column", "input patch row")
    axes.spines[:].set_visible(False)
    extend = "max" if limit < 1 else "neither"
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, extend=extend)
    bar.set_label("cosine similarity", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=7, colors=INK)
    return figure
