"""`patchword calibrate`: a temperature fitted on development images, and stored with the model."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np

from patchword.data.registry import open_source
from patchword.data.sources import Source
from patchword.data.splits import hold_out
from patchword.evaluation.calibrate import BOUNDS, THRESHOLDS, coverage_curve, fit_temperature
from patchword.evaluation.classify import Classification, Scores
from patchword.models.model import Model
from patchword.report.record import read_run
from patchword.run.folder import is_run, locked
from patchword.session.parts import known_parts, run_of
from patchword.session.session import Running, Session
from patchword.spec.model import CalibrationSpec, Loss
from patchword.spec.parse import PatchwordError, UsageError
from patchword.training.checkpoint import replace_file
from patchword.weights.files import SINGLE
from patchword.weights.load import WeightsFile, describe_weights
from patchword.weights.save import save_model

logger = logging.getLogger("patchword")
FEW_IMAGES = 100
"""Fewer say little of how sure a model may be."""


Role = Literal["fitted", "held out", "test"]
"""What images are for: the temperature is fitted on the first; `test` images only report."""


@dataclass(frozen=True)
class Measurement:
    """A part of the data, measured at temperature 1 and at the one that was fitted."""

    part: str
    role: Role
    why: str
    """where the part comes from"""
    before: Classification
    after: Classification

    def to_dict(self) -> dict[str, Any]:
        before, after = (
            {"loss": c.loss, "ece": c.ece, "brier": c.brier} for c in (self.before, self.after)
        )
        about = {"part": self.part, "role": self.role, "n": self.before.n}
        return about | {"top1": self.before.top1, "before": before, "after": after}


@dataclass(frozen=True)
class Calibrated:
    """What was found, and where it was stored."""

    calibration: CalibrationSpec
    parts: tuple[Measurement, ...]
    stored: Path | None

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `patchword calibrate --json`."""
        found = self.calibration
        rows = zip(found.thresholds, found.kept, found.right, strict=True)
        curve = [
            {"threshold": t, "coverage": kept / found.images, "accuracy": right / kept}
            for t, kept, right in rows
            if kept
        ]
        return {
            "temperature": found.temperature,
            "parts": [part.to_dict() for part in self.parts],
            "abstain": {"measured_on": found.measured_on, "n": found.images, "curve": curve},
            "stored": None if self.stored is None else str(self.stored),
        }


def calibrate_model(
    model: str | Path | Model,
    data: str | Path,
    *,
    split: str = "val",
    seed: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
    **loading: Unpack[Running],
) -> Calibrated:
    """Fit the temperature of a model's probabilities, measure before and after, and store it.

    `split` names the part to fit on, or is a share, `half/half` or `30/70`: so much of the
    validation images (of all, if the data have no parts), stratified and drawn by `seed`, fits, and
    the rest reports. Test images only report. The model is then written to `out` in patchword's
    format, or with `overwrite` and no `out` its own file is replaced: the best weights of a
    finished run, or a file of patchword's; with neither, nothing is stored. Of a `Model` that was
    passed in, `calibration` is set. `loading` is as in `Session`. Raises `UsageError` if the part
    does not exist or holds test images, and `PatchwordError` if the result cannot be stored where
    it is asked for, before any image is read.
    """
    given = None if isinstance(model, Model) else Path(model)
    place = _place(given, out, overwrite, loading)
    session = Session(model, **loading)
    source = open_source(str(data))
    temperature, parts = 1.0, []
    for images in _choose(source, session.run, split, seed):
        evaluator = session.evaluator(source, images.at, images.part)
        scores = evaluator.collect(session.classifier.logits)
        if images.role == "fitted":
            temperature = _temperature(scores, session.classifier.probability)
        before, after = evaluator.at(scores, 1.0), evaluator.at(scores, temperature)
        parts.append(Measurement(images.part, images.role, images.why, before, after))
    net = model if isinstance(model, Model) else session.net
    net.calibration = _calibration(temperature, parts)
    return Calibrated(net.calibration, tuple(parts), _store(net, place))


@dataclass(frozen=True)
class _Images:
    """Images to measure on."""

    part: str
    role: Role
    at: np.ndarray
    """positions in the source"""
    why: str
    """where the part comes from"""


