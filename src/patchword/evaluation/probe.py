"""Probes of frozen features: nearest neighbours, and logistic regression.

Arrays in, numbers out; all arithmetic is float64 on the features' device. Features are `[N, D]` of
any float dtype, labels int64 `[N]` in [0, classes). Linear probes give `weight [K, D]` and
`bias [K]` for raw features, with the standardisation folded in:
`logits = features @ weight.T + bias`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchword.evaluation.linear import (
    CHUNK,
    accuracy,
    check_labels,
    chunks,
    cross_entropy,
    fold,
    moments,
)
from patchword.spec.parse import PatchwordError

NEIGHBOURS = (10, 20)
GRID = tuple(10.0**power for power in (1, 0.5, 0, -0.5, -1, -1.5, -2, -2.5, -3, -4, -5))
"""Regularisers that `sweep_logistic` tries, strongest first."""
SWEEP_TOLERANCE = 1e-5
"""Gradient along each axis at which the fits of a sweep end; accuracies do not move below it."""


# Nearest neighbours -------------------------------------------------------------------------------


def knn(
    support: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    k: Sequence[int] = NEIGHBOURS,
    temperature: float = 0.07,
) -> dict[int, Tensor]:
    """k -> class int64 `[M]` of each query by its k nearest neighbours (DINO, arXiv 2104.14294).

    Each neighbour votes for its class with exp(cosine similarity / temperature); of equal sums the
    first class wins. With fewer than k images all of them vote.
    """
    known = torch.nn.functional.normalize(support.double(), dim=1)
    classes, most = int(labels.max()) + 1, min(max(k), len(support))
    found: dict[int, list[Tensor]] = {count: [] for count in k}
    for _, part in chunks(queries, max(1, min(CHUNK, (1 << 25) // len(support)))):
        similarity = torch.nn.functional.normalize(part, dim=1) @ known.T
        values, places = similarity.topk(most, dim=1)  # nearest first
        # the same factor for all votes of a query keeps exp in range
        votes = ((values - values[:, :1]) / temperature).exp()
        for count in k:
            sums = votes.new_zeros(len(part), classes)
            sums.scatter_add_(1, labels[places[:, :count]], votes[:, :count])
            found[count].append(sums.argmax(1))
    return {count: torch.cat(parts) for count, parts in found.items()}


# Logistic regression ------------------------------------------------------------------------------


def fit_logistic(
    features: Tensor, labels: Tensor, classes: int, l2: float
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression: `weight [K, D]` and `bias [K]` for raw features, float64.

    Minimises the mean cross-entropy + l2 / 2 |W|^2, where W are the weights for standardised
    features (less their mean, over their standard deviation + 1e-5); the biases are free. That is
    scikit-learn's C = 1 / (N l2). A class without images gets no weights and a bias that leaves it
    at most e^-10 of the most probable class. Solved by L-BFGS to a gradient of 1e-8 or what float64
    allows: probabilities are exact to 1e-5, to 5e-4 where l2 is 1e-4 and the optimum flat. Raises
    `PatchwordError` if there are no images, labels beyond the classes, or l2 is not above 0.
    """
    problem = _Logistic(features, labels, classes)
    return problem.fold(problem.solve(l2))


@dataclass(frozen=True, eq=False)
class Probe:
    """A logistic head whose regulariser was chosen on a development set."""

    weight: Tensor
    """float64 `[K, D]`, for raw features"""
    bias: Tensor
    """float64 `[K]`"""
    l2: float
    """the regulariser chosen"""
    accuracy: float
    """on the development set"""
    loss: float
    """mean cross-entropy there"""
    table: tuple[tuple[float, float, float], ...]
    """(l2, accuracy, loss) on the development set of all that were tried, strongest first"""


def sweep_logistic(
    features: Tensor,
    labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    classes: int,
    *,
    l2: Sequence[float] = GRID,
) -> Probe:
    """`fit_logistic` with the regulariser of `l2` that is best on the development set, by accuracy,
    then by loss.

    Each fit starts from the one before, strongest regulariser first. The path ends early where
    four in a row were no better than the best in accuracy and worse in loss.
    """
    check_labels(val_features, val_labels, classes)
    problem = _Logistic(features, labels, classes)
    table: list[tuple[float, float, float]] = []
    start: Tensor | None = None
    best, head, worse = (-1.0, -math.inf), problem.fold(problem.start()), 0
    for value in sorted(l2, reverse=True):
        start = problem.solve(value, start, SWEEP_TOLERANCE)
        weight, bias = problem.fold(start)
        share = accuracy(weight, bias, val_features, val_labels)
        loss = cross_entropy(weight, bias, val_features, val_labels)
        table.append((value, share, loss))
        worse = worse + 1 if share <= best[0] and loss > min(row[2] for row in table) else 0
        if (share, -loss) > best:
            best, head = (share, -loss), (weight, bias)
        if worse == 4:
            break
    chosen = max(table, key=lambda row: (row[1], -row[2]))
    return Probe(*head, *chosen, table=tuple(table))


