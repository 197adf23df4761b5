"""Curves, confusion, reliability: any number of classes, awkward names."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.figure import Figure

from patchword.inspection.figures.drawing import BLUE, FAINT, VERMILLION
from patchword.inspection.figures.run import (
    Series,
    draw_confusion,
    draw_curves,
    draw_reliability,
)

Pixels = Callable[[bytes | Figure], np.ndarray]
ShareOf = Callable[..., float]


@pytest.mark.parametrize("classes", [1, 2, 10, 30, 100, 1000])
def test_confusion_matrix_of_any_size(classes: int, pixels: Pixels, share_of: ShareOf) -> None:
    perfect = np.eye(classes, dtype=np.int64) * 3
    wrong = np.roll(perfect, 1, axis=1)
    names = [f"class {i}" for i in range(classes)]
    good, bad = (pixels(draw_confusion(m, names)) for m in (perfect, wrong))
    assert good.shape == bad.shape
    assert max(good.shape) < 2000
    assert share_of(good, "#08306B", 30) > 0.0005  # the deepest blue
    assert classes == 1 or not np.array_equal(good, bad)


def test_one_mistake_among_many_classes_is_visible(pixels: Pixels) -> None:
    matrix = np.eye(1000, dtype=np.int64) * 50
    names = [str(i) for i in range(1000)]
    clean = pixels(draw_confusion(matrix, names))
    matrix[900, 100] = 50
    assert (np.abs(pixels(draw_confusion(matrix, names)) - clean).max() > 100).any()


def test_awkward_class_names(pixels: Pixels) -> None:
    names = ["$\\frac{", "a$b$c_^", "日本語", "<b>x</b>", "n" * 200, "two\nlines", "\udc80"]
    pixels(draw_confusion(np.eye(7, dtype=np.int64), names))


def test_a_class_without_images_is_grey(pixels: Pixels, share_of: ShareOf) -> None:
    matrix = np.diag([5, 0, 5])
    assert share_of(pixels(draw_confusion(matrix, list("abc"))), FAINT, 2) > 0.05


def test_curves_bear_gaps_and_single_points(pixels: Pixels, share_of: ShareOf) -> None:
    x = list(range(200))
    y = [math.exp(-i / 50) if i % 17 else math.nan for i in x]
    drawn = draw_curves(
        [Series("train", x, y, smooth=True), Series("val", [100], [0.4], VERMILLION)],
        "Loss",
        "loss",
        mark=(100, "best"),
    )
    image = pixels(drawn)
    assert share_of(image, BLUE) > 0.001
    assert share_of(image, VERMILLION) > 0.00005
    pixels(draw_curves([Series("val", [5], [0.5])], "Accuracy", "accuracy", percent=True))


def test_reliability_shows_empty_bins_as_empty(pixels: Pixels, share_of: ShareOf) -> None:
    edges = np.linspace(0, 1, 16)
    count = np.zeros(15, np.int64)
    count[-1] = 40
    value = np.where(count > 0, 0.95, np.nan)
    one = share_of(pixels(draw_reliability(edges, value, value, count, 0.01)), BLUE)
    full = np.full(15, 0.95)
    every = share_of(pixels(draw_reliability(edges, full, full, count + 40, 0.01)), BLUE)
    assert 0 < 5 * one < every
