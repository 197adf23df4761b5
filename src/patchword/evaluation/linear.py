"""What the linear probes share: rows in pieces, standardisation, and the figures of a head.

Features are `[N, D]` of any float dtype, labels int64 `[N]`; all arithmetic is float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from patchword.spec.parse import PatchwordError

EPSILON = 1e-5
"""Added to standard deviations (big_vision, evaluators/fewshot_lsr.py)."""
CHUNK = 8192
"""Rows that are worked on at a time."""


def accuracy(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor) -> float:
    """Share of the images whose true class has the highest logit of `features @ weight.T + bias`;
    of equal logits the first counts."""
    right = 0
    for rows, part in chunks(features):
        logits = torch.addmm(bias, part, weight.T)
        right += int((logits.argmax(1) == labels[rows]).sum())
    return right / len(labels)


def cross_entropy(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor) -> float:
    """Mean softmax cross-entropy of `features @ weight.T + bias`."""
    total = 0.0
    for rows, part in chunks(features):
        logits = torch.addmm(bias, part, weight.T)
        total += float(torch.nn.functional.cross_entropy(logits, labels[rows], reduction="sum"))
    return total / len(labels)


def chunks(features: Tensor, size: int = CHUNK) -> Iterator[tuple[slice, Tensor]]:
    """The rows in pieces, in float64."""
    for start in range(0, len(features), size):
        rows = slice(start, start + size)
        yield rows, features[rows].double()


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (with n) + 1e-5 of each feature, in two passes."""
    mean = features.new_zeros(features.shape[1], dtype=torch.float64)
    for _, part in chunks(features):
        mean += part.sum(0) / len(features)
    variance = torch.zeros_like(mean)
    for _, part in chunks(features):
        variance += (part - mean).square_().sum(0) / len(features)
    return mean, variance.sqrt() + EPSILON


def fold(weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and biases for standardised features as those for raw ones."""
    weight = weight / std
    return weight, bias - weight @ mean


def check_labels(features: Tensor, labels: Tensor, classes: int) -> None:
    if not len(features) or len(features) != len(labels):
        raise PatchwordError(
            f"{len(features)} images with {len(labels)} labels; a probe needs one label an image, "
            "and images to learn from"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise PatchwordError(
            f"labels from {int(labels.min())} to {int(labels.max())} do not fit {classes} classes"
        )
