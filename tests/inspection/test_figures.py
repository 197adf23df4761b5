"""Figures: what is in the pixels, any number of classes, awkward names, no global state."""

from __future__ import annotations

import io
import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from patchword.architecture import Pool, Position, ViTSpec
from patchword.inspection import figures
from patchword.inspection.embedding import position_similarity
from patchword.inspection.figures import Series
from patchword.models.vit import ViT


def pixels(png: bytes) -> np.ndarray:
    assert png.startswith(b"\x89PNG")
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=np.int16)


def share_of(image: np.ndarray, colour: str, tolerance: int = 12) -> float:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return float((np.abs(image - wanted).max(axis=2) <= tolerance).mean())


@pytest.mark.parametrize(("pool", "position"), [("token", "learned-1d"), ("gap", "sincos2d")])
def test_embedding_figures_of_a_model(pool: Pool, position: Position) -> None:
    spec = ViTSpec(
        depth=1,
        width=16,
        mlp_width=16,
        heads=2,
        patch_size=(4, 2),
        image_size=(12, 8),
        in_channels=1,
        registers=2,
        pool=pool,
        position=position,
    )
    drawn = figures.embedding_figures(ViT(spec))
    titles = ["Patch embedding filters", "Position embedding similarity"]
    assert list(drawn) == titles[: 2 if position == "learned-1d" else 1]
    assert all(pixels(png).std() > 1 for png in drawn.values())


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_filters_of_any_channels(channels: int) -> None:
    components = np.random.default_rng(0).normal(size=(5, 4, 6, channels))
    image = pixels(figures.draw_filters(components, np.full(5, 0.2)))
    coloured = (image.max(axis=2) - image.min(axis=2) > 60).mean()
    assert (coloured > 0.05) == (channels == 3)


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (20, 17)])
def test_position_similarity_of_any_grid(grid: tuple[int, int]) -> None:
    table = np.random.default_rng(0).normal(size=(grid[0] * grid[1], 8))
    image = pixels(figures.draw_position_similarity(position_similarity(table, grid)))
    assert share_of(image, "#67001F") > 0.001  # each patch is like itself: the deepest red


@pytest.mark.parametrize("classes", [1, 2, 10, 30, 100, 1000])
def test_confusion_matrix_of_any_size(classes: int) -> None:
    perfect = np.eye(classes, dtype=np.int64) * 3
    wrong = np.roll(perfect, 1, axis=1)
    names = [f"class {i}" for i in range(classes)]
    good, bad = (pixels(figures.draw_confusion(m, names)) for m in (perfect, wrong))
    assert good.shape == bad.shape
    assert max(good.shape) < 2000
    assert share_of(good, "#08306B", 30) > 0.0005  # the deepest blue
    assert classes == 1 or not np.array_equal(good, bad)


def test_one_mistake_among_many_classes_is_visible() -> None:
    matrix = np.eye(1000, dtype=np.int64) * 50
    names = [str(i) for i in range(1000)]
    clean = pixels(figures.draw_confusion(matrix, names))
    matrix[900, 100] = 50
    assert (np.abs(pixels(figures.draw_confusion(matrix, names)) - clean).max() > 100).any()


def test_awkward_class_names() -> None:
    names = ["$\\frac{", "a$b$c_^", "日本語", "<b>x</b>", "n" * 200, "two\nlines", "\udc80"]
    pixels(figures.draw_confusion(np.eye(7, dtype=np.int64), names))


def test_a_class_without_images_is_grey() -> None:
    matrix = np.diag([5, 0, 5])
    assert share_of(pixels(figures.draw_confusion(matrix, list("abc"))), figures.FAINT, 2) > 0.05


def test_curves_bear_gaps_and_single_points() -> None:
    x = list(range(200))
    y = [math.exp(-i / 50) if i % 17 else math.nan for i in x]
    drawn = figures.draw_curves(
        [Series("train", x, y, smooth=True), Series("val", [100], [0.4], figures.VERMILLION)],
        "Loss",
        "loss",
        mark=(100, "best"),
    )
    image = pixels(drawn)
    assert share_of(image, figures.BLUE) > 0.001
    assert share_of(image, figures.VERMILLION) > 0.00005
    pixels(figures.draw_curves([Series("val", [5], [0.5])], "Accuracy", "accuracy", percent=True))


def test_reliability_shows_empty_bins_as_empty() -> None:
    edges = np.linspace(0, 1, 16)
    count = np.zeros(15, np.int64)
    count[-1] = 40
    value = np.where(count > 0, 0.95, np.nan)
    one = share_of(pixels(figures.draw_reliability(edges, value, value, count, 0.01)), figures.BLUE)
    full = np.full(15, 0.95)
    every = share_of(
        pixels(figures.draw_reliability(edges, full, full, count + 40, 0.01)), figures.BLUE
    )
    assert 0 < 5 * one < every


def test_the_same_figure_has_the_same_bytes() -> None:
    matrix = np.eye(3, dtype=np.int64)
    first, second = (figures.draw_confusion(matrix, list("abc")) for _ in range(2))
    assert first == second


def test_pyplot_is_never_loaded() -> None:
    code = "import sys, patchword.inspection.figures; print('matplotlib.pyplot' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.strip() == "False", answer.stderr
