"""`patchword predict`: the classes of images."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Unpack

from patchword.models.model import Model
from patchword.session.session import Images, Prediction, Running, Session
from patchword.spec.model import CalibrationSpec
from patchword.spec.parse import UsageError

logger = logging.getLogger("patchword")


def predict(
    model: str | Path | Model,
    images: Images,
    *,
    top: int = 5,
    abstain: float | None = None,
    bad: dict[str, str] | None = None,
    **loading: Unpack[Running],
) -> list[Prediction]:
    """Classify image files, folders (searched through) and glob patterns, in order.

    Files that are missing or cannot be read are left out; `bad`, if given, receives path -> reason.
    Images whose top probability is below `abstain`, in (0, 1], get no label; the log then says
    which coverage and accuracy to expect, as measured when the model was calibrated. `model` and
    `loading` are those of `Session`, which spares loading it again for more images. Raises
    `PatchwordError` if the model is missing or damaged, and if no image is found or none can be
    read; `UsageError` if `abstain` is out of range.
    """
    if abstain is not None and not 0 < abstain <= 1:
        raise UsageError(f"abstain is {abstain:g}; give a probability above 0, at most 1")
    session = Session(model, **loading)
    if abstain is not None:
        logger.info("%s", expectation(session.classifier.calibration, abstain))
    found = list(session.predict(images, top=top, abstain=abstain))
    if bad is not None:
        bad |= session.bad
    return found


def expectation(measured: CalibrationSpec | None, abstain: float) -> str:
    """What is to be expected of a model that leaves out images it is less sure of, in words."""
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