class _Logistic:
    """Logistic regression on the principal axes of the standardised features.

    There the Gram matrix is diagonal, with values v, and the Hessian is at most v / 2 + l2 along
    each axis (Boehning 1992): steps measured in its square root make the problem round, whatever
    the features' correlations. Axes along which the features do not vary get no weight, and are
    left out. Parameters are `[C, R + 1]` for the C classes that have images and R axes, with the
    bias last.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int) -> None:
        check_labels(features, labels, classes)
        self.classes = classes
        counts = torch.bincount(labels, minlength=classes)
        self.present = counts.nonzero()[:, 0]
        place = torch.zeros_like(counts)
        place[self.present] = torch.arange(len(self.present), device=labels.device)
        self.labels = place[labels]
        self.share = counts[self.present].double() / len(labels)
        self.mean, self.std = moments(features)
        self.axes, self.values = _principal_axes(features, self.mean, self.std)
        parts = [((x - self.mean) / self.std) @ self.axes for _, x in chunks(features)]
        self.inputs = torch.cat(parts)  # [N, R]

    def start(self) -> Tensor:
        """No weights, and the classes' shares as biases."""
        parameters = self.mean.new_zeros(len(self.present), len(self.values) + 1)
        parameters[:, -1] = self.share.log()
        return parameters

    def solve(self, l2: float, start: Tensor | None = None, tolerance: float = 1e-8) -> Tensor:
        """The optimum `[C, R + 1]` for one regulariser, to a gradient of `tolerance` along each
        axis."""
        if not l2 > 0:
            raise PatchwordError(f"l2 is {l2}; logistic regression needs one above 0")
        one = self.values.new_ones(1)
        scale = torch.cat([self.values / 2 + l2, one / 2]).rsqrt()
        scaled = ((self.start() if start is None else start) / scale).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [scaled],
            max_iter=500,
            history_size=20,
            tolerance_grad=tolerance,
            tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            loss, gradient = self._loss(scaled.detach() * scale, l2)
            scaled.grad = gradient * scale
            return loss

        optimizer.step(closure)
        return scaled.detach() * scale

    def _loss(self, parameters: Tensor, l2: float) -> tuple[Tensor, Tensor]:
        """The objective and its gradient."""
        weight, bias = parameters[:, :-1], parameters[:, -1]
        gradient = torch.zeros_like(parameters)
        total = parameters.new_zeros(())
        for rows, part in chunks(self.inputs):
            logs = torch.addmm(bias, part, weight.T).log_softmax(1)
            target = self.labels[rows, None]
            total -= logs.gather(1, target).sum()
            residual = logs.exp_().scatter_add_(1, target, -torch.ones_like(target).double())
            gradient[:, :-1].addmm_(residual.T, part)
            gradient[:, -1] += residual.sum(0)
        gradient /= len(self.labels)
        gradient[:, :-1] += l2 * weight
        return total / len(self.labels) + l2 / 2 * weight.square().sum(), gradient

    def fold(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of all classes for raw features."""
        parameters = parameters - parameters.mean(0)
        weight = self.mean.new_zeros(self.classes, len(self.mean))
        weight[self.present] = parameters[:, :-1] @ self.axes.T
        # The logits of the classes present sum to 0, so the highest is 0 or more.
        bias = torch.full_like(weight[:, 0], -10.0)
        bias[self.present] = parameters[:, -1]
        return fold(weight, bias, self.mean, self.std)


def _principal_axes(features: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Axes `[D, R]` along which standardised features vary, and their variances `[R]`."""
    size = features.shape[1]
    gram = mean.new_zeros(size, size)
    for _, part in chunks(features):
        part = (part - mean) / std
        gram.addmm_(part.T, part)
    values, axes = torch.linalg.eigh(gram / len(features))
    kept = values > 1e-12 * max(1.0, float(values[-1]))
    return axes[:, kept].contiguous(), values[kept]
