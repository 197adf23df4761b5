"""How a model without labels comes along: the loss of its objective, and what its features are
worth to who has labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchword.data.seeding import derived_seed
from patchword.evaluation.probe import knn, sweep_logistic
from patchword.spec.batch import Batch, Forward
from patchword.spec.parse import PatchwordError

NEIGHBOURS = 10
L2 = 1e-2
"""Of the logistic regression: one value, since to choose it there are no other images."""

Passes = Callable[[], Iterable[Batch]]
"""Starts a fresh pass over some images."""


@dataclass(frozen=True)
class Labelled:
    """Images whose labels tell what features are worth."""

    support: Passes
    """those that probes learn from"""
    queries: Passes
    """those that they are measured on"""
    classes: int


class Representation:
    """Evaluator of a self-supervised network; implements `Evaluator`.

    `prepare` turns uint8 images `[B, C, H, W]` into the network's float input, on its device.
    `loss(forward, images)` is the objective's mean loss of such a batch. Its random draws are the
    same in every evaluation, by `seed`, and disturb no others.
    """

    def __init__(
        self,
        batches: Passes,
        prepare: Callable[[Tensor], Tensor],
        loss: Callable[[Forward, Tensor], Tensor],
        seed: int,
        labelled: Labelled | None = None,
    ) -> None:
        self._batches = batches
        self._prepare = prepare
        self._loss = loss
        self._seed = seed
        self._labelled = labelled

    def __call__(self, forward: Forward) -> dict[str, Any]:
        """`loss`, the mean over `n` images, and with labels top-1 of the frozen features in [0, 1]:
        `knn`, by the 10 nearest neighbours, and `linear`, by logistic regression. Raises
        `PatchwordError` where no image could be read."""
        total, count = 0.0, 0
        with torch.no_grad(), torch.random.fork_rng([]):
            for number, images, _ in _readable(self._batches):
                torch.manual_seed(derived_seed(self._seed, "evaluate", number))
                loss = self._loss(forward, self._prepare(images))
                total += float(loss) * len(images)
                count += len(images)
        if not count:
            raise PatchwordError("no image to evaluate could be read; check the path and the split")
        found = {"loss": total / count, "n": count}
        return found if self._labelled is None else found | self._probes(forward, self._labelled)

    def _probes(self, forward: Forward, given: Labelled) -> dict[str, float]:
        known, labels = self._features(forward, given.support)
        asked, wanted = self._features(forward, given.queries)
        said = knn(known, labels, asked, k=[NEIGHBOURS])[NEIGHBOURS]
        probe = sweep_logistic(known, labels, asked, wanted, given.classes, l2=[L2])
        return {"knn": float((said == wanted).double().mean()), "linear": probe.accuracy}

    @torch.no_grad()
    def _features(self, forward: Forward, batches: Passes) -> tuple[Tensor, Tensor]:
        """Features float32 `[N, D]` and labels int64 `[N]`, on the CPU."""
        rows: list[Tensor] = []
        labels: list[Tensor] = []
        for _, images, given in _readable(batches):
            rows.append(forward(self._prepare(images)).float().cpu())
            labels.append(given)
        return torch.cat(rows), torch.cat(labels)


def _readable(batches: Passes) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number, images and labels of each batch, without what could not be read."""
    for number, batch in enumerate(batches()):
        if batch.mask.any():
            yield number, batch.images[batch.mask], batch.labels[batch.mask]
