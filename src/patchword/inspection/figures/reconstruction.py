"""What self-supervised models predict, drawn."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from patchword.inspection.figures.drawing import INK, bare, new_figure, show_image

ROWS = ("original", "seen", "predicted")


def draw_predictions(original: ArrayLike, seen: ArrayLike, predicted: ArrayLike) -> Figure:
    """Images, what the model saw of them, and what it made of that, below each other: three times
    `[n, H, W, C]`, 0 to 1. Grey is what it did not see."""
    columns = [np.asarray(row, dtype=np.float64) for row in (original, seen, predicted)]
    count, height, width = columns[0].shape[:3]
    side = min(1.5, 9.0 / count)
    figure = new_figure(side * count + 0.75, side * height / width * len(ROWS) + 0.2)
    for row, (name, images) in enumerate(zip(ROWS, columns, strict=True)):
        for column, image in enumerate(images):
            axes = figure.add_subplot(len(ROWS), count, row * count + column + 1)
            pixels = (image * 255).round().clip(0, 255).astype(np.uint8)
            axes.imshow(show_image(pixels), interpolation="nearest")
            bare(axes)
            if column == 0:
                axes.set_ylabel(name, fontsize=8, color=INK)
    return figure
