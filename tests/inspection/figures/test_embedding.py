"""Filters and position similarity: what is in the pixels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.figure import Figure

from patchword.inspection.embedding import position_similarity
from patchword.inspection.figures.embedding import (
    draw_filters,
    draw_position_similarity,
    shown_patches,
)

Pixels = Callable[[bytes | Figure], np.ndarray]
ShareOf = Callable[..., float]


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_filters_of_any_channels(channels: int, pixels: Pixels) -> None:
    components = np.random.default_rng(0).normal(size=(5, 4, 6, channels))
    image = pixels(draw_filters(components, np.full(5, 0.2)))
    coloured = (image.max(axis=2) - image.min(axis=2) > 60).mean()
    assert (coloured > 0.05) == (channels == 3)


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (20, 17)])
def test_position_similarity_of_any_grid(
    grid: tuple[int, int], pixels: Pixels, share_of: ShareOf
) -> None:
    table = np.random.default_rng(0).normal(size=(grid[0] * grid[1], 8))
    image = pixels(draw_position_similarity(position_similarity(table, grid)))
    assert share_of(image, "#67001F") > 0.001  # each patch is like itself: the deepest red


def test_large_grids_are_thinned_out_to_the_edges() -> None:
    assert shown_patches(14).tolist() == list(range(14))
    shown = shown_patches(37)
    assert len(shown) == 16
    assert (shown[0], shown[-1]) == (0, 36)
    assert set(np.diff(shown)) <= {2, 3}
