"""Balanced draws, weights and what is said of imbalance, by counting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchword.data.balance import balanced_order, class_weights, imbalance
from patchword.data.loader import Plan

sizes = st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any)


def data(counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Positions that are not 0 to N, and their classes."""
    labels = np.repeat(np.arange(len(counts)), counts)
    shuffled = np.random.default_rng(1).permutation(labels)
    return 7 + 3 * np.arange(len(labels)), shuffled


@given(counts=sizes, seed=st.integers(0, 5))
def test_an_epoch_has_all_classes_equally_often(counts: list[int], seed: int):
    indices, labels = data(counts)
    order = balanced_order(indices, labels, np.random.default_rng(seed))
    assert len(order) == len(indices)
    assert set(order) <= set(indices)
    classes = dict(zip(indices.tolist(), labels.tolist(), strict=True))
    present = [k for k, count in enumerate(counts) if count]
    drawn = np.bincount([classes[i] for i in order.tolist()], minlength=len(counts))[present]
    assert drawn.max() - drawn.min() <= 1
    for label in present:  # the images of a class as often as each other
        times = [int((order == i).sum()) for i in indices[labels == label]]
        assert max(times) - min(times) <= 1


def test_a_balanced_plan_is_a_function_of_seed_and_step():
    indices, labels = data([40, 5, 3])
    plans = [Plan(indices, 7, 3, labels=labels) for _ in range(2)]
    first = [plans[0](step) for step in range(20)]
    assert [plans[1](step) for step in reversed(range(20))] == first[::-1]
    assert first != [Plan(indices, 7, 4, labels=labels)(step) for step in range(20)]
    stream = [item for step in first for item in step]
    assert len(set(stream)) == len(stream)  # each with random numbers of its own
    size = len(indices)
    assert len({i for _, i in stream[:size]} | {i for _, i in stream[size : 2 * size]}) > 16 + 8


def test_ranks_share_a_balanced_step():
    indices, labels = data([9, 4, 1])
    ranks = [Plan(indices, 6, 0, rank, 3, labels) for rank in range(3)]
    whole = Plan(indices, 6, 0, labels=labels)
    for step in range(5):
        assert [item for plan in ranks for item in plan(step)] == whole(step)


@given(counts=sizes)
def test_weights_are_inverse_to_frequency_and_1_on_average(counts: list[int]):
    _, labels = data(counts)
    weights = class_weights(labels, len(counts))
    assert weights.dtype == np.float32
    assert weights[labels].mean() == pytest.approx(1, rel=1e-5)
    present = [k for k, count in enumerate(counts) if count]
    products = [weights[k] * counts[k] for k in present]
    np.testing.assert_allclose(products, products[0], rtol=1e-5)
    assert all(weights[k] == 1 for k in set(range(len(counts))) - set(present))


def test_imbalance_is_said_above_two():
    def of(*counts: int) -> str | None:
        return imbalance(data(list(counts))[1], ["ant", "bee", "cat", "dog"])

    assert of(10, 20, 15) is None  # dog has none
    assert of(10, 20, 15, 20) is None
    assert of(10, 21, 15) == "imbalance 2.1: 21 images of bee, 10 of ant"
    assert of(3000, 2, 5, 7) == "imbalance 1,500: 3,000 images of ant, 2 of bee"
