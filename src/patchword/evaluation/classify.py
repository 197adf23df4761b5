"""Classification figures: accuracy, loss, calibration and per-class counts, online and offline.

Every quantity is computed per image in float64 on the CPU and summed once at the end, so the
figures do not depend on the batch size, and padding and unreadable images (mask False) count
nowhere. Equal logits rank in the order of their class index.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchword.spec.batch import Batch, Forward
from patchword.spec.parse import PatchwordError

BINS = 15
"""Equal-width bins of the expected calibration error (Guo et al. 2017)."""
SCALARS = ("n", "top1", "top5", "balanced", "loss", "ece", "brier")
CHUNK = 4096
"""Images of collected logits that are measured at a time."""


@dataclass(frozen=True, eq=False)
class Classification:
    """One evaluation of a classifier. Accuracies, recalls and precisions are fractions."""

    n: int
    """images measured"""
    top1: float
    top5: float
    """the true class is among the min(5, K) highest logits"""
    balanced: float
    """balanced accuracy: the mean recall of the classes that occur"""
    loss: float
    """mean per image, at the model's temperature: the negative log-likelihood (softmax
    cross-entropy), or for sigmoid models the binary cross-entropy summed over the classes"""
    ece: float
    """expected calibration error of the top-1 probability, 15 equal-width bins"""
    brier: float
    """multi-class Brier score: mean per image of the squared distance between the probabilities and
    the true class's one-hot vector; 0 to 2 for softmax models (Brier 1950)"""
    per_class: dict[str, dict[str, Any]]
    """class name -> n, recall (None where n is 0), precision (None where never predicted)"""
    skipped: int
    """images that could not be read"""
    labels: NDArray[np.int64]
    """`[n]`, true class, as the model numbers the classes"""
    predicted: NDArray[np.int64]
    """`[n]`"""
    confidence: NDArray[np.float32]
    """`[n]`, probability of the predicted class"""
    indices: NDArray[np.int64]
    """`[n]`, positions in the source"""
    bad: tuple[tuple[int, str], ...] = ()
    """(position in the source, reason) of the images skipped"""

    def confusion(self) -> NDArray[np.int64]:
        """int64 `[K, K]`: images of the true class (row) given the predicted class (column)."""
        size = len(self.per_class)
        counts = np.bincount(self.labels * size + self.predicted, minlength=size * size)
        return counts.reshape(size, size).astype(np.int64)

    def reliability(
        self,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """Reliability diagram over `BINS` equal-width bins of the confidence.

        Returns bin edges `[BINS + 1]`, and per bin the accuracy, the mean confidence (both NaN
        where the bin is empty) and the number of images. A bin holds its upper edge.
        """
        return _reliability(self.labels == self.predicted, self.confidence)

    def mistakes(self, count: int) -> NDArray[np.int64]:
        """Positions in `labels`, `predicted`, ... of the most confident mistakes, worst first."""
        wrong = np.flatnonzero(self.labels != self.predicted)
        order = np.lexsort((self.indices[wrong], -self.confidence[wrong]))
        return wrong[order[:count]].astype(np.int64)

    def scalars(self) -> dict[str, float]:
        """n, top1, top5, balanced, loss, ece and brier."""
        return {name: getattr(self, name) for name in SCALARS}

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `patchword evaluate --json`: the scalars, per_class and skipped."""
        return {**self.scalars(), "per_class": self.per_class, "skipped": self.skipped}


@dataclass(frozen=True)
class Scores:
    """What a model said of images, masked ones left out: enough for every figure."""

    logits: Tensor
    """float32 `[n, K]`"""
    labels: Tensor
    """int64 `[n]`, as the model numbers the classes"""
    indices: Tensor
    """int64 `[n]`, positions in the source"""
    bad: tuple[tuple[int, str], ...] = ()
    """(position in the source, reason) of the images skipped"""


class Classify:
    """Evaluator of a classifier on a fixed set of batches; implements `Evaluator`.

    `batches` starts a fresh pass over the data. `classes` names the model's K classes in the order
    of its logits. `prepare` turns uint8 images `[B, C, H, W]` into the model's float input, on its
    device. `label_map[data class]` is the model's class; without it the two number alike.
    `data_classes` names the data's classes in errors. `loss` is the loss the model was trained
    with: it decides the loss reported and what a probability is, softmax, or for sigmoid models
    the sigmoid of the class's own logit, both of the logits divided by `temperature`.

    Raises `PatchwordError` if `label_map` holds -1: the model does not know the class.
    """

    def __init__(
        self,
        batches: Callable[[], Iterable[Batch]],
        classes: Sequence[str],
        prepare: Callable[[Tensor], Tensor],
        label_map: Sequence[int] | None = None,
        loss: Literal["softmax", "sigmoid"] = "softmax",
        data_classes: Sequence[str] | None = None,
        temperature: float = 1.0,
    ) -> None:
        self._batches = batches
        self._classes = unique_names(classes)
        self._prepare = prepare
        self._loss = loss
        self._temperature = temperature
        self._label_map = None
        if label_map is not None:
            _check_map(label_map, self._classes, data_classes)
            self._label_map = torch.tensor(label_map, dtype=torch.int64)

    def __call__(self, forward: Forward) -> dict[str, float]:
        """The scalars of `Classification`, for the training log."""
        return self.measure(forward).scalars()

    def measure(
        self, forward: Forward, progress: Callable[[int], None] | None = None
    ) -> Classification:
        """Evaluate `forward` (the caller puts the model into evaluation mode).

        `progress` is called after each batch with the number of images measured so far. Raises
        `PatchwordError` where a logit is not finite, where no image could be read, and where a
        label or the number of logits does not fit the classes.
        """
        parts: list[dict[str, Tensor]] = []
        bad = self._each(
            forward, lambda part: parts.append(self._measured(part, self._temperature)), progress
        )
        return self._summarise(parts, bad)

    def collect(self, forward: Forward, progress: Callable[[int], None] | None = None) -> Scores:
        """The logits of all images, to be measured at several temperatures: `[n, K]` in float32 is
        what they take. Takes and raises what `measure` does."""
        parts: list[Scores] = []
        bad = self._each(forward, parts.append, progress)
        return Scores(
            logits=torch.cat([part.logits for part in parts]),
            labels=torch.cat([part.labels for part in parts]),
            indices=torch.cat([part.indices for part in parts]),
            bad=tuple(sorted(bad.items())),
        )

    def at(self, scores: Scores, temperature: float) -> Classification:
        """The figures of collected logits at a temperature; equal to those of `measure` at it."""
        tensors = (scores.logits, scores.labels, scores.indices)
        chunks = zip(*(tensor.split(CHUNK) for tensor in tensors), strict=True)
        parts = [self._measured(Scores(*chunk), temperature) for chunk in chunks]
        return self._summarise(parts, dict(scores.bad))

    def _each(
        self,
        forward: Forward,
        take: Callable[[Scores], None],
        progress: Callable[[int], None] | None,
    ) -> dict[int, str]:
        """Give `take` the logits of each batch. Returns what could not be read, with the reason."""
        bad: dict[int, str] = {}
        done = 0
        with torch.inference_mode():
            for batch in self._batches():
                bad.update(batch.bad)
                keep = batch.mask.cpu()
                if keep.any():
                    logits = forward(self._prepare(batch.images)).float().cpu()
                    take(self._checked(logits, batch, keep))
                done += int(keep.sum())
                if progress is not None:
                    progress(done)
        if not done:
            reason = f"none of the {len(bad)} images could be read" if bad else "there are none"
            raise PatchwordError(f"no image to evaluate: {reason}; check the path and the split")
        return bad

    def _checked(self, logits: Tensor, batch: Batch, keep: Tensor) -> Scores:
        if logits.shape != (len(keep), len(self._classes)):
            raise PatchwordError(
                f"the model returned logits of shape {list(logits.shape)} for {len(keep)} images "
                f"and {len(self._classes)} class names; load the classes.json of this model"
            )
        logits = logits[keep]
        labels = self._map(batch.labels.cpu()[keep])
        indices = batch.indices.cpu()[keep]
        finite = logits.isfinite().all(dim=1)
        if not finite.all():
            raise PatchwordError(
                f"the model's output for image {int(indices[~finite][0])} is not finite; use "
                "--precision float32, or an earlier checkpoint"
            )
        return Scores(logits, labels, indices)

    def _measured(self, scores: Scores, temperature: float) -> dict[str, Tensor]:
        """Per-image quantities of one batch, all `[n]`."""
        logits, labels = scores.logits.double(), scores.labels
        # numpy's argmax takes the first of equal values on every platform
        predicted = torch.from_numpy(logits.numpy().argmax(axis=1))
        target = logits.gather(1, labels[:, None])  # [n, 1]
        earlier = torch.arange(logits.shape[1]) < labels[:, None]
        rank = ((logits > target) | ((logits == target) & earlier)).sum(dim=1)
        scaled = logits / temperature
        if self._loss == "softmax":
            normaliser, probability = scaled.logsumexp(dim=1), scaled.softmax(dim=1)
        else:
            normaliser, probability = _softplus(scaled).sum(dim=1), scaled.sigmoid()
        wanted = torch.zeros_like(probability).scatter_(1, labels[:, None], 1.0)
        return {
            "labels": labels,
            "predicted": predicted,
            "confidence": probability.gather(1, predicted[:, None])[:, 0].float(),
            "loss": normaliser - scaled.gather(1, labels[:, None])[:, 0],
            "brier": (probability - wanted).square().sum(dim=1),
            "rank": rank,
            "indices": scores.indices,
        }

    def _map(self, labels: Tensor) -> Tensor:
        count = len(self._classes) if self._label_map is None else len(self._label_map)
        outside = (labels < 0) | (labels >= count)
        if outside.any():
            raise PatchwordError(
                f"label {int(labels[outside][0])} is not one of the {count} classes; match the "
                "data's class names with the model's"
            )
        return labels if self._label_map is None else self._label_map[labels]

    def _summarise(self, parts: list[dict[str, Tensor]], bad: dict[int, str]) -> Classification:
        columns = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
        labels, predicted, confidence, loss, brier, rank, indices = columns.values()
        n = len(labels)
        per_class = _per_class(self._classes, labels, predicted)
        recalls = [row["recall"] for row in per_class.values() if row["n"]]
        return Classification(
            n=n,
            top1=int((rank == 0).sum()) / n,
            top5=int((rank < 5).sum()) / n,
            balanced=math.fsum(recalls) / len(recalls),
            loss=math.fsum(loss) / n,
            ece=_calibration_error(labels == predicted, confidence),
            brier=math.fsum(brier) / n,
            per_class=per_class,
            skipped=len(bad),
            labels=labels,
            predicted=predicted,
            confidence=confidence,
            indices=indices,
            bad=tuple(sorted(bad.items())),
        )


def unique_names(classes: Sequence[str]) -> list[str]:
    """`classes`, with `" (index)"` after every name that occurs more than once."""
    counts = Counter(classes)
    return [f"{name} ({index})" if counts[name] > 1 else name for index, name in enumerate(classes)]


def _check_map(
    label_map: Sequence[int], classes: Sequence[str], data_classes: Sequence[str] | None
) -> None:
    unknown = [index for index, value in enumerate(label_map) if value < 0]
    if unknown:
        names = [repr(data_classes[i]) if data_classes else f"number {i}" for i in unknown[:3]]
        more = ", ..." if len(unknown) > 3 else ""
        raise PatchwordError(
            f"the model does not know {len(unknown)} of the data's {len(label_map)} classes: "
            f"{', '.join(names)}{more}; rename them to the model's names, give it other names "
            "with --classes, or fine-tune on this data"
        )
    beyond = [value for value in label_map if value >= len(classes)]
    if beyond:
        raise PatchwordError(
            f"label_map names class {beyond[0]}, but the model has {len(classes)} classes; build "
            "it with match_classes"
        )


def _softplus(logits: Tensor) -> Tensor:
    return logits.clamp(min=0) + logits.abs().neg().exp().log1p()


def _per_class(
    classes: Sequence[str], labels: NDArray[np.int64], predicted: NDArray[np.int64]
) -> dict[str, dict[str, Any]]:
    size = len(classes)
    actual = np.bincount(labels, minlength=size).tolist()
    given = np.bincount(predicted, minlength=size).tolist()
    right = np.bincount(labels[labels == predicted], minlength=size).tolist()
    return {
        name: {
            "n": actual[i],
            "recall": right[i] / actual[i] if actual[i] else None,
            "precision": right[i] / given[i] if given[i] else None,
        }
        for i, name in enumerate(classes)
    }


def _reliability(
    correct: NDArray[np.bool_], confidence: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    edges = np.linspace(0.0, 1.0, BINS + 1)
    place = np.clip(np.digitize(confidence, edges, right=True) - 1, 0, BINS - 1)
    count = np.bincount(place, minlength=BINS).astype(np.int64)
    with np.errstate(invalid="ignore"):
        accuracy = np.bincount(place, weights=correct, minlength=BINS) / count
        mean = np.bincount(place, weights=confidence.astype(np.float64), minlength=BINS) / count
    return edges, accuracy, mean, count


def _calibration_error(correct: NDArray[np.bool_], confidence: NDArray[np.float32]) -> float:
    _, accuracy, mean, count = _reliability(correct, confidence)
    filled = count > 0
    gaps = np.abs(accuracy - mean)[filled] * count[filled]
    return float(gaps.sum() / count.sum())
