"""Figures of what comes out of the model: patch tokens as colours, and a map of a data set.

Images are uint8 `[H, W, C]` of 1, 3 or 4 channels, as the model is given them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from numpy.typing import ArrayLike, NDArray

from patchword.inspection.figures.drawing import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    bare,
    new_figure,
    picture,
    short,
    show_image,
    style,
)

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION)
MARKERS = ("o", "^", "s", "D")
MOST_CLASSES = len(COLOURS) * len(MARKERS)
"""Classes that have a colour and a shape of their own on a map; the others are grey."""
REST = "#C3C8D0"


@dataclass(frozen=True, eq=False)
class Thumbnail:
    """A small image, and what is written below it."""

    image: NDArray[np.uint8]
    """`[H, W, C]`"""
    caption: str
    right: bool = True
    """False writes the caption in the colour of mistakes"""


def draw_tokens(image: ArrayLike, colours: ArrayLike) -> Figure:
    """An image beside its `token_components`, `[rows, cols, 3]` in [0, 1]: patches of like colour
    have like tokens."""
    pixels, values = show_image(image), np.asarray(colours, dtype=np.float64)
    ratio = len(pixels) / pixels.shape[1]
    figure = new_figure(4.9, 2.4 * float(np.clip(ratio, 0.4, 2.0)) + 0.4)
    left, right = figure.subplots(1, 2)
    left.imshow(pixels)
    aspect = ratio * values.shape[1] / values.shape[0]
    right.imshow(values, interpolation="nearest", aspect=aspect)
    picture(left, "Image")
    picture(right, "Patch tokens")
    return figure


def draw_feature_map(
    points: ArrayLike,
    labels: ArrayLike,
    classes: Sequence[str],
    *,
    mistakes: Sequence[int] = (),
    rows: Sequence[Sequence[Thumbnail]] = (),
    title: str = "Features",
) -> Figure:
    """A `pooled_map`, `[n, 2]`, coloured by class, and beside it some mistakes with their nearest
    neighbours.

    `labels` are int `[n]`, positions in `classes`. The `MOST_CLASSES` most frequent classes have a
    colour and a shape each, the rest is grey. `mistakes` are the points of the mistakes, which are
    ringed; `rows` are those of them that are shown: each the mistake itself, then its neighbours.
    The first row belongs to the first mistake, which is numbered 1 on the map, and so on.
    """
    places = np.asarray(points, dtype=np.float64)
    numbers = np.asarray(labels, dtype=np.int64)
    wide = 1 + max((len(row) for row in rows), default=0)
    figure = new_figure(6.2 + (0.85 * wide if rows else 0), 6.2)
    left = figure
    if rows:
        parts = figure.subfigures(1, 2, squeeze=False, width_ratios=(6.2, 0.85 * wide))
        left = parts[0, 0]
        _neighbours(parts[0, 1], rows)
    axes = left.subplots()
    _points(axes, places, numbers, classes)
    _rings(axes, places[np.asarray(mistakes, dtype=np.int64)], len(rows))
    style(axes, title)
    bare(axes)
    left.legend(
        *(axes.get_legend_handles_labels()),
        loc="outside lower center",
        ncol=5,
        fontsize=7,
        markerscale=1.3,
        frameon=False,
        labelcolor=INK,
    )
    return figure


def _points(
    axes: Axes, places: NDArray[np.float64], labels: NDArray[np.int64], classes: Sequence[str]
) -> None:
    frequent = sorted(k for k, _ in Counter(labels.tolist()).most_common(MOST_CLASSES))
    size = float(np.clip(3000 / max(len(labels), 1), 6, 30))
    rest = ~np.isin(labels, frequent)
    if rest.any():
        others = len(np.unique(labels[rest]))
        axes.scatter(*places[rest].T, s=size * 0.7, color=REST, label=f"{others} other classes")
    for number, k in enumerate(frequent):
        axes.scatter(
            *places[labels == k].T,
            s=size,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number // len(COLOURS)],
            linewidth=0,
            alpha=0.9,
            zorder=3,
            label=_plain(classes[int(k)]),
        )


def _rings(axes: Axes, places: NDArray[np.float64], shown: int) -> None:
    """Rings around mistakes, the first so many of them numbered."""
    for some, size, line, name in (
        (places[shown:], 16, 0.5, "mistake"),
        (places[:shown], 70, 1.1, "mistake, shown"),
    ):
        if len(some):
            look = {"facecolor": "none", "edgecolor": INK, "linewidth": line, "zorder": 4}
            axes.scatter(*some.T, s=size, label=name, **look)
    for number, (x, y) in enumerate(places[:shown], 1):
        axes.annotate(
            *(str(number), (x, y)),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=9,
            fontweight="bold",
            color=INK,
            bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "alpha": 0.75, "linewidth": 0},
            zorder=6,
        )


def _plain(name: str) -> str:
    """A name for the legend, which would hide what begins with _ and read $ as mathematics."""
    return "\u200b" * name.startswith("_") + short(name, 14).replace("$", r"\$")


def _neighbours(figure: SubFigure, rows: Sequence[Sequence[Thumbnail]]) -> None:
    """A row for each mistake: its number, itself, its neighbours."""
    columns = max(map(len, rows))
    figure.suptitle(
        "Mistakes, and their nearest neighbours", fontsize=10, color=INK, x=0, ha="left"
    )
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for number, (row, places) in enumerate(zip(rows, grid, strict=True), 1):
        for axes in places[len(row) :]:
            axes.set_axis_off()
        for column, (thumbnail, axes) in enumerate(zip(row, places, strict=False)):
            axes.imshow(show_image(thumbnail.image))
            bare(axes)
            colour = INK if thumbnail.right else VERMILLION
            caption = "\n".join(map(short, thumbnail.caption.splitlines()))
            axes.set_xlabel(caption, fontsize=6, color=colour, labelpad=2, parse_math=False)
            if not column:
                axes.set_ylabel(str(number), fontsize=9, color=INK, rotation=0, labelpad=8)
