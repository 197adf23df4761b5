"""`patchword evaluate` and `patchword predict`."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from patchword.data.class_names import ClassNames
from patchword.data.loader import eval_batches
from patchword.data.sources import FileReader, Source, image_files, open_source
from patchword.data.splits import FILE as SPLITS
from patchword.data.splits import NoDivision, load_division
from patchword.data.transforms import EvalTransform, to_input
from patchword.evaluation.classify import Classification, Classify
from patchword.evaluation.matching import match_classes, match_positions
from patchword.models.model import Model
from patchword.session.device import Working, default_workers, resolve_device, resolve_precision
from patchword.session.features import eval_batch_size
from patchword.spec.batch import Batch
from patchword.spec.parse import PatchwordError, UsageError, nearest
from patchword.spec.train import Device, Precision
from patchword.weights.load import load_model

logger = logging.getLogger("patchword")


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and on what."""

    split: str
    """train, val, test or all"""
    why: str
    """where that part comes from"""
    classification: Classification


def evaluate(
    model: str | Path | Model,
    data: str | Path,
    *,
    split: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int | None = None,
    device: Device = "auto",
    precision: Precision = "float32",
    workers: int | None = None,
    trust_pickle: bool = False,
    classes: ClassNames | None = None,
    on_bad_image: Literal["skip", "fail"] = "skip",
    console: Console | None = None,
) -> Evaluation:
    """Measure a model on a data source: accuracy, loss, calibration, per class.

    `model` is what `load_model` takes, or a `Model`, which is moved to the device and
    left in evaluation mode. `split` is train, val, test or all; by default test, else val, else
    the part that the run held out, else all images. Labels match by class name; `classes` names
    those of a model that has no names, or others, as `load_model` takes them. Raises
    `PatchwordError` if the model is missing or damaged, or does not know the data's classes, or no
    image can be read.
    """
    run = None if isinstance(model, Model) else run_of(Path(model))
    net, forward, where = load_classifier(
        model, image_size, device, precision, trust_pickle, classes
    )
    source = open_source(str(data))
    name, why, indices = choose_part(source, run, split)
    label_map = match_labels(source, net)
    classify = part_classifier(
        net, source, indices, where, batch_size, workers, on_bad_image, label_map
    )
    if net.calibration is not None:
        logger.info(
            "probabilities at temperature %.4g, measured on %s",
            *(net.temperature, net.calibration.measured_on),
        )
    console = console or Console(stderr=True, markup=False, emoji=False)
    with console.status("") as status:
        result = classify.measure(
            forward, lambda done: status.update(f"{done:,}/{len(indices):,} images of {name}")
        )
    for index, reason in result.bad:
        logger.warning("skipped an unreadable image: %s: %s", source.location(index), reason)
    return Evaluation(name, why, result)


def match_labels(source: Source, net: Model) -> list[int]:
    """The model's class for each class of the data, -1 where it has none. Raises `PatchwordError`
    if they cannot be told."""
    if net.classes:
        return match_classes(source.classes, net.classes)
    return match_positions(source.classes, net.spec.num_classes)


def part_classifier(
    net: Model,
    source: Source,
    indices: np.ndarray,
    where: torch.device,
    batch_size: int | None,
    workers: int | None,
    on_bad_image: Literal["skip", "fail"],
    label_map: Sequence[int],
) -> Classify:
    """Measures `net`, at its own temperature, on the images at `indices` of a source; `label_map`
    is that of `match_labels`. Raises `PatchwordError` if `net` does not know the classes."""
    transform = EvalTransform(net.spec.image_size, net.spec.in_channels, net.preprocess)

    def batches() -> Iterator[Batch]:
        return eval_batches(
            source,
            indices,
            transform,
            batch_size=batch_size or eval_batch_size(net),
            workers=eval_workers(workers, len(indices)),
            on_bad=on_bad_image,
        )

    return Classify(
        batches,
        net.classes or tuple(str(i) for i in range(net.spec.num_classes)),
        lambda images: to_input(images.to(where), net.preprocess),
        label_map=label_map,
        loss=net.spec.probability,
        data_classes=source.classes,
        temperature=net.temperature,
    )


