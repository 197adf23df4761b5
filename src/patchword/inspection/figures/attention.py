"""Figures of attention: mean distance, rollout, the map of each head (figures 6, 7, 11 and 14).

Images are uint8 `[H, W, C]` of 1, 3 or 4 channels, as the model is given them. Layers, heads, rows
and columns count from 0.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from patchword.inspection.figures.drawing import (
    BLUE,
    GREY,
    INK,
    LEGEND,
    VERMILLION,
    label_bar,
    new_figure,
    picture,
    ruled,
    show_image,
    style,
)

DARKEST = 0.12
"""what an overlay leaves of the image's brightness where the mask is lowest"""


def draw_attention_distance(
    distance: ArrayLike, *, uniform: float | None = None, images: int | None = None
) -> Figure:
    """`attention_distance`, `[layers, heads]` in pixels: a dot for each head, a line through the
    means of the layers. `uniform`: the distance of a head that attends to all patches alike, in
    pixels; `images`: how many the means are over. NaN leaves a gap."""
    values = np.asarray(distance, dtype=np.float64)
    layers, heads = values.shape
    figure = new_figure(4.9, 3.5)
    axes = figure.add_subplot()
    depth = np.repeat(np.arange(layers), heads)
    axes.scatter(
        *(depth, values.ravel()),
        s=22,
        color=BLUE,
        alpha=0.75,
        edgecolor="white",
        linewidth=0.5,
        zorder=3,
        clip_on=False,
        label="head",
    )
    count = np.isfinite(values).sum(axis=1)
    means = np.where(count > 0, np.nansum(values, axis=1) / np.maximum(count, 1), np.nan)
    axes.plot(np.arange(layers), means, color=VERMILLION, linewidth=1.4, label="mean of the layer")
    if uniform is not None:
        axes.axhline(uniform, color=GREY, linewidth=1, linestyle="--", label="uniform attention")
    over = "" if images is None else f" over {images:,} image{'s' * (images != 1)}"
    style(axes, f"Mean attention distance{over}", "layer", "distance (pixels)")
    axes.set_ylim(bottom=0)
    ruled(axes)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    figure.legend(**LEGEND, loc="outside lower center", ncol=3)
    return figure


def draw_rollout(image: ArrayLike, mask: ArrayLike) -> Figure:
    """An image, its `rollout` mask `[rows, cols]`, and the image darkened where the mask is low.

    The mask is in multiples of its mean: 1 is what every patch would have, were they all alike. The
    overlay, smoothed, is dark at the mask's lowest value and bright at its highest.
    """
    values = np.asarray(mask, dtype=np.float64)
    pixels = show_image(image)
    figure = new_figure(7.6, 2.25 * np.clip(len(pixels) / pixels.shape[1], 0.4, 2.0) + 0.45)
    original, middle, overlay = figure.subplots(1, 3)
    original.imshow(pixels)
    relative = values / (values.mean() or 1.0)
    drawn = middle.imshow(
        relative,
        cmap="viridis",
        vmin=0,
        vmax=max(float(relative.max()), 1.0),
        interpolation="nearest",
        aspect=len(pixels) / pixels.shape[1] * values.shape[1] / values.shape[0],
    )
    label_bar(figure.colorbar(drawn, ax=middle, fraction=0.046, pad=0.03), "times the mean", 7, 6.5)
    low, high = values.min(), values.max()
    bright = (values - low) / (high - low) if high > low else np.ones_like(values)
    bright = DARKEST + (1 - DARKEST) * _resized(bright, pixels.shape[:2])
    overlay.imshow((pixels * bright[..., None]).astype(np.uint8))
    picture(original, "Image")
    picture(middle, "Attention rollout")
    picture(overlay, "Overlay")
    return figure


def draw_attention_maps(
    image: ArrayLike,
    maps: ArrayLike,
    entropy: ArrayLike,
    query: tuple[int, int] | None = None,
    asked: str = "class token",
) -> Figure:
    """What each head of each layer attends to, `[layers, heads, rows, cols]`, layers from left to
    right, heads from top to bottom, beside the image.

    Each map is scaled to its own largest weight; below it stands its entropy in nats, `[layers,
    heads]`. `query` (row, column) is marked in the image and in the maps; `asked` names it
    otherwise.
    """
    values = np.asarray(maps, dtype=np.float64)
    layers, heads, rows, cols = values.shape
    pixels = show_image(image)
    cell = float(np.clip(12 / layers, 0.42, 1.0))
    tall = cell * len(pixels) / pixels.shape[1]
    figure = new_figure(cell * layers + 2.6, max((tall + 0.2) * heads + 0.9, 2.3))
    left, right = figure.subplots(1, 2, width_ratios=(1.9, cell * layers))
    left.imshow(pixels, extent=(-0.5, cols - 0.5, rows - 0.5, -0.5), aspect="auto")
    left.set_box_aspect(len(pixels) / pixels.shape[1])
    picture(left, f"Image, {rows} x {cols} patches")
    share = tall / (tall + 0.2)  # of a row's height that is the map's, in axes of heads x layers
    for layer in range(layers):
        for head in range(heads):
            patches = values[layer, head]
            right.imshow(
                patches,
                cmap="viridis",
                vmin=0,
                vmax=patches.max() or 1.0,
                interpolation="nearest",
                extent=(layer + 0.03, layer + 0.97, head + share, head),
                aspect="auto",
            )
    for (layer, head), value in np.ndenumerate(np.asarray(entropy, dtype=np.float64)):
        right.text(
            *(layer + 0.5, head + (1 + share) / 2, f"{value:.2f}"),
            ha="center",
            va="center",
            fontsize=float(np.clip(7.5 * cell, 4.5, 6.5)),
            color=INK,
        )
    right.set_box_aspect(heads * (tall + 0.2) / (layers * cell))
    right.set_xlim(0, layers)
    right.set_ylim(heads, 0)
    right.set_xticks(np.arange(layers) + 0.5, range(layers))
    right.set_yticks(np.arange(heads) + share / 2, range(heads))
    asked = asked if query is None else f"patch in row {query[0]}, column {query[1]}"
    style(right, f"Attention of the {asked}; below each map its entropy (nats)", "layer", "head")
    right.spines[:].set_visible(False)
    if query is not None:
        box = {"fill": False, "edgecolor": VERMILLION}
        left.add_patch(Rectangle((query[1] - 0.5, query[0] - 0.5), 1, 1, linewidth=1.5, **box))
    return figure


def _resized(mask: NDArray[np.float64], size: tuple[int, ...]) -> NDArray[np.float64]:
    """A mask at (height, width), bilinear."""
    image = Image.fromarray(mask.astype(np.float32))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR), dtype=np.float64)
