"""Figures of a run: curves over the steps, confusion matrix, reliability diagram."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter
from numpy.typing import ArrayLike, NDArray

from patchword.inspection.figures.drawing import (
    BLUE,
    FAINT,
    GREY,
    INK,
    LEGEND,
    VERMILLION,
    label_bar,
    new_figure,
    ruled,
    short,
    style,
)


@dataclass(frozen=True)
class Series:
    """One curve: a value for each x; `smooth` adds a running mean over the pale values."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = BLUE
    smooth: bool = False


def draw_curves(
    series: Sequence[Series],
    title: str,
    y_label: str,
    *,
    percent: bool = False,
    mark: tuple[float, str] | None = None,
) -> Figure:
    """Curves over the training steps. `percent`: fractions, shown in percent. `mark`: an x to be
    marked by a vertical line, and its name. Values that are not finite leave a gap."""
    figure = new_figure(4.6, 2.9)
    axes = figure.add_subplot()
    for item in series:
        x, y = np.asarray(item.x, dtype=np.float64), np.asarray(item.y, dtype=np.float64)
        mean = _running_mean(y) if item.smooth and len(y) >= 40 else None
        if mean is not None:
            axes.plot(x, y, color=item.colour, alpha=0.25, linewidth=0.8)
        shown = y if mean is None else mean
        marker = "o" if len(y) <= 40 else ""
        axes.plot(x, shown, color=item.colour, linewidth=1.6, marker=marker, ms=3, label=item.name)
    if mark is not None:
        axes.axvline(mark[0], color=GREY, linewidth=1, linestyle="--", label=mark[1])
    style(axes, title, "step", y_label)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    if len(series) + (mark is not None) > 1:
        axes.legend(**LEGEND)
    return figure


def draw_confusion(matrix: ArrayLike, names: Sequence[str]) -> Figure:
    """Confusion matrix `[K, K]` of counts, rows true; colour is the share of the true class.

    Up to 20 classes have their counts written in the cells, up to 40 their names along the axes.
    Beyond 400, blocks of neighbouring classes share a pixel, which shows their largest share.
    Classes without images are grey.
    """
    counts = np.asarray(matrix, dtype=np.int64)
    size = len(counts)
    totals = counts.sum(axis=1, keepdims=True)
    share = np.where(totals > 0, counts / np.maximum(totals, 1), np.nan)
    block = -(-size // 400)
    side = float(np.clip(1.8 + 0.42 * size, 3.6, 8.0)) if size <= 40 else 7.0
    figure = new_figure(side + 0.9, side)
    axes = figure.add_subplot()
    axes.set_facecolor(FAINT)
    # cells in units of classes, so that the ticks are class indices whatever the block
    image = axes.imshow(
        _block_max(share, block),
        cmap="Blues",
        norm=PowerNorm(0.5, 0.0, 1.0),
        extent=(-0.5, size - 0.5, size - 0.5, -0.5),
        interpolation="nearest",
    )
    named = size <= 40
    style(
        axes,
        "Confusion matrix",
        "predicted class" if named else "predicted class, index",
        "true class" if named else "true class, index",
    )
    if named:
        shown = [short(name) for name in names]
        axes.set_xticks(range(size), shown, rotation=90 if size > 4 else 0, parse_math=False)
        axes.set_yticks(range(size), shown, parse_math=False)
    if size <= 20:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if share[row, column] > 0.35 else INK
            text = f"{counts[row, column]}"
            font = 8 if size <= 12 else 6.5
            axes.text(column, row, text, ha="center", va="center", fontsize=font, color=colour)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    label_bar(bar, "share of the true class")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, 0, symbol=" %"))
    return figure


def draw_reliability(
    edges: ArrayLike, accuracy: ArrayLike, confidence: ArrayLike, count: ArrayLike, ece: float
) -> Figure:
    """Reliability diagram: accuracy against confidence per bin, above the number of images.

    Arguments are those of `Classification.reliability`: edges `[bins + 1]`, the rest `[bins]`, NaN
    where a bin is empty; `ece` is a fraction.
    """
    borders, numbers = np.asarray(edges, dtype=np.float64), np.asarray(count)
    hit, sure = np.asarray(accuracy, dtype=np.float64), np.asarray(confidence, dtype=np.float64)
    centres, widths, filled = (borders[1:] + borders[:-1]) / 2, np.diff(borders), numbers > 0
    figure = new_figure(4.8, 4.8)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.bar(centres, np.nan_to_num(hit), widths * 0.92, color=BLUE, label="accuracy")
    upper.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="perfect")
    upper.scatter(
        sure[filled],
        hit[filled],
        s=18,
        color=VERMILLION,
        edgecolor="white",
        linewidth=0.6,
        zorder=3,
        clip_on=False,
        label="mean of the bin",
    )
    upper.set_ylim(0, 1)
    style(upper, f"Reliability, ECE {100 * ece:.2f} %", "", "accuracy")
    figure.legend(**LEGEND, loc="outside lower center", ncol=3)
    lower.bar(centres, numbers, widths * 0.92, color=GREY)
    lower.set_xlim(0, 1)
    style(lower, "", "confidence (probability of the predicted class)", "images")
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    upper.yaxis.set_major_formatter(PercentFormatter(1.0, 0, symbol=" %"))
    lower.xaxis.set_major_formatter(PercentFormatter(1.0, 0, symbol=" %"))
    ruled(upper, lower)
    return figure


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred mean over a fortieth of the curve, over what there is of it at the ends."""
    window = max(3, len(values) // 40) | 1
    finite = np.isfinite(values)
    kernel = np.ones(window)
    total = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    number = np.convolve(finite.astype(np.float64), kernel, mode="same")
    return np.where(finite, total / np.maximum(number, 1), np.nan)


def _block_max(share: NDArray[np.float64], block: int) -> NDArray[np.float64]:
    """Largest value of each block of `block` x `block` cells; NaN where all are NaN."""
    if block == 1:
        return share
    pad = -len(share) % block
    filled = np.pad(np.nan_to_num(share, nan=-1.0), (0, pad), constant_values=-1.0)
    side = len(filled) // block
    largest = filled.reshape(side, block, side, block).max(axis=(1, 3))
    return np.where(largest >= 0, largest, np.nan)