def _choose(source: Source, run: Path | None, split: str, seed: int) -> list[_Images]:
    """The images to fit on, then the others."""
    parts, share = known_parts(source, run), _share(split)
    everything = (np.arange(len(source), dtype=np.int64), "all images of the data")
    name = split if share is None else "val" if "val" in parts else "all"
    if name == "test" or (name == "all" and "test" in parts):
        raise UsageError(
            "the temperature is not fitted on test images, which are there to say how good the "
            "model is; give validation images"
        )
    if name != "all" and name not in parts:
        raise UsageError(
            f"the data have no {name!r} part to fit on; --split half/half fits on one half of the "
            "images and reports on the other"
        )
    if name == "train" or (name == "all" and "train" in parts):
        logger.warning(
            "a model is surer of the images it was trained on: fitted on them, the temperature is "
            "too low; give validation images"
        )
    at, why = parts.get(name, everything)
    if share is None:
        chosen = [_Images(name, "fitted", at, why)]
    else:
        rest, (fitted,) = hold_out(source.labels, at, [share], seed)
        if not len(rest) or not len(fitted):
            raise UsageError(f"{len(at)} images of {name} cannot be divided {split}; give more")
        chosen = [
            _Images(f"{name}, {100 * share:.3g} %", "fitted", fitted, why),
            _Images(f"{name}, the rest", "held out", rest, why),
        ]
    if "test" in parts:
        chosen.append(_Images("test", "test", *parts["test"]))
    return chosen


def _share(split: str) -> float | None:
    """The share to fit on that `half/half` or `30/70` means; None for the name of a part."""
    if split == "half/half":
        return 0.5
    found = re.fullmatch(r"(\d+)/(\d+)", split)
    if found is None:
        return None
    fitted, rest = int(found[1]), int(found[2])
    if not fitted or not rest:
        raise UsageError(f"--split {split} leaves one side empty; use half/half, or 30/70")
    return fitted / (fitted + rest)


def _calibration(temperature: float, parts: list[Measurement]) -> CalibrationSpec:
    """With the curve of development images that did not set the temperature, if there are any."""
    shown = next((part for part in parts if part.role == "held out"), parts[0])
    result = shown.after
    kept, right = coverage_curve(result.confidence, result.labels == result.predicted)
    return CalibrationSpec(
        temperature=temperature,
        measured_on=f"{result.n:,} images ({shown.part})",
        images=result.n,
        thresholds=THRESHOLDS,
        kept=tuple(kept.tolist()),
        right=tuple(right.tolist()),
    )


def _temperature(scores: Scores, probability: Loss) -> float:
    """The one that fits best; 1 where every image is right, and its likelihood would have the model
    be sure of everything. The log says what is doubtful."""
    found, images = fit_temperature(scores.logits, scores.labels, probability), len(scores.labels)
    if found == BOUNDS[0]:
        logger.warning(
            "all %d images are right, which does not tell how unsure to be: the temperature stays "
            "1; use more images",
            images,
        )
        return 1.0
    if found == BOUNDS[1]:
        logger.warning(
            "the temperature is at its bound, %g: on these images the model is no better than "
            "chance",
            found,
        )
    elif images < FEW_IMAGES:
        logger.warning("%d images are few to fit a temperature on; expect it to be off", images)
    return found


@dataclass(frozen=True)
class _Place:
    """Where a calibrated model goes."""

    path: Path
    file: WeightsFile | None
    """of the model, whose notes in the header are kept"""
    run: Path | None = None
    """if `path` is the best weights of this run"""
    overwrite: bool = False


def _place(
    given: Path | None, out: str | Path | None, overwrite: bool, loading: Running
) -> _Place | None:
    """Where to store the result, None for nowhere. Raises `PatchwordError` if it must not be
    stored there."""
    trusted = loading.get("trust_pickle", False)
    file = None if given is None else describe_weights(given, trust_pickle=trusted)
    if out is not None:
        path = Path(out)
        if path.exists() and not overwrite:
            raise PatchwordError(f"{path} exists; pass --overwrite to replace it")
        run = run_of(path.parent)
        if run is not None and path.resolve().is_relative_to((run / "checkpoints").resolve()):
            raise PatchwordError(f"{path} is one of the checkpoints of {run}; choose another --out")
        return _Place(path, file, overwrite=overwrite)
    if not overwrite:
        return None
    if given is None or file is None or file.format != "patchword" or not given.exists():
        raise UsageError("only weights of patchword's own format can be replaced; give --out FILE")
    if loading.get("image_size") is not None:
        raise UsageError("--image-size makes another model; store it with --out FILE")
    run = run_of(given)
    if run is None:
        return _Place(file.path, file, overwrite=True)
    best = run / "best" / SINGLE
    if not is_run(run) or file.path.resolve() != best.resolve():
        raise UsageError(f"of {run} only the best weights can be replaced; give --out FILE")
    if not read_run(run).summary.get("finished"):
        raise PatchwordError(f"{run} is not finished; finish it first, or give --out FILE")
    return _Place(best.resolve(), file, run)


def _store(net: Model, place: _Place | None) -> Path | None:
    if place is None:
        return None
    extra = {} if place.file is None else place.file.extra
    if place.run is None:
        return save_model(net, place.path, overwrite=place.overwrite, **extra)
    with locked(place.run):
        replace_file(place.path, lambda path: save_model(net, path, overwrite=True, **extra))
    return place.run / "best" / SINGLE
