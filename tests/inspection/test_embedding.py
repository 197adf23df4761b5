"""Embedding filters, similarity and structure of positions, what position rules induce:
scikit-learn, hand-made cases, laws."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from patchword.inspection.embedding import (
    embedding_filters,
    induced_bias,
    position_similarity,
    position_structure,
    position_vectors,
)
from patchword.inspection.recorder import attention_inputs, attention_layers
from patchword.models.mixer import Mixer
from patchword.models.position import Relative, sincos_2d
from patchword.models.vit import ViT
from patchword.spec.model import MixerSpec, Position
from patchword.spec.parse import PatchwordError

Make = Callable[..., ViT]


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


# Structure ---------------------------------------------------------------------------------------


def grid_pairs(rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps down and across between all patches, `[rows, cols, rows, cols]` each."""
    y, x, v, u = np.mgrid[:rows, :cols, :rows, :cols]
    return np.abs(y - v), np.abs(x - u)


def test_half_the_longest_distance_is_far() -> None:
    """Of three patches in a row the neighbours are just as far as that."""
    _, across = grid_pairs(1, 3)
    found = position_structure(1.0 - across)
    assert found.neighbour == 0
    assert found.far == pytest.approx((4 * 0 + 2 * -1) / 6)


def test_structure_of_rows_and_of_columns() -> None:
    down, across = grid_pairs(4, 6)
    rows = position_structure((down == 0).astype(float))
    assert (rows.row, rows.column) == (1, 0)
    assert rows.neighbour == pytest.approx(4 * 5 / (4 * 5 + 3 * 6))  # pairs across, of all
    columns = position_structure((across == 0).astype(float))
    assert (columns.row, columns.column) == (0, 1)
    both = position_structure(((down == 0) | (across == 0)) - 0.25)
    assert (both.row, both.column, both.neighbour) == (1, 1, 0.75)


@pytest.mark.parametrize("grid", [(14, 14), (7, 12)])
def test_similarity_that_depends_on_the_distance_alone_has_neither(grid: tuple[int, int]) -> None:
    distance = np.hypot(*grid_pairs(*grid))
    straight = position_structure(1 - distance / 20)  # linear: nothing is lost between distances
    assert straight.row == pytest.approx(0, abs=1e-12)
    assert straight.column == pytest.approx(0, abs=1e-12)
    assert straight.neighbour == pytest.approx(0.95)
    smooth = position_structure(np.exp(-((distance / 3) ** 2)))
    assert smooth.row == pytest.approx(0, abs=2e-3)
    assert smooth.column == pytest.approx(0, abs=2e-3)


def test_structure_falls_with_distance() -> None:
    distance = np.hypot(*grid_pairs(5, 5))
    found = position_structure((distance < 1.1) * 0.8 - (distance > math.hypot(4, 4) / 2 - 0.01))
    assert found.neighbour == pytest.approx(0.8)
    assert found.far == pytest.approx(-1)


@settings(max_examples=20)
@given(grid=st.tuples(st.integers(1, 5), st.integers(1, 5)), seed=st.integers(0, 1000))
def test_laws_of_structure(grid: tuple[int, int], seed: int) -> None:
    table = torch.randn(grid[0] * grid[1], 8, generator=torch.Generator().manual_seed(seed))
    similarity = position_similarity(table, grid)
    found = position_structure(similarity)
    turned = position_structure(similarity.transpose(1, 0, 3, 2))
    assert (turned.row, turned.column) == pytest.approx((found.column, found.row), nan_ok=True)
    assert (turned.neighbour, turned.far) == pytest.approx((found.neighbour, found.far))
    # a row of 3 has patches 2 apart; in 2 rows others are sqrt(2) and sqrt(5) apart
    assert (found.row is not None) == (grid[0] >= 2 and grid[1] >= 3)
    assert (found.neighbour is None) == (grid == (1, 1))


def test_structure_of_tables(random_vit: Make) -> None:
    def numbers(vectors: np.ndarray) -> dict[str, float]:
        return asdict(position_structure(position_similarity(vectors, (10, 10))))

    size = {"image_size": (40, 20), "patch_size": (4, 2)}
    vectors = position_vectors(random_vit(position="sincos2d", **size))
    assert vectors is not None
    fixed = numbers(vectors)
    assert fixed["row"] == pytest.approx(fixed["column"])
    assert fixed["neighbour"] > 0.9 > fixed["far"] + 0.1
    halves = position_vectors(random_vit(position="learned-2d", **size))
    assert halves is not None
    learned = numbers(halves)
    assert learned["row"] > 0.2  # half of the vector is the same
    assert learned["column"] > 0.2


