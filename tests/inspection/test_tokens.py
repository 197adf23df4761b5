"""Token colours, the map of features, neighbours: scikit-learn, planted structure, laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from patchword.inspection.tokens import nearest, pooled_map, token_components
from patchword.spec.parse import PatchwordError


def test_colours_follow_scikit_learn_pca() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(4, 6, 10)) * np.linspace(3, 0.1, 10)
    colours = token_components(tokens, (2, 3))
    assert colours.shape == (4, 2, 3, 3)
    projected = PCA(3, svd_solver="full").fit_transform(tokens.reshape(24, 10))
    low, high = np.percentile(projected, [1, 99], axis=0)
    expected = ((projected - low) / (high - low)).clip(0, 1)
    for ours, theirs in zip(colours.reshape(24, 3).T, expected.T, strict=True):
        either = [np.abs(ours - theirs).max(), np.abs(ours - (1 - theirs)).max()]  # sign is free
        assert min(either) < 1e-9


def test_planted_directions_become_colours() -> None:
    # rows along one direction, columns along a second, images along a third
    directions = np.linalg.qr(np.random.default_rng(1).normal(size=(12, 3)))[0].T
    largest = directions[np.arange(3), np.abs(directions).argmax(1)]
    directions *= np.sign(largest)[:, None]  # the sign that colours have
    image, row, col = np.meshgrid(np.arange(2), np.arange(5), np.arange(4), indexing="ij")
    parts = [(5.0 * row, 0), (3.0 * col, 1), (1.0 * image, 2)]
    tokens = sum(part[..., None] * directions[i] for part, i in parts)
    colours = token_components(torch.from_numpy(np.asarray(tokens)).reshape(2, 20, 12), (5, 4))
    for channel, values in enumerate((row / 4, col / 3, image)):
        np.testing.assert_allclose(colours[..., channel], values, atol=1e-6)


@settings(max_examples=30)
@given(
    images=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    width=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_colours_are_in_range_and_the_same_again(
    images: int, grid: tuple[int, int], width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(images, grid[0] * grid[1], width, generator=generator)
    colours = token_components(tokens, grid)
    assert colours.shape == (images, *grid, 3)
    assert ((colours >= 0) & (colours <= 1)).all()
    np.testing.assert_array_equal(colours, token_components(tokens, grid))
    # moved and scaled tokens have the same colours
    np.testing.assert_allclose(token_components(tokens.double() * 7 + 2, grid), colours, atol=1e-6)
    assert (colours[..., width:] == 0.5).all()  # no such component


def test_an_outlier_does_not_wash_out_the_rest() -> None:
    tokens = np.random.default_rng(2).normal(size=(1, 400, 1))
    tokens[0, 7] = 1000
    colours = token_components(tokens, (20, 20))
    assert colours[..., 0].std() > 0.2


def test_tokens_that_are_all_the_same_are_grey() -> None:
    assert (token_components(torch.ones(2, 6, 8) * 0.3, (2, 3)) == 0.5).all()


def test_the_map_keeps_groups_apart() -> None:
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(3, 64)) * 4
    group = np.repeat(np.arange(3), 20)
    places = pooled_map(centres[group] + rng.normal(size=(60, 64)))
    assert places.shape == (60, 2)
    _, found = NearestNeighbors(n_neighbors=6).fit(places).kneighbors(places)
    assert (group[found] == group[:, None]).all()


def test_the_same_features_have_the_same_map() -> None:
    features = torch.randn(30, 70)
    first = pooled_map(features)
    np.testing.assert_array_equal(first, pooled_map(features))
    assert not np.array_equal(first, pooled_map(features.flip(1).abs()))


@pytest.mark.parametrize("number", [1, 2, 4, 5, 7])
@pytest.mark.parametrize("width", [1, 3])
def test_a_map_of_few_features(number: int, width: int) -> None:
    places = pooled_map(torch.randn(number, width))
    assert places.shape == (number, 2)
    assert np.isfinite(places).all()
    assert np.isfinite(pooled_map(torch.ones(number, width))).all()  # all in one place


def test_neighbours_by_hand() -> None:
    degrees = np.array([0, 10, 30, 90, 190])
    features = np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)
    features *= np.array([[1], [50], [0.1], [3], [1]])  # length does not matter
    assert nearest(features, [0, 3], 2).tolist() == [[1, 2], [2, 1]]
    assert nearest(features, [4], 9).tolist() == [[3, 2, 0, 1]]  # all there are
    assert nearest(features, [], 3).shape == (0, 3)


@settings(max_examples=20)
@given(number=st.integers(4, 30), seed=st.integers(0, 1000))
def test_neighbours_are_scikit_learns(number: int, seed: int) -> None:
    features = np.random.default_rng(seed).normal(size=(number, 5))
    of = np.arange(0, number, 3)
    _, expected = (
        NearestNeighbors(n_neighbors=3, metric="cosine").fit(features).kneighbors(features[of], 4)
    )
    np.testing.assert_array_equal(nearest(torch.from_numpy(features), of, 3), expected[:, 1:])


def test_equally_near_ones_come_in_order_and_none_is_its_own() -> None:
    assert nearest(np.ones((5, 3)), [2], 3).tolist() == [[0, 1, 3]]


def test_errors() -> None:
    with pytest.raises(PatchwordError, match=r"pass \[B, 6, D\], without the class token"):
        token_components(torch.randn(2, 7, 4), (2, 3))
    with pytest.raises(PatchwordError, match="NaN or Inf"):
        token_components(torch.full((2, 6, 4), math.nan), (2, 3))
    with pytest.raises(PatchwordError, match=r"pass \[n, D\]"):
        pooled_map(torch.randn(2, 3, 4))
    with pytest.raises(PatchwordError, match="NaN or Inf"):
        nearest(torch.full((2, 3), math.inf), [0])
