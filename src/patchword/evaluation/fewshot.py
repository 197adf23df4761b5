"""Few-shot accuracy by least squares in closed form (section 4.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchword.data.seeding import derived_seed
from patchword.evaluation.linear import accuracy, check_labels, chunks, fold, moments

L2, BIAS = 2.0**10, 100.0
"""Regulariser and constant feature, as in big_vision, evaluators/fewshot_lsr.py."""
SHOTS = (1, 5, 10, 25)


def fit_least_squares(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Regularised least squares to {-1, 1} targets in closed form (section 4.1): `weight [K, D]`
    and `bias [K]` for raw features, float64.

    As in the authors' public code (big_vision, evaluators/fewshot_lsr.py): features less their
    mean, over their standard deviation + 1e-5; a constant feature of value `BIAS`, whose weight is
    regularised like the others; minimises |XW - Y|^2 + `L2` |W|^2, sums over the images. Solved by
    Cholesky in the smaller of the primal (D + 1 unknowns a class) and the dual (N). Raises
    `PatchwordError` if there are no images, or labels beyond the classes.
    """
    check_labels(features, labels, classes)
    mean, std = moments(features)

    def extended(part: Tensor) -> Tensor:
        """Standardised, with the constant feature last."""
        return torch.nn.functional.pad((part - mean) / std, (0, 1), value=BIAS)

    solve = _primal if len(features) > features.shape[1] else _dual
    solution = solve(features, labels, classes, extended)
    return fold(solution[:, :-1], BIAS * solution[:, -1], mean, std)


Extend = Callable[[Tensor], Tensor]
"""Features to the rows of X."""


def _primal(features: Tensor, labels: Tensor, classes: int, extended: Extend) -> Tensor:
    """`[K, D + 1]` by (X'X + L2 I) W = X'Y. X is formed in pieces only."""
    size = features.shape[1] + 1
    gram = features.new_zeros(size, size, dtype=torch.float64)
    sums = features.new_zeros(classes, size, dtype=torch.float64)
    for rows, part in chunks(features):
        part = extended(part)
        gram.addmm_(part.T, part)
        sums.index_add_(0, labels[rows], part)
    gram.diagonal().add_(L2)
    targets = 2 * sums - sums.sum(0)  # X'Y of targets -1 and 1
    return torch.cholesky_solve(targets.T, torch.linalg.cholesky(gram)).T


def _dual(features: Tensor, labels: Tensor, classes: int, extended: Extend) -> Tensor:
    """`[K, D + 1]` by W = X' (XX' + L2 I)^-1 Y."""
    inputs = extended(features.double())
    gram = inputs @ inputs.T
    gram.diagonal().add_(L2)
    targets = 2 * torch.nn.functional.one_hot(labels, classes).double() - 1
    return torch.cholesky_solve(targets, torch.linalg.cholesky(gram)).T @ inputs


def few_shot(
    support: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, classes: int
) -> float:
    """Accuracy on `queries` of `fit_least_squares` on `support`."""
    weight, offset = fit_least_squares(support, labels, classes)
    return accuracy(weight, offset, queries, query_labels)


@dataclass(frozen=True)
class FewShot:
    """Few-shot accuracy for one number of images a class, as fractions."""

    mean: float
    std: float
    """over the seeds, with n - 1; 0 for one seed"""
    per_seed: tuple[float, ...]
    short: int
    """classes that have fewer images than asked for, and give all of theirs"""


def few_shot_accuracies(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    classes: int,
    *,
    shots: Sequence[int] = SHOTS,
    seeds: int = 3,
) -> dict[int, FewShot]:
    """shots -> accuracy of `few_shot` with that many images of each class as support.

    A seed orders the images of each class; the first of them are the support, so that more shots
    add to fewer, as in the authors' code.
    """
    numbers = labels.cpu().numpy()
    counts = np.bincount(numbers, minlength=classes)
    found: dict[int, list[float]] = {shot: [] for shot in shots}
    for seed in range(seeds):
        rng = np.random.default_rng(derived_seed(seed, "few-shot"))
        orders = [rng.permutation(np.flatnonzero(numbers == k)) for k in range(classes)]
        for shot in shots:
            chosen = torch.from_numpy(np.concatenate([order[:shot] for order in orders]))
            part = (features[chosen], labels[chosen])
            found[shot].append(few_shot(*part, queries, query_labels, classes))
    return {
        shot: FewShot(
            mean=float(np.mean(values)),
            std=float(np.std(values, ddof=1)) if seeds > 1 else 0.0,
            per_seed=tuple(values),
            short=int((counts < shot).sum()),
        )
        for shot, values in found.items()
    }
