"""Filters and position similarity: what is in the pixels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.figure import Figure

from patchword.architecture import Pool, Position, ViTSpec
from patchword.inspection.embedding import position_similarity
from patchword.inspection.embedding_figures import (
    draw_filters,
    draw_position_similarity,
    embedding_figures,
)
from patchword.models.vit import ViT

Pixels = Callable[[bytes | Figure], np.ndarray]
ShareOf = Callable[..., float]


@pytest.mark.parametrize(("pool", "position"), [("token", "learned-1d"), ("gap", "sincos2d")])
def test_embedding_figures_of_a_model(pool: Pool, position: Position, pixels: Pixels) -> None:
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
    drawn = embedding_figures(ViT(spec))
    titles = ["Patch embedding filters", "Position embedding similarity"]
    assert list(drawn) == titles[: 2 if position == "learned-1d" else 1]
    assert all(pixels(png).std() > 1 for png in drawn.values())


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
