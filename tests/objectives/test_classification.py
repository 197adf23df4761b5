"""Losses against their formulas in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patchword.objectives.classification import classification_loss
from patchword.spec.train import OptimSpec


def plain(logits: np.ndarray, targets: np.ndarray, kind: str, smoothing: float) -> float:
    """Mean over the images, from shares `[B, K]`."""
    classes = logits.shape[1]
    targets = (1 - smoothing) * targets + smoothing / classes
    if kind == "softmax":
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return float(-(targets * log_p).sum(1).mean())
    p = 1 / (1 + np.exp(-logits))
    return float(-(targets * np.log(p) + (1 - targets) * np.log(1 - p)).sum(1).mean())


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@given(
    batch=st.integers(1, 5),
    classes=st.integers(2, 7),
    smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 99),
)
def test_losses_equal_their_formulas(
    kind: str, batch: int, classes: int, smoothing: float, seed: int
):
    """1e-9 relative in float64, for indices and for shares."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(batch, classes)) * 3
    labels = rng.integers(0, classes, batch)
    shares = rng.dirichlet(np.ones(classes), batch)
    optim = OptimSpec(loss="softmax" if kind == "softmax" else "sigmoid", label_smoothing=smoothing)
    outputs = torch.from_numpy(logits)
    hard = classification_loss(outputs, torch.from_numpy(labels), optim)
    soft = classification_loss(outputs, torch.from_numpy(shares), optim)
    assert hard.shape == ()
    assert hard.item() == pytest.approx(plain(logits, np.eye(classes)[labels], kind, smoothing))
    assert soft.item() == pytest.approx(plain(logits, shares, kind, smoothing))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_one_hot_shares_equal_indices_with_gradients(kind: str):
    optim = OptimSpec(loss="softmax" if kind == "softmax" else "sigmoid", label_smoothing=0.1)
    labels = torch.tensor([0, 3, 1])
    found: list[torch.Tensor] = []
    base = torch.randn(3, 4)
    for targets in (labels, torch.eye(4)[labels]):
        logits = base.clone().requires_grad_()
        classification_loss(logits, targets, optim).backward()
        assert logits.grad is not None
        found.append(logits.grad)
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_extreme_logits_stay_finite(kind: str):
    optim = OptimSpec(loss="softmax" if kind == "softmax" else "sigmoid")
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    assert classification_loss(logits, torch.tensor([1]), optim).isfinite()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_losses_are_sums_over_the_shares(kind: str, smoothing: float):
    """1e-9 relative: an image of class k counts weights[k] times, a mixed one by its shares."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 4)) * 3, rng.integers(0, 4, 6)
    shares, weights = rng.dirichlet(np.ones(4), 6), rng.uniform(0.1, 5, 4)
    optim = OptimSpec(loss="softmax" if kind == "softmax" else "sigmoid", label_smoothing=smoothing)

    def loss(targets: np.ndarray) -> float:
        outputs, scales = torch.from_numpy(logits), torch.from_numpy(weights)
        return classification_loss(outputs, torch.from_numpy(targets), optim, scales).item()

    def of(image: int, label: int) -> float:
        return plain(logits[image : image + 1], np.eye(4)[[label]], kind, smoothing)

    hard = np.mean([weights[labels[i]] * of(i, labels[i]) for i in range(6)])
    soft = np.mean([sum(shares[i, k] * weights[k] * of(i, k) for k in range(4)) for i in range(6)])
    assert loss(labels) == pytest.approx(float(hard), rel=1e-9)
    assert loss(shares) == pytest.approx(float(soft), rel=1e-9)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_equal_weights_change_nothing(kind: str):
    optim = OptimSpec(loss="softmax" if kind == "softmax" else "sigmoid", label_smoothing=0.1)
    logits, labels = torch.randn(5, 4, dtype=torch.float64), torch.randint(4, (5,))
    plainly = classification_loss(logits, labels, optim)
    torch.testing.assert_close(
        classification_loss(logits, labels, optim, torch.ones(4)), plainly, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_weighted_losses_of_extreme_logits_stay_finite(kind: str):
    optim = OptimSpec(loss="softmax" if kind == "softmax" else "sigmoid")
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    assert classification_loss(logits, torch.tensor([1]), optim, torch.rand(3)).isfinite()
