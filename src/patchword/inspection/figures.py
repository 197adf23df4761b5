"""Figures as PNG bytes: embeddings, training curves, confusion matrix, reliability diagram.

Drawn with matplotlib's objects on the Agg canvas, never through pyplot: no display and no global
state. Colours are Okabe and Ito's (2008), told apart with any colour vision.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter
from numpy.typing import ArrayLike, NDArray

from patchword.inspection.embedding import embedding_filters, position_similarity
from patchword.models.mixer import Mixer
from patchword.models.model import Model
from patchword.models.position import Learned1d, Learned2d
from patchword.models.vit import ViT

BLUE, VERMILLION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6B7280"
INK, FAINT = "#1F2937", "#E5E7EB"
DPI = 160


@dataclass(frozen=True)
class Series:
    """One curve: a value for each x; `smooth` adds a running mean over the pale values."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = BLUE
    smooth: bool = False


def embedding_figures(model: Model) -> dict[str, bytes]:
    """Title -> PNG of what the model's embeddings have learned (figure 7 left and centre): its
    filters, if it cuts the image itself into patches, and the similarity of its position
    embeddings, if it learns a table of them."""
    figures: dict[str, bytes] = {}
    if isinstance(model, Mixer) or (isinstance(model, ViT) and model.stem is None):
        embedding, channels = model.patch_embedding, model.spec.in_channels
        filters = embedding_filters(embedding.weight, embedding.patch_size, channels)
        figures["Patch embedding filters"] = draw_filters(*filters)
    if isinstance(model, ViT):
        position, grid = model.position_in(0), model.spec.grid
        if isinstance(position, Learned1d | Learned2d):
            similarity = position_similarity(position()[0, -grid[0] * grid[1] :], grid)
            figures["Position embedding similarity"] = draw_position_similarity(similarity)
    return figures


def draw_filters(components: ArrayLike, explained: ArrayLike, columns: int = 7) -> bytes:
    """The filters of `embedding_filters`, `[count, P_h, P_w, C]`, as small patches (figure 7 left).

    Each is scaled to its own range, and labelled with the share of variance it explains. Three
    channels show as red, green and blue; any other number as the mean over the channels.
    """
    filters = np.asarray(components, dtype=np.float64)
    shares = np.asarray(explained, dtype=np.float64)
    columns = min(columns, len(filters))
    rows = -(-len(filters) // columns)
    aspect = filters.shape[1] / filters.shape[2]
    figure = _figure(max(0.8 * columns, 3.2), (0.74 * aspect + 0.16) * rows + 0.4)
    figure.suptitle("Principal components of the patch embedding", fontsize=10, color=INK)
    for place, (patch, share) in enumerate(zip(filters, shares, strict=True)):
        axes = figure.add_subplot(rows, columns, place + 1)
        image = patch if patch.shape[2] == 3 else patch.mean(axis=2)
        low, high = image.min(), image.max()
        image = (image - low) / (high - low if high > low else 1.0)
        axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(f"{100 * share:.1f} %", fontsize=6, color=GREY, pad=2)
    return _png(figure)


def draw_position_similarity(similarity: ArrayLike, most: int = 16) -> bytes:
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
    figure = _figure(width, min(width * len(mosaic) / mosaic.shape[1], 12.0) * 0.82 + 0.5)
    axes = figure.add_subplot()
    axes.set_facecolor("#D1D5DB")
    image = axes.imshow(mosaic, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set_xticks(np.arange(len(across)) * (cols + gap) + (cols - 1) / 2, across + 1)
    axes.set_yticks(np.arange(len(down)) * (rows + gap) + (rows - 1) / 2, down + 1)
    _style(axes, "Position embedding similarity", "input patch column", "input patch row")
    axes.spines[:].set_visible(False)
    extend = "max" if limit < 1 else "neither"
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, extend=extend)
    bar.set_label("cosine similarity", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=7, colors=INK)
    return _png(figure)


def draw_curves(
    series: Sequence[Series],
    title: str,
    y_label: str,
    *,
    percent: bool = False,
    mark: tuple[float, str] | None = None,
) -> bytes:
    """Curves over the training steps. `percent`: fractions, shown in percent. `mark`: an x to be
    marked by a vertical line, and its name. Values that are not finite leave a gap."""
    figure = _figure(4.6, 2.9)
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
    _style(axes, title, "step", y_label)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    if len(series) + (mark is not None) > 1:
        axes.legend(fontsize=7.5, frameon=False, labelcolor=INK)
    return _png(figure)


def draw_confusion(matrix: ArrayLike, names: Sequence[str]) -> bytes:
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
    figure = _figure(side + 0.9, side)
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
    _style(
        axes,
        "Confusion matrix",
        "predicted class" if named else "predicted class, index",
        "true class" if named else "true class, index",
    )
    if named:
        short = [_short(name) for name in names]
        axes.set_xticks(range(size), short, rotation=90 if size > 4 else 0, parse_math=False)
        axes.set_yticks(range(size), short, parse_math=False)
    if size <= 20:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if share[row, column] > 0.35 else INK
            text = f"{counts[row, column]}"
            font = 8 if size <= 12 else 6.5
            axes.text(column, row, text, ha="center", va="center", fontsize=font, color=colour)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.set_label("share of the true class", fontsize=8, color=INK)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, 0, symbol=" %"))
    bar.ax.tick_params(labelsize=7, colors=INK)
    return _png(figure)


def draw_reliability(
    edges: ArrayLike, accuracy: ArrayLike, confidence: ArrayLike, count: ArrayLike, ece: float
) -> bytes:
    """Reliability diagram: accuracy against confidence per bin, above the number of images.

    Arguments are those of `Classification.reliability`: edges `[bins + 1]`, the rest `[bins]`, NaN
    where a bin is empty; `ece` is a fraction.
    """
    borders, numbers = np.asarray(edges, dtype=np.float64), np.asarray(count)
    hit, sure = np.asarray(accuracy, dtype=np.float64), np.asarray(confidence, dtype=np.float64)
    centres, widths, filled = (borders[1:] + borders[:-1]) / 2, np.diff(borders), numbers > 0
    figure = _figure(4.8, 4.8)
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
    _style(upper, f"Reliability, ECE {100 * ece:.2f} %", "", "accuracy")
    figure.legend(fontsize=7.5, frameon=False, loc="outside lower center", ncol=3, labelcolor=INK)
    lower.bar(centres, numbers, widths * 0.92, color=GREY)
    lower.set_xlim(0, 1)
    _style(lower, "", "confidence (probability of the predicted class)", "images")
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    upper.yaxis.set_major_formatter(PercentFormatter(1.0, 0, symbol=" %"))
    lower.xaxis.set_major_formatter(PercentFormatter(1.0, 0, symbol=" %"))
    for axes in (upper, lower):
        axes.grid(color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
    return _png(figure)


def _figure(width: float, height: float) -> Figure:
    """A white figure of this size in inches, laid out so that nothing overlaps."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _style(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, fontsize=10, color=INK, loc="left", pad=8)
    axes.set_xlabel(x_label, fontsize=8, color=INK)
    axes.set_ylabel(y_label, fontsize=8, color=INK)
    axes.tick_params(labelsize=7, colors=INK, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        # class names in scripts that matplotlib's font lacks are drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _short(name: str, most: int = 18) -> str:
    """A class name on one line, without what no font can draw."""
    line = " ".join(name.encode("utf-8", "replace").decode().split())
    return line if len(line) <= most else line[: most - 1] + "\u2026"


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
