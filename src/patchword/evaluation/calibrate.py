"""Calibration: how sure a model may be, and what leaving uncertain images out is worth.

Temperature scaling (Guo et al. 2017, arXiv 1706.04599, section 4.2): one number divides all logits.
It changes no label, only the probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from patchword.evaluation.classify import CHUNK
from patchword.spec.model import Loss

BOUNDS = (0.05, 20.0)
"""Temperatures stay within these: where every image is right the likelihood rises without end as
the temperature falls, and where the model is worse than chance as it rises."""
THRESHOLDS = (
    *(i / 100 for i in range(99)),
    *(0.99 + i / 1000 for i in range(10)),
    *(0.9995, 0.9999, 0.99999, 1.0),
)
"""Of the top probability, at which coverage and accuracy are stored, denser towards 1."""


def fit_temperature(logits: Tensor, labels: Tensor, probability: Loss = "softmax") -> float:
    """The temperature within `BOUNDS` that makes the labels most likely.

    `logits` are float `[n, K]`, `labels` int64 `[n]` in [0, K), n at least 1. The mean negative
    log-likelihood (`sigmoid`: the binary cross-entropy summed over the classes) is convex in
    1 / T; its slope is brought to zero in float64 by Newton's steps in log T, each within a bracket
    that halves where Newton would leave it, until log T moves less than 1e-10. Where no temperature
    matters, as with equal logits or a loss of 0 everywhere, the answer is 1.
    """
    low, high = (-math.log(bound) for bound in reversed(BOUNDS))  # of log 1 / T
    if _slope(logits, labels, probability, low)[0] >= 0:
        flat = _slope(logits, labels, probability, 0.0)[0] == 0
        return 1.0 if flat else BOUNDS[1]
    if _slope(logits, labels, probability, high)[0] <= 0:
        return BOUNDS[0]
    at = 0.0
    for _ in range(100):
        slope, curvature = _slope(logits, labels, probability, at)
        low, high = (at, high) if slope < 0 else (low, at)
        following = at - slope / curvature if curvature > 0 else math.inf
        if not low <= following <= high:
            following = (low + high) / 2
        if slope == 0 or abs(following - at) < 1e-10:
            break
        at = following
    return math.exp(-at)


def _slope(
    logits: Tensor, labels: Tensor, probability: Loss, log_inverse: float
) -> tuple[float, float]:
    """Slope of the mean loss by 1 / T where log 1 / T is `log_inverse`, and its own slope by
    log 1 / T."""
    inverse = math.exp(log_inverse)
    slopes: list[float] = []
    curvatures: list[float] = []
    for z, true in zip(logits.split(CHUNK), labels.split(CHUNK), strict=True):
        z = z.double()
        wanted = z.gather(1, true[:, None])  # [n, 1]
        if probability == "softmax":
            z = z - wanted
            p = (inverse * z).softmax(dim=1)
            mean = (p * z).sum(dim=1, keepdim=True)
            slope, curvature = mean, p * (z - mean).square()
        else:
            p = (inverse * z).sigmoid()
            slope, curvature = (p * z).sum(dim=1, keepdim=True) - wanted, p * (1 - p) * z.square()
        slopes += slope[:, 0].tolist()
        curvatures += curvature.sum(dim=1).tolist()
    n = len(slopes)
    return math.fsum(slopes) / n, inverse * math.fsum(curvatures) / n


def coverage_curve(
    confidence: NDArray[np.floating],
    correct: NDArray[np.bool_],
    thresholds: Sequence[float] = THRESHOLDS,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What is left when images below a threshold are left out, for each threshold, int64 counts.

    `confidence` `[n]` is the probability of the predicted class, `correct` `[n]` whether that is
    the true one. Returns the images kept, whose confidence is at least the threshold (coverage is
    this divided by n), and those of them that are right (accuracy is this divided by the first).
    """
    order = np.argsort(confidence, kind="stable")
    first = np.searchsorted(confidence[order], np.asarray(thresholds), side="left")
    right = np.concatenate([[0], np.cumsum(correct[order])])
    return (len(order) - first).astype(np.int64), (right[-1] - right[first]).astype(np.int64)