@pytest.mark.parametrize("options", [{"registers": 2, "distillation": "token"}, {"pool": "gap"}])
def test_vectors_are_those_added_to_the_patches(
    options: dict[str, object], random_vit: Make
) -> None:
    model = random_vit(**options)
    vectors = position_vectors(model)
    images = torch.randn(2, 3, 12, 10)
    with torch.no_grad():
        added = model.embed(images)[:, model.spec.prefix :] - model.patch_embedding(images)
    assert vectors is not None
    assert vectors.shape == (15, 64)
    np.testing.assert_allclose(np.broadcast_to(vectors, (2, 15, 64)), added.numpy(), atol=1e-5)


def test_models_without_a_table(random_vit: Make) -> None:
    for position in ("none", "relative", "rotary"):
        assert position_vectors(random_vit(position=position)) is None
    mixer = MixerSpec(
        depth=1,
        width=8,
        tokens_mlp_width=8,
        channels_mlp_width=8,
        patch_size=(4, 4),
        image_size=(8, 8),
    )
    assert position_vectors(Mixer(mixer)) is None
    vectors = position_vectors(random_vit(position="sincos2d"))
    assert vectors is not None
    np.testing.assert_array_equal(vectors, sincos_2d((3, 5), 64)[0].double().numpy())


# Rules -------------------------------------------------------------------------------------------


def test_rotary_bias_is_what_equal_queries_and_keys_give(random_vit: Make) -> None:
    model = random_vit(position="rotary", registers=2)
    ones = torch.ones(1, 2, 18, 32)
    rule = model.positions[0]
    q, k, _ = rule(ones, ones)
    logits = (q @ k.transpose(-2, -1))[0, :, 3:, 3:] / 32
    found = induced_bias(model, 1, torch.randn(1, 3, 12, 10))
    assert found.shape == (2, 3, 5, 3, 5)
    np.testing.assert_allclose(found.reshape(2, 15, 15), logits.numpy(), atol=1e-6)
    np.testing.assert_allclose(found[0, 1, 2, 1, 2], 1, atol=1e-6)
    assert found.min() < 0.9


@pytest.mark.parametrize("layer", [0, 1])
def test_relative_bias_is_the_mean_over_queries(layer: int, random_vit: Make) -> None:
    model = random_vit(position="relative", position_at="every", registers=2, qk_norm=True)
    images = torch.randn(3, 3, 12, 10)
    attention, x, _ = list(attention_inputs(model, images))[layer]
    with torch.no_grad():
        q, *_ = attention.heads_of(x)
    rule = model.positions[layer]
    assert isinstance(rule, Relative)
    mean = q[:, :, 3:].mean((0, 2))  # [h, d]
    found = induced_bias(model, layer, images)
    assert found.shape == (2, 3, 5, 3, 5)
    for (i, j), (k, m) in [((0, 0), (2, 4)), ((1, 3), (1, 2)), ((2, 0), (0, 4))]:
        offset = (3 + i * 5 + j) - (3 + k * 5 + m)  # from key to query, among 18 tokens
        expected = mean @ rule.offsets[17 + offset].detach() / math.sqrt(32)
        np.testing.assert_allclose(found[:, i, j, k, m], expected.numpy(), atol=1e-5)


def test_relative_bias_of_a_query_that_is_always_the_same(random_vit: Make) -> None:
    model = random_vit(position="relative", qk_norm=True)
    with torch.no_grad():
        model.blocks[0].get_parameter("attention.qkv.weight")[:64] = 0
        for part in ("weight", "bias"):  # keys of zero: the logits are the bias alone
            model.blocks[0].get_parameter(f"attention.key_norm.{part}").zero_()
    images = torch.randn(2, 3, 12, 10)
    weights = next(iter(attention_layers(model, images)))[:, :, 1:, 1:].double()
    bias = torch.from_numpy(induced_bias(model, 0, images)).reshape(2, 15, 15)
    log = weights.log()
    torch.testing.assert_close(
        log - log[..., :1], (bias - bias[..., :1]).expand(2, 2, 15, 15), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("position", "layer"), [("learned-1d", 0), ("none", 0), ("relative", 1), ("rotary", 2)]
)
def test_layers_without_a_rule(position: Position, layer: int, random_vit: Make) -> None:
    model = random_vit(position=position)
    with pytest.raises(PatchwordError, match="no relative or rotary positions act in layer"):
        induced_bias(model, layer, torch.randn(1, 3, 12, 10))
