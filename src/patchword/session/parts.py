"""Which images of a source are looked at: as the data divide themselves, or as a run did."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from patchword.data.sources import Source
from patchword.data.splits import FILE as SPLITS
from patchword.data.splits import NoDivision, load_division

logger = logging.getLogger("patchword")


def run_of(path: Path) -> Path | None:
    """The run directory that a path to weights lies in, if any."""
    if not path.exists():
        return None
    absolute = path.absolute()
    return next((p for p in (absolute, *absolute.parents[:3]) if (p / SPLITS).is_file()), None)


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
