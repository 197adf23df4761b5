"""`patchword evaluate --probe`: what a model's features are worth, without training."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import numpy as np
import torch

from patchword.data.registry import open_source
from patchword.data.sources import Source
from patchword.data.splits import divide
from patchword.evaluation.fewshot import SHOTS, FewShot, few_shot_accuracies
from patchword.evaluation.linear import accuracy
from patchword.evaluation.probe import Probe, knn, sweep_logistic
from patchword.models.model import Model
from patchword.session.features import Features, Layer, known_layer
from patchword.session.parts import known_parts
from patchword.session.session import Running, Session
from patchword.spec.data import DataSpec
from patchword.spec.parse import PatchwordError, UsageError, nearest

logger = logging.getLogger("patchword")
ProbeName = Literal["fewshot", "knn", "logistic"]


@dataclass(frozen=True)
class Parts:
    """Positions in the source: what probes learn from, choose by, and are measured on."""

    train: np.ndarray
    """the support of few-shot and kNN"""
    development: np.ndarray
    """what the logistic probe's regulariser is chosen on; of `train` if the data have no other"""
    queries: np.ndarray
    split: str
    """val or test: the name of the queries"""
    why: str
    """where they come from"""


@dataclass(frozen=True)
class Probing:
    """The accuracies, as fractions, and what they were measured on. A probe that was not asked for
    is None."""

    layer: Layer
    """of which features: `pre-logits`, after the hidden layer of the model's head, or `pooled`"""
    split: str
    why: str
    support: int
    """images of the train part"""
    n: int
    """images measured on"""
    skipped: int
    """images that could not be read"""
    fewshot: dict[int, FewShot] | None
    """images a class -> accuracy"""
    knn: dict[int, float] | None
    """neighbours -> accuracy"""
    logistic: float | None
    logistic_probe: Probe | None
    """the logistic head itself"""

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `patchword evaluate --probe ... --json`."""
        found: dict[str, Any] = {}
        if self.fewshot is not None:
            found["fewshot"] = {
                str(shots): {"mean": row.mean, "std": row.std}
                for shots, row in self.fewshot.items()
            }
        if self.knn is not None:
            found["knn"] = {str(k): share for k, share in self.knn.items()}
        if self.logistic_probe is not None:
            chosen = self.logistic_probe
            found["logistic"] = {
                "top1": self.logistic,
                "l2": chosen.l2,
                "development_top1": chosen.accuracy,
            }
        about = {"layer": self.layer, "split": self.split, "n": self.n, "support": self.support}
        return found | about | {"skipped": self.skipped}


def measure_probes(
    model: str | Path | Model,
    data: str | Path,
    probes: Sequence[ProbeName] = get_args(ProbeName),
    *,
    layer: Layer = "pre-logits",
    split: str | None = None,
    shots: Sequence[int] = SHOTS,
    seeds: int = 3,
    seed: int = 0,
    cache: bool | Path = True,
    **loading: Unpack[Running],
) -> Probing:
    """Few-shot, kNN and logistic probes of a model's frozen features on a data source.

    A model whose head has a hidden layer is probed after it, where the authors' public code does
    (big_vision, common_fewshot: `pre_logits`), unless `layer` is `pooled`; it makes no difference
    to others. The probes learn from the train part and are measured on `split`: test by default,
    else val. The logistic probe's regulariser is chosen on the val part or, where that is measured
    on or missing, on a tenth of the train part. Data that have no parts are divided as `patchword
    train` divides them, by `seed`, or as the run did that the model lies in. `model`, with or
    without a head, and `loading` are those of `Session`; `cache` is as in `features.extract`.
    Raises `PatchwordError` if the model is missing or damaged, the data have no train part, or no
    image can be read, and `UsageError` if there is no part or layer of that name.
    """
    for name in probes:
        if name not in get_args(ProbeName):
            raise UsageError(f"unknown probe {name!r}{nearest(name, get_args(ProbeName))}")
    session = Session(model, **loading)
    source = open_source(str(data))
    parts = probe_parts(source, session.run, split, seed)

    def features(indices: np.ndarray, name: str) -> Features:
        return session.features(source, indices, name, layer=layer, cache=cache)

    found = {
        "train": features(parts.train, "train"),
        "queries": features(parts.queries, parts.split),
    }
    if "logistic" in probes and not np.isin(parts.development, parts.train).all():
        found["development"] = features(parts.development, "val")
    with session.console.status("fitting the probes"):
        return _measure(known_layer(session.net, layer), source, parts, found, probes, shots, seeds)


def _measure(
    layer: Layer,
    source: Source,
    parts: Parts,
    found: dict[str, Features],
    probes: Sequence[ProbeName],
    shots: Sequence[int],
    seeds: int,
) -> Probing:
    train, queries = found["train"], found["queries"]
    classes = len(source.classes)
    given = (train.pooled, train.labels, queries.pooled, queries.labels)
    fewshot = neighbours = chosen = share = None
    if "fewshot" in probes:
        fewshot = few_shot_accuracies(*given, classes, shots=shots, seeds=seeds)
        for count, row in fewshot.items():
            if row.short:
                logger.warning(
                    "%d of %d classes have fewer than %d images to learn from; they give all",
                    *(row.short, classes, count),
                )
    if "knn" in probes:
        said = knn(*given[:3])
        neighbours = {k: float((c == queries.labels).double().mean()) for k, c in said.items()}
    if "logistic" in probes:
        chosen = _logistic(train, found.get("development"), parts, classes)
        share = accuracy(chosen.weight, chosen.bias, queries.pooled, queries.labels)
    return Probing(
        layer=layer,
        split=parts.split,
        why=parts.why,
        support=len(train.labels),
        n=len(queries.labels),
        skipped=sum(features.skipped for features in found.values()),
        fewshot=fewshot,
        knn=neighbours,
        logistic=share,
        logistic_probe=chosen,
    )


def _logistic(train: Features, development: Features | None, parts: Parts, classes: int) -> Probe:
    """The probe, its regulariser chosen on the development part, which may be of `train`."""
    if development is not None:
        pair = (train.pooled, train.labels, development.pooled, development.labels)
    else:
        held = torch.isin(train.indices, torch.from_numpy(parts.development))
        if held.all() or not held.any():
            raise PatchwordError(
                "too few train images to choose the logistic probe's regulariser on some of them; "
                "give more, or leave out --probe logistic"
            )
        pair = (train.pooled[~held], train.labels[~held], train.pooled[held], train.labels[held])
    return sweep_logistic(*pair, classes)


def probe_parts(source: Source, run: Path | None, split: str | None, seed: int) -> Parts:
    """What to learn from and to measure on. Raises as `measure_probes` does."""
    if len(source.classes) < 2:
        raise PatchwordError(f"{source.name} has one class, there is nothing to tell apart")
    usual = DataSpec()
    fractions = {"val": usual.val_fraction, "test": usual.test_fraction}
    parts = known_parts(source, run)
    if not parts.keys() - {"train"}:
        divided = divide(source, **fractions, seed=seed)
        parts = {
            name: (at, f"held out of the data, seed {seed}")
            for name, at in divided.items()
            if len(at)
        }
    if "train" not in parts:
        raise PatchwordError(
            f"the data have no train part for a probe to learn from, only {', '.join(parts)}; "
            "give data with one"
        )
    known = [name for name in ("test", "val") if name in parts]
    if split is None and known:
        split = known[0]
    if split is None or split not in known:
        raise UsageError(
            f"a probe is measured on the test or the val part, and the data have no {split!r}"
            f"{nearest(str(split), known)}"
        )
    (train, _), (queries, why) = parts["train"], parts[split]
    if split == "test" and "val" in parts:
        development = parts["val"][0]
    else:
        rest = dataclasses.replace(source, parts={"train": train, "test": queries})
        development = divide(rest, **fractions, seed=seed)["val"]
    return Parts(train, development, queries, split, why)
