"""`patchword evaluate`: how good a classifier is on a data source."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from patchword.data.registry import open_source
from patchword.evaluation.classify import Classification
from patchword.models.model import Model
from patchword.session.session import Running, Session

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
    **loading: Unpack[Running],
) -> Evaluation:
    """Measure a model on a data source: accuracy, loss, calibration, per class.

    `model` and `loading` are those of `Session`. `split` is train, val, test or all; by default
    test, else val, else the part that the run held out, else all images. Labels match by class
    name; `classes` names those of a model that has no names, or others. Raises `PatchwordError` if
    the model is missing or damaged, or does not know the data's classes, or no image can be read.
    """
    session = Session(model, **loading)
    classifier, source = session.classifier, open_source(str(data))
    name, why, indices = session.part(source, split)
    evaluator = session.evaluator(source, indices, name)
    if classifier.calibration is not None:
        logger.info(
            "probabilities at temperature %.4g, measured on %s",
            *(classifier.temperature, classifier.calibration.measured_on),
        )
    return Evaluation(name, why, evaluator.measure(classifier.logits))