def load_net(
    model: str | Path | Model,
    image_size: int | tuple[int, int] | None,
    where: torch.device,
    trust_pickle: bool,
    classes: ClassNames | None,
) -> Model:
    """The model itself, loaded if only named, on the device and in evaluation mode."""
    if not isinstance(model, Model):
        return load_model(
            model,
            image_size=image_size,
            device=where,
            trust_pickle=trust_pickle,
            classes=classes,
        )
    for name, value in (("image_size", image_size), ("classes", classes)):
        if value is not None:
            raise UsageError(f"{name} is for weights to load, a model has its own; leave it out")
    return model.to(where).eval()


def load_classifier(
    model: str | Path | Model,
    image_size: int | tuple[int, int] | None,
    device: Device,
    precision: Precision,
    trust_pickle: bool,
    classes: ClassNames | None,
) -> tuple[Model, Working, torch.device]:
    """The model, the same as a function in the wanted precision, and where it runs."""
    where = resolve_device(device)
    net = load_net(model, image_size, where, trust_pickle, classes)
    if not net.spec.num_classes:
        raise PatchwordError(
            "the model has no head: it gives features, not classes; give one trained on classes"
        )
    return net, Working(net, resolve_precision(precision, where)), where


def eval_workers(asked: int | None, images: int) -> int:
    """Processes that read images, where the user may have named a number."""
    if asked is not None:
        return asked
    return default_workers() if images > 256 else 0


def run_of(path: Path) -> Path | None:
    """The run directory that a path to weights lies in, if any."""
    if not path.exists():
        return None
    absolute = path.absolute()
    return next((p for p in (absolute, *absolute.parents[:3]) if (p / SPLITS).is_file()), None)


def choose_part(source: Source, run: Path | None, split: str | None) -> tuple[str, str, np.ndarray]:
    """(name, where it comes from, positions) of the part to measure on.

    `split` None: test, else val, as the data divide themselves or the run divided them, else
    everything. Raises `UsageError` if a named part does not exist.
    """
    parts = known_parts(source, run)
    if split is None:
        split = next((name for name in ("test", "val") if name in parts), "all")
    parts["all"] = (np.arange(len(source), dtype=np.int64), "all images of the data")
    if split not in parts:
        raise UsageError(f"the data have no {split!r} part{nearest(split, parts)}")
    at, why = parts[split]
    return split, why, at


def known_parts(source: Source, run: Path | None) -> dict[str, tuple[np.ndarray, str]]:
    """The parts that have images, as the data divide themselves or the run divided them: name to
    (positions, where it comes from)."""
    parts = {name: (at, "given by the data") for name, at in source.parts.items() if len(at)}
    if run is not None:
        try:
            division = load_division(run / SPLITS, source)
        except NoDivision as error:
            logger.warning(
                "%s; images that %s was trained on may be among them", error.cause, run.name
            )
        else:
            for name, at in division.items():
                if len(at):
                    parts.setdefault(name, (at, f"held out by {run.name}"))
            if "train" in parts and len(division["train"]):
                parts["train"] = (division["train"], f"trained on by {run.name}")
    return parts


