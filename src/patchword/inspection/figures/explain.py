"""The picture of an explanation: the image, where the class is seen in it, and how sure that is."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

from patchword.inspection.explain import Explanation
from patchword.inspection.figures.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LEGEND,
    PURPLE,
    VERMILLION,
    label_bar,
    new_figure,
    picture,
    ruled,
    short,
    show_image,
    style,
)

TITLES = {"rollout": "Gradient-weighted rollout", "occlusion": "Occlusion"}
LINES = {"rollout": (GREEN, "-"), "occlusion": (PURPLE, "-"), "random": (GREY, "--")}
FOR_AND_AGAINST = LinearSegmentedColormap.from_list("evidence", [BLUE, "#F7F7F7", VERMILLION])
LIGHTEST = 0.15
"""opacity of the colour where a map is 0; it is 0.85 more at the largest value"""


def draw_explanation(image: ArrayLike, explanation: Explanation, label: str) -> Figure:
    """An image, uint8 `[H, W, C]` as the model was given it, its maps laid over it, and the curves
    of deletion and insertion with their areas. `label` names the class that is explained.

    Vermillion speaks for the class, blue against it. Rollout is in multiples of its mean, occlusion
    in nats of the class's log-odds. Where no probability reaches a half, the curves' axis is cut.
    """
    pixels = show_image(image)
    ratio = float(np.clip(len(pixels) / pixels.shape[1], 0.4, 2.0))
    figure = new_figure(7.8, 2.1 * ratio + 3.3)
    said = f"Why {short(label, 40)}? Probability {100 * explanation.probability:.1f} %"
    if explanation.agreement is not None:
        said += f"; rank correlation of the two maps {explanation.agreement:.2f}"
    figure.suptitle(said, fontsize=10, color=INK, x=0.012, ha="left", parse_math=False)
    grid = figure.add_gridspec(2, 6, height_ratios=(2.1 * ratio + 0.35, 2.4))
    wide = 6 // (1 + len(explanation.maps))
    original = figure.add_subplot(grid[0, :wide], anchor="N")
    original.imshow(pixels)
    picture(original, "Image")
    for place, (name, values) in enumerate(explanation.maps.items(), 1):
        axes = figure.add_subplot(grid[0, place * wide : (place + 1) * wide], anchor="N")
        picture(axes, TITLES[name])
        _draw_map(figure, axes, pixels, name, values)
    for which, columns, title, doing in (
        ("deletion", slice(0, 3), "Deletion: a small area is good", "taken away"),
        ("insertion", slice(3, 6), "Insertion: a large area is good", "put in"),
    ):
        axes = figure.add_subplot(grid[1, columns])
        style(axes, title, f"patches {doing}, most important first", "probability")
        _draw_curves(axes, explanation, which)
    return figure


def _draw_map(
    figure: Figure, axes: Axes, pixels: NDArray[np.uint8], name: str, values: NDArray[np.float64]
) -> None:
    """A map over the image in pale grey."""
    unit = "fall of the log-odds (nats)"
    if name == "rollout":
        values, unit = values / (values.mean() or 1.0), "times the mean"
    limit = float(np.abs(values).max()) or 1.0
    grey = 255 - (255 - pixels.mean(axis=2)) * 0.75
    height, width = grey.shape
    axes.imshow(grey, cmap="gray", vmin=0, vmax=255)
    drawn = axes.imshow(
        values,
        cmap=FOR_AND_AGAINST,
        vmin=-limit,
        vmax=limit,
        alpha=LIGHTEST + (0.85 - LIGHTEST) * np.abs(values) / limit,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        interpolation="nearest",
    )
    scale = ScalarMappable(drawn.norm, FOR_AND_AGAINST)
    bar = figure.colorbar(scale, ax=axes, location="bottom", panchor=False, fraction=0.05, pad=0.03)
    bar.outline.set_visible(False)
    if name == "rollout":
        bar.ax.set_xlim(0, limit)
    bar.ax.xaxis.set_major_locator(MaxNLocator(3))
    label_bar(bar, unit, 7, 6.5)


def _draw_curves(axes: Axes, explanation: Explanation, which: str) -> None:
    """The deletion or the insertion curves, named with their areas."""
    for name, curves in explanation.curves.items():
        colour, line = LINES[name]
        text = f"{name} {explanation.scores[name][which == 'insertion']:.3f}"
        values = getattr(curves, which)
        axes.plot(curves.shares, values, color=colour, ls=line, lw=1.6, label=text)
    axes.set_xlim(0, 1)
    top = max(getattr(curves, which).max() for curves in explanation.curves.values())
    axes.set_ylim(0, 1.02 if top > 0.5 else 1.1 * max(top, 1e-6))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, None, symbol=" %"))
    ruled(axes)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.19), "ncol": 3}
    axes.legend(**below, **LEGEND, columnspacing=1.2)
