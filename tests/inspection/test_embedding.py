"""Embedding filters and position similarity: scikit-learn, hand-made cases, laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from patchword.inspection.embedding import embedding_filters, position_similarity
from patchword.parsing import PatchwordError


def test_filters_equal_scikit_learn_pca() -> None:
    weight = np.random.default_rng(0).normal(size=(64, 4 * 3 * 2)) * np.linspace(1, 3, 24)
    components, explained = embedding_filters(weight, (4, 3), 2, count=10)
    pca = PCA(10, svd_solver="full").fit(weight)
    assert components.shape == (10, 4, 3, 2)
    cosine = np.abs((components.reshape(10, -1) * np.asarray(pca.components_)).sum(1))
    np.testing.assert_allclose(cosine, 1, atol=1e-9)
    np.testing.assert_allclose(explained, pca.explained_variance_ratio_, atol=1e-9)


def test_a_planted_filter_comes_back_in_row_column_channel_order() -> None:
    planted = np.zeros((4, 5, 3))
    planted[1, 2, 0] = 3.0
    planted[3, 0, 2] = -4.0
    strength = np.random.default_rng(1).normal(size=(40, 1))
    components, explained = embedding_filters(torch.tensor(strength * planted.ravel()), (4, 5), 3)
    assert components.shape == (1, 4, 5, 3)  # the rank is one
    np.testing.assert_allclose(components[0], -planted / 5, atol=1e-12)  # largest entry positive
    np.testing.assert_allclose(explained, [1.0], atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(2, 20),
    patch=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    channels=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_filters_are_orthonormal_and_ordered(
    width: int, patch: tuple[int, int], channels: int, seed: int
) -> None:
    size = patch[0] * patch[1] * channels
    weight = torch.randn(width, size, generator=torch.Generator().manual_seed(seed))
    components, explained = embedding_filters(weight, patch, channels, count=100)
    assert len(components) == len(explained) == min(width - 1, size)
    flat = components.reshape(len(components), -1)
    np.testing.assert_allclose(flat @ flat.T, np.eye(len(flat)), atol=1e-9)
    assert (np.diff(explained) <= 1e-12).all()
    assert explained.sum() == pytest.approx(1)
    assert (flat[np.arange(len(flat)), np.abs(flat).argmax(1)] > 0).all()


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), cols=st.integers(1, 5), seed=st.integers(0, 1000))
def test_similarity_is_the_cosine_of_each_pair(rows: int, cols: int, seed: int) -> None:
    table = torch.randn(rows * cols, 6, generator=torch.Generator().manual_seed(seed))
    similarity = position_similarity(table, (rows, cols))
    assert similarity.shape == (rows, cols, rows, cols)
    i, j, k, m = rows - 1, 0, 0, cols - 1
    pair = torch.nn.functional.cosine_similarity(
        table[i * cols + j].double(), table[k * cols + m].double(), dim=0
    )
    assert similarity[i, j, k, m] == pytest.approx(float(pair), abs=1e-12)
    flat = similarity.reshape(rows * cols, rows * cols)
    np.testing.assert_allclose(np.diag(flat), 1, atol=1e-12)
    np.testing.assert_allclose(flat, flat.T, atol=1e-12)


def test_a_zero_embedding_is_similar_to_nothing() -> None:
    table = torch.randn(4, 3)
    table[2] = 0
    similarity = position_similarity(table, (2, 2)).reshape(4, 4)
    assert (similarity[2] == 0).all()
    assert similarity[1, 1] == pytest.approx(1)


def test_errors() -> None:
    with pytest.raises(PatchwordError, match=r"pass the weight as \[D, 48\]"):
        embedding_filters(torch.randn(8, 47), (4, 4), 3)
    with pytest.raises(PatchwordError, match="all patch-embedding filters are the same"):
        embedding_filters(torch.ones(8, 1) * torch.randn(1, 48), (4, 4), 3)
    with pytest.raises(PatchwordError, match="NaN or Inf"):
        embedding_filters(torch.full((8, 48), math.nan), (4, 4), 3)
    with pytest.raises(PatchwordError, match=r"pass \[9, D\], without the class token"):
        position_similarity(torch.randn(10, 4), (3, 3))
