"""The look that all figures share, and their way into a file.

Drawn with matplotlib's objects, never through pyplot: no display and no global state. Colours are
Okabe and Ito's (2008), told apart with any colour vision.
"""

from __future__ import annotations

import io
import warnings
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

Format = Literal["png", "pdf"]

BLUE, VERMILLION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6B7280"
ORANGE, SKY, PURPLE = "#E69F00", "#56B4E9", "#CC79A7"
INK, FAINT = "#1F2937", "#E5E7EB"
LEGEND: dict[str, Any] = {"fontsize": 7.5, "frameon": False, "labelcolor": INK}
DPI = 160


def new_figure(width: float, height: float) -> Figure:
    """A white figure of this size in inches, laid out so that nothing overlaps."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def style(axes: Axes, title: str, x_label: str = "", y_label: str = "") -> None:
    """Title, labels and the look of the axes."""
    axes.set_title(title, fontsize=10, color=INK, loc="left", pad=8)
    axes.set_xlabel(x_label, fontsize=8, color=INK)
    axes.set_ylabel(y_label, fontsize=8, color=INK)
    axes.tick_params(labelsize=7, colors=INK, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)


def picture(axes: Axes, title: str) -> None:
    """A title, and axes that show nothing but an image."""
    style(axes, title)
    axes.set_axis_off()


def bare(axes: Axes) -> None:
    """No ticks and no frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def ruled(*some: Axes) -> None:
    """Pale lines behind what is drawn."""
    for axes in some:
        axes.grid(color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)


def label_bar(bar: Colorbar, label: str, size: float = 8, ticks: float = 7) -> None:
    """What the colours mean, and the look of a colour bar."""
    bar.set_label(label, fontsize=size, color=INK)
    bar.ax.tick_params(labelsize=ticks, colors=INK)


def encode(figure: Figure, kind: Format = "png") -> bytes:
    """The bytes of a PNG, or of a PDF of curves and text with its fonts inside. The same figure
    has the same bytes."""
    stream = io.BytesIO()
    metadata: dict[str, Any] = {"Software": None} if kind == "png" else {"CreationDate": None}
    with warnings.catch_warnings(), matplotlib.rc_context({"pdf.fonttype": 42}):
        # class names in scripts that matplotlib's font lacks are drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(stream, format=kind, metadata=metadata)
    return stream.getvalue()


def short(name: str, most: int = 18) -> str:
    """A name on one line, without what no font can draw."""
    line = " ".join(name.encode("utf-8", "replace").decode().split())
    return line if len(line) <= most else line[: most - 1] + "\u2026"


def show_image(image: ArrayLike) -> NDArray[np.uint8]:
    """uint8 `[H, W, 3]` of an image of 1, 3 or 4 channels, `[H, W, C]`; transparency is dropped."""
    pixels = np.asarray(image, dtype=np.uint8)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[..., :3]
