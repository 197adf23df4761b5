"""Attention distance, rollout and maps: what is in the pixels, any size of model and image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from patchword.inspection.figures.attention import (
    draw_attention_distance,
    draw_attention_maps,
    draw_rollout,
)
from patchword.inspection.figures.drawing import BLUE, GREY, VERMILLION

Pixels = Callable[[bytes | Figure], np.ndarray]
ShareOf = Callable[..., float]


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels)).astype(np.uint8)


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (12, 3), (32, 16)])
def test_distance_of_any_model(layers: int, heads: int, pixels: Pixels, share_of: ShareOf) -> None:
    values = np.random.default_rng(0).uniform(5, 90, (layers, heads))
    figure = draw_attention_distance(values, uniform=60.0, images=3)
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "Mean attention distance over 3 images"
    dots = np.asarray(axes.collections[0].get_offsets())
    assert sorted(map(tuple, dots.tolist())) == sorted(
        (float(layer), float(value)) for (layer, _), value in np.ndenumerate(values)
    )
    lines = [np.asarray(line.get_ydata()) for line in axes.lines]
    np.testing.assert_allclose(lines[0], values.mean(axis=1))
    assert lines[1].tolist() == [60, 60]
    image = pixels(figure)
    assert share_of(image, GREY, 40) > 0.001
    assert share_of(image, BLUE, 60) > 0.00001


def test_a_head_that_attends_to_no_patch_leaves_a_gap(pixels: Pixels) -> None:
    values = np.array([[np.nan, 10.0], [np.nan, np.nan], [20.0, 30.0]])
    figure = draw_attention_distance(values)
    mean = np.asarray(figure.axes[0].lines[0].get_ydata())
    np.testing.assert_array_equal(mean, [10, np.nan, 25])
    pixels(figure)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(32, 32), (16, 96), (96, 16)])
def test_rollout_darkens_what_the_mask_leaves_out(
    channels: int, size: tuple[int, int], pixels: Pixels
) -> None:
    mask = np.zeros((4, 4))
    mask[:, 2:] = 0.1
    image = np.full((*size, channels), 200, np.uint8)
    figure = draw_rollout(image, mask)
    original, middle, overlay = figure.axes[:3]
    assert np.asarray(original.images[0].get_array()).shape == (*size, 3)
    np.testing.assert_allclose(np.asarray(middle.images[0].get_array()), mask / 0.05)
    shown = np.asarray(overlay.images[0].get_array())
    assert shown[:, 0].max() < 30
    assert shown[:, -1].min() > 195
    assert pixels(figure).std() > 5


def test_a_flat_rollout_darkens_nothing() -> None:
    image = noise(16, 16)
    overlay = draw_rollout(image, np.full((2, 2), 0.25)).axes[2]
    np.testing.assert_array_equal(np.asarray(overlay.images[0].get_array()), image)


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (12, 3), (3, 12)])
def test_a_map_for_each_head_with_its_entropy(layers: int, heads: int, pixels: Pixels) -> None:
    rng = np.random.default_rng(0)
    maps = rng.uniform(size=(layers, heads, 2, 3)) / np.arange(1, heads + 1)[:, None, None]
    entropy = rng.uniform(0, 2, (layers, heads))
    figure = draw_attention_maps(noise(32, 48, 1), maps, entropy, (1, 2))
    left, right = figure.axes
    assert len(right.images) == layers * heads
    for image in right.images:
        values = np.asarray(image.get_array())
        assert image.norm.vmax == pytest.approx(values.max())  # a weak head shows as well
    assert [text.get_text() for text in right.texts] == [f"{value:.2f}" for value in entropy.flat]
    assert "patch in row 1, column 2" in right.get_title(loc="left")
    box: Any = left.patches[0]
    assert box.get_bbox().bounds == (1.5, 0.5, 1, 1)  # left, top, width, height
    width, height = pixels(figure).shape[1::-1]
    assert max(width, height) < 4000


def test_the_query_is_marked_only_if_it_is_a_patch(pixels: Pixels, share_of: ShareOf) -> None:
    maps, entropy = np.ones((2, 2, 2, 2)), np.zeros((2, 2))
    image = np.full((16, 16, 3), 255, np.uint8)
    marked, plain = (
        share_of(pixels(draw_attention_maps(image, maps, entropy, query)), VERMILLION)
        for query in ((0, 0), None)
    )
    assert marked > 0.001
    assert plain == 0
