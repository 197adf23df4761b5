"""Temperatures against scipy's minimiser and known truths, coverage against a plain loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch.nn import functional

from patchword.evaluation.calibrate import (
    BOUNDS,
    THRESHOLDS,
    coverage_curve,
    fit_temperature,
)
from patchword.spec.model import CalibrationSpec
from patchword.spec.parse import UsageError


def likelihood(logits: torch.Tensor, labels: torch.Tensor, kind: str, temperature: float) -> float:
    """Mean negative log-likelihood by torch's own losses, float64."""
    scaled = logits.double() / temperature
    if kind == "softmax":
        return float(functional.cross_entropy(scaled, labels))
    wanted = functional.one_hot(labels, logits.shape[1]).double()
    each = functional.binary_cross_entropy_with_logits(scaled, wanted, reduction="none")
    return float(each.sum(1).mean())


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 120),
    classes=st.integers(2, 12),
    scale=st.floats(0.01, 50),
)
def test_no_temperature_is_more_likely(
    kind: Any, seed: int, n: int, classes: int, scale: float
) -> None:
    torch.manual_seed(seed)
    logits = scale * torch.randn(n, classes)
    labels = torch.randint(classes, (n,))
    found = fit_temperature(logits, labels, kind)
    assert BOUNDS[0] <= found <= BOUNDS[1]
    low, high = map(math.log, BOUNDS)
    best: Any = minimize_scalar(
        lambda t: likelihood(logits, labels, kind, math.exp(t)),
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-9},
    )
    ends = [likelihood(logits, labels, kind, bound) for bound in BOUNDS]
    least = min(best.fun, *ends)
    assert likelihood(logits, labels, kind, found) <= least + 1e-10 * max(1.0, abs(least))


@pytest.mark.parametrize("truth", [0.4, 1.0, 2.5])
def test_the_temperature_that_the_labels_were_drawn_at_is_found(truth: float) -> None:
    """20,000 labels drawn from softmax(logits / truth); 3 % is five times the deviation seen."""
    logits = 2 * torch.randn(20_000, 10)
    labels = torch.multinomial((logits / truth).softmax(1), 1)[:, 0]
    assert fit_temperature(logits, labels) == pytest.approx(truth, rel=0.03)


def test_scaling_the_logits_scales_the_temperature() -> None:
    logits, labels = torch.randn(300, 6), torch.randint(6, (300,))
    logits[torch.arange(300), labels] += 1
    once = fit_temperature(logits.double(), labels)
    assert fit_temperature(3 * logits.double(), labels) == pytest.approx(3 * once, rel=1e-8)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = 3 * torch.randn(101, 4), torch.randint(4, (101,))
    whole = fit_temperature(logits, labels)
    monkeypatch.setattr("patchword.evaluation.calibrate.CHUNK", 8)
    assert fit_temperature(logits, labels) == pytest.approx(whole, rel=1e-9)


def test_separable_and_hopeless_labels_end_at_the_bounds() -> None:
    logits = torch.randn(40, 5)
    best, worst = logits.argmax(1), logits.argmin(1)
    for kind in ("softmax", "sigmoid"):
        assert fit_temperature(logits, worst, kind) == BOUNDS[1]
    assert fit_temperature(logits, best) == BOUNDS[0]
    apart = torch.where(functional.one_hot(best, 5) > 0, 1.0, -1.0)
    assert fit_temperature(apart, best, "sigmoid") == BOUNDS[0]
    assert fit_temperature(torch.tensor([[1e30, -1e30]]), torch.tensor([1])) == BOUNDS[1]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_where_no_temperature_matters_it_is_one(kind: Any) -> None:
    assert fit_temperature(torch.zeros(9, 4), torch.arange(9) % 4, kind) == 1
    sure = torch.tensor([[1e30, -1e30]])  # the loss is 0 at every temperature
    assert fit_temperature(sure, torch.tensor([0]), kind) == 1


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 80))
def test_coverage_equals_a_plain_loop(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    confidence = rng.choice([0.0, 0.25, 0.5, 0.75, 1.0, *rng.random(3)], n)
    correct = rng.random(n) < confidence
    thresholds = (0.0, 0.25, 0.4, 0.75, 1.0)
    kept, right = coverage_curve(confidence, correct, thresholds)
    for k, threshold in enumerate(thresholds):
        sure = [i for i in range(n) if confidence[i] >= threshold]
        assert kept[k] == len(sure)
        assert right[k] == sum(bool(correct[i]) for i in sure)


def test_the_thresholds_hold_every_percent() -> None:
    assert {i / 100 for i in range(101)} <= set(THRESHOLDS)
    assert list(THRESHOLDS) == sorted(set(THRESHOLDS))


def spec(**changes: Any) -> CalibrationSpec:
    usual: dict[str, Any] = {
        "temperature": 1.5,
        "measured_on": "20 images",
        "images": 20,
        "thresholds": (0.0, 0.5, 0.9),
        "kept": (20, 10, 4),
        "right": (12, 8, 4),
    }
    return CalibrationSpec(**usual | changes)


def test_what_to_expect_at_a_threshold() -> None:
    found = spec()
    assert found.expected(0.5) == (0.5, 0.8)
    assert found.expected(0.9) == (0.2, 1.0)
    assert found.expected(0.99) == (0.2, 1.0)  # the last known
    coverage, accuracy = found.expected(0.7)  # between 10 of 20, 8 right, and 4 of 20, 4 right
    assert coverage == pytest.approx(7 / 20)
    assert accuracy == pytest.approx(6 / 7)
    assert spec(kept=(20, 10, 0), right=(12, 8, 0)).expected(0.95) == (0.0, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"images": 0, "kept": (0, 0, 0), "right": (0, 0, 0)},
        {"images": 19},
        {"kept": (20, 10)},
        {"kept": (20, 4, 10)},
        {"right": (12, 11, 4)},
        {"right": (12, 8, -1)},
        {"thresholds": (0.0, 0.9, 0.5)},
        {"thresholds": (0.1, 0.5, 0.9)},
        {"thresholds": (), "kept": (), "right": ()},
    ],
    ids=str,
)
def test_calibrations_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        spec(**changes)
