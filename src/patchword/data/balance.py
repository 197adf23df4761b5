"""Classes of different sizes: how different, and what evens them out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WORTH_SAYING = 2.0
"""Imbalance above which a run says so."""


def balanced_order(indices: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An epoch in which all classes are equally frequent, to one image: as many positions as
    `indices` `[N]` has, of which those of a small class come several times and those of a large
    class in part, each about as often as the others of its class.

    `labels` `[N]` are the classes of `indices`; those without an image do not count.
    """
    classes = rng.permutation(np.unique(labels))
    quotas = np.full(len(classes), len(indices) // len(classes))
    quotas[: len(indices) % len(classes)] += 1
    drawn: list[np.ndarray] = []
    for label, quota in zip(classes, quotas.tolist(), strict=True):
        members = indices[labels == label]
        rounds = [rng.permutation(members) for _ in range(-(-quota // len(members)))]
        drawn.append(np.concatenate([members[:0], *rounds])[:quota])
    return rng.permutation(np.concatenate(drawn))


def class_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """float32 `[classes]`, inverse to how frequent each class is among `labels` `[N]`, on average 1
    over the images; 1 for a class without any."""
    counts = np.bincount(labels, minlength=classes)
    share = len(labels) / (counts > 0).sum()
    return np.where(counts > 0, share / np.maximum(counts, 1), 1.0).astype(np.float32)


def imbalance(labels: np.ndarray, names: Sequence[str]) -> str | None:
    """A line on how much the largest class exceeds the smallest that has images, None up to
    `WORTH_SAYING` times. `labels` `[N]` are positions in `names`."""
    counts = np.bincount(labels, minlength=len(names))
    large, small = int(counts.argmax()), int(np.where(counts > 0, counts, len(labels) + 1).argmin())
    ratio = counts[large] / counts[small]
    if ratio <= WORTH_SAYING:
        return None
    return (
        f"imbalance {ratio:,.{int(ratio < 10)}f}: {counts[large]:,} images of {names[large]}, "
        f"{counts[small]:,} of {names[small]}"
    )
