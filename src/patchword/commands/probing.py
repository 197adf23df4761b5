"""`patchword evaluate --probe`: what a model's features are worth, without training."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from rich.console import Console

from patchword.data.class_names import ClassNames
from patchword.data.loader import OnBad
from patchword.data.sources import Source, open_source
from patchword.data.splits import divide
from patchword.evaluation.fewshot import SHOTS, FewShot, few_shot_accuracies
from patchword.evaluation.linear import accuracy
from patchword.evaluation.probe import Probe, knn, sweep_logistic
from patchword.models.model import Model
from patchword.session.device import resolve_device, resolve_precision
from patchword.session.features import (
    Features,
    Layer,
    eval_batch_size,
    extract,
    known_layer,
)
from patchword.session.measuring import eval_workers, known_parts, load_net, run_of
from patchword.spec.data import DataSpec
from patchword.spec.parse import PatchwordError, UsageError, nearest
from patchword.spec.train import Device, Precision

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
    image_size: int | tuple[int, int] | None = None,
    batch_size: int | None = None,
    device: Device = "auto",
    precision: Precision = "float32",
    workers: int | None = None,
    trust_pickle: bool = False,
    classes: ClassNames | None = None,
    on_bad_image: OnBad = "skip",
    shots: Sequence[int] = SHOTS,
    seeds: int = 3,
    seed: int = 0,
    cache: bool | Path = True,
    console: Console | None = None,
) -> Probing:
    """Few-shot, kNN and logistic probes of a model's frozen features on a data source.

    A model whose head has a hidden layer is probed after it, where the authors' public code does
    (big_vision, common_fewshot: `pre_logits`), unless `layer` is `pooled`; it makes no difference
    to others. The probes learn from the train part and are measured on `split`: test by default,
    else val. The logistic probe's regulariser is chosen on the val part or, where that is measured
    on or missing, on a tenth of the train part. Data that have no parts are divided as `patchword
    train` divides them, by `seed`, or as the run did that the model lies in. `model`, with or
    without a head, and the other options are as in `evaluate`; `cache` as in `features.extract`.
    Raises `PatchwordError` if the model is missing or damaged, the data have no train part, or no
    image can be read, and `UsageError` if there is no part or layer of that name.
    """
    for name in probes:
        if name not in get_args(ProbeName):
            raise UsageError(f"unknown probe {name!r}{nearest(name, get_args(ProbeName))}")
    where = resolve_device(device)
    run = None if isinstance(model, Model) else run_of(Path(model))
    net = load_net(model, image_size, where, trust_pickle, classes)
    source = open_source(str(data))
    parts = probe_parts(source, run, split, seed)
    console = console or Console(stderr=True, markup=False, emoji=False)

    def features(indices: np.ndarray, name: str) -> Features:
        return part_features(
            net,
            source,
            indices,
            name,
            device=where,
            batch_size=batch_size,
            workers=workers,
            precision=resolve_precision(precision, where),
            layer=layer,
            cache=cache,
            on_bad=on_bad_image,
            console=console,
        )

    train, queries = features(parts.train, "train"), features(parts.queries, parts.split)
    development = None
    if "logistic" in probes and not np.isin(parts.development, parts.train).all():
        development = features(parts.development, "val")
    with console.status("fitting the probes"):
        return _measure(
            known_layer(net, layer),
            source,
            parts,
            train,
            queries,
            development,
            probes,
            shots,
            seeds,
        )


def part_features(
    net: Model,
    source: Source,
    indices: np.ndarray,
    name: str,
    *,
    device: torch.device,
    batch_size: int | None,
    workers: int | None,
    precision: torch.dtype,
    layer: Layer = "pooled",
    cache: bool | Path,
    on_bad: OnBad,
    console: Console,
) -> Features:
    """`extract` of the part called `name`, with progress on the console; unreadable images are
    logged."""
    start = time.perf_counter()
    with console.status("") as status:

        def progress(done: int, total: int) -> None:
            rate = done / (time.perf_counter() - start)
            status.update(f"features of {name}: {done:,}/{total:,} images, {rate:,.0f} a second")

        found = extract(
            net,
            source,
            indices,
            device=device,
            batch_size=batch_size or eval_batch_size(net),
            workers=eval_workers(workers, len(indices)),
            precision=str(precision).removeprefix("torch."),
            layer=layer,
            cache=cache,
            on_bad=on_bad,
            progress=progress,
        )
    for index, reason in found.bad:
        logger.warning("skipped an unreadable image: %s: %s", source.location(index), reason)
    return found


def _measure(
    layer: Layer,
    source: Source,
    parts: Parts,
    train: Features,
    queries: Features,
    development: Features | None,
    probes: Sequence[ProbeName],
    shots: Sequence[int],
    seeds: int,
) -> Probing:
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
        chosen = _logistic(train, development, parts, classes)
        share = accuracy(chosen.weight, chosen.bias, queries.pooled, queries.labels)
    return Probing(
        layer=layer,
        split=parts.split,
        why=parts.why,
        support=len(train.labels),
        n=len(queries.labels),
        skipped=train.skipped + queries.skipped + (development.skipped if development else 0),
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