@dataclass(frozen=True)
class Prediction:
    """What a model says of an image."""

    path: str
    label: str | None
    """None where the model abstains"""
    probability: float
    """of the most probable class"""
    top: list[tuple[str, float]]
    """(label, probability), most probable first"""
    abstained: bool = False
    """the probability is below the threshold that was asked for"""

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `patchword predict --json`."""
        top = [{"label": label, "probability": p} for label, p in self.top]
        return vars(self) | {"top": top}


def predict(
    model: str | Path | Model,
    images: str | Path | Sequence[str | Path],
    *,
    top: int = 5,
    abstain: float | None = None,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int | None = None,
    device: Device = "auto",
    precision: Precision = "float32",
    workers: int | None = None,
    trust_pickle: bool = False,
    classes: ClassNames | None = None,
    bad: dict[str, str] | None = None,
) -> list[Prediction]:
    """Classify image files, folders (searched through) and glob patterns, in order.

    Files that are missing or cannot be read are left out; `bad`, if given, receives path -> reason.
    Images whose top probability is below `abstain`, in (0, 1], get no label; the log then says
    which coverage and accuracy to expect, as measured when the model was calibrated. Options and
    models are those of `evaluate`. Raises `PatchwordError` if the model is missing or damaged, and
    if no image is found or none can be read; `UsageError` if `abstain` is out of range.
    """
    if abstain is not None and not 0 < abstain <= 1:
        raise UsageError(f"abstain is {abstain:g}; give a probability above 0, at most 1")
    net, forward, where = load_classifier(
        model, image_size, device, precision, trust_pickle, classes
    )
    bad = {} if bad is None else bad
    paths = find_images([images] if isinstance(images, str | Path) else images, bad)
    source = image_source(paths)
    names = net.classes or tuple(str(i) for i in range(net.spec.num_classes))
    if abstain is not None:
        logger.info("%s", expectation(net, abstain))
    found: list[Prediction] = []
    with torch.inference_mode():
        for batch in eval_batches(
            source,
            np.arange(len(paths)),
            EvalTransform(net.spec.image_size, net.spec.in_channels, net.preprocess),
            batch_size=batch_size or eval_batch_size(net),
            workers=eval_workers(workers, len(paths)),
            on_bad="skip",
        ):
            for index, reason in batch.bad:
                logger.warning("cannot read %s: %s", paths[index], reason)
                bad[paths[index]] = reason
            logits = forward(to_input(batch.images.to(where), net.preprocess)).float().cpu()
            found += _predictions(net, logits, batch, paths, names, top, abstain)
    return found


def image_source(paths: Sequence[str]) -> Source:
    """Image files as a source without labels: all of one class without a name."""
    return Source(
        name="images",
        classes=("",),
        labels=np.zeros(len(paths), np.int64),
        keys=paths,
        sizes=np.zeros(len(paths), np.int64),
        reader=FileReader("", paths),
    )


def expectation(net: Model, abstain: float) -> str:
    """What is to be expected of a model that leaves out images it is less sure of, in words."""
    measured = net.calibration
    if measured is None:
        return (
            f"what to expect at {abstain:g} is not known: the model's probabilities were never "
            "checked; `patchword calibrate MODEL DATA` measures it"
        )
    coverage, accuracy = measured.expected(abstain)
    right = "no accuracy is known of so few"
    if accuracy is not None:
        right = f"{100 * accuracy:.1f} % of them right"
    return (
        f"to expect at {abstain:g}, by {measured.measured_on}: {100 * coverage:.1f} % of images "
        f"get a label, {right}"
    )


def _predictions(
    net: Model,
    logits: Tensor,
    batch: Batch,
    paths: Sequence[str],
    classes: Sequence[str],
    top: int,
    abstain: float | None,
) -> Iterator[Prediction]:
    order = logits.sort(dim=1, descending=True, stable=True).indices
    values = net.probabilities(logits).gather(1, order)
    for row in batch.mask.nonzero()[:, 0].tolist():
        best = [
            (str(classes[k]), float(p))
            for k, p in zip(order[row, :top].tolist(), values[row, :top].tolist(), strict=True)
        ]
        label, probability = best[0]
        unsure = abstain is not None and probability < abstain
        path = paths[int(batch.indices[row])]
        yield Prediction(path, None if unsure else label, probability, best, unsure)


def find_images(patterns: Iterable[str | Path], missing: dict[str, str]) -> list[str]:
    """The image files that paths, folders and glob patterns name, in that order, each once.

    What names nothing goes into `missing`, with the reason. Raises `PatchwordError` if nothing is
    found at all.
    """
    found: dict[str, None] = {}
    for pattern in map(str, patterns):
        there = os.path.exists(pattern)
        names = [pattern] if there else sorted(glob.glob(pattern, recursive=True))
        files = [file for name in names for file in _files(name)]
        if not files:
            missing[pattern] = "no images there" if names else "no such file"
            logger.warning("cannot read %s: %s", pattern, missing[pattern])
        found |= dict.fromkeys(files)
    if not found:
        first = next(iter(missing), None)
        where = "the list is empty" if first is None else f"no images at {first!r}"
        raise PatchwordError(f"{where}; give files, folders or a pattern")
    return list(found)


def _files(path: str) -> list[str]:
    """A file itself, or the image files below a folder."""
    if not os.path.isdir(path):
        return [path]
    return sorted(file for file, _ in image_files(path))
