"""Division of a source into train, val and test, and its record in a run directory."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from patchword.data.seeding import derived_seed
from patchword.data.sources import Source
from patchword.spec.data import DataSpec
from patchword.spec.parse import PatchwordError

logger = logging.getLogger("patchword")
FILE = "splits.json"
"""the record of a division in a run directory"""

Division = dict[str, np.ndarray]
"""train, val and test -> int64 positions in the source, rising; a part may be empty."""


class NoDivision(PatchwordError):
    """A saved division is not one of the data at hand."""

    def __init__(self, cause: str, advice: str) -> None:
        super().__init__(f"{cause}; {advice}")
        self.cause = cause


def divide(source: Source, *, val: float, test: float, seed: int) -> Division:
    """Complete parts: the source's own splits are kept, what is missing is held out of train.

    Without splits (or with nothing but train) all images are divided, with train and test `val` is
    a share of train, and train with val leaves test empty. Held-out images are stratified by class
    and drawn by `seed`; a class of two images or more keeps one for training. Fractions left at
    `DataSpec`'s defaults yield to the source's own.
    """
    usual = DataSpec()
    if source.default_fractions and (val, test) == (usual.val_fraction, usual.test_fraction):
        val, test = source.default_fractions
    given = {part: np.asarray(at, np.int64) for part, at in source.parts.items() if len(at)}
    empty = np.zeros(0, np.int64)
    if set(given) == {"train", "test"}:
        train, held = hold_out(source.labels, given["train"], [val], seed)
        return {"train": train, "val": held[0], "test": given["test"]}
    if set(given) - {"train"}:
        return {part: given.get(part, empty) for part in ("train", "val", "test")}
    everything = np.arange(len(source), dtype=np.int64)
    train, held = hold_out(source.labels, everything, [test, val], seed)
    return {"train": train, "val": held[1], "test": held[0]}


def hold_out(
    labels: np.ndarray, indices: np.ndarray, fractions: list[float], seed: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """What stays, and one part of `indices` for each of `fractions` of them; all rise. The parts
    are stratified by class and drawn by `seed`; a class of two images or more keeps one."""
    rng = np.random.default_rng(derived_seed(seed, "divide"))
    groups = [rng.permutation(indices[labels[indices] == k]) for k in np.unique(labels[indices])]
    counts = np.array([len(group) for group in groups], np.int64)
    room = np.maximum(counts - 1, 0)
    taken = np.zeros_like(counts)
    held: list[np.ndarray] = []
    for fraction in fractions:
        quota = _allocate(counts, room - taken, fraction, rng)
        chosen = [g[t : t + q] for g, t, q in zip(groups, taken, quota, strict=True)]
        held.append(np.sort(np.concatenate([indices[:0], *chosen])))
        taken += quota
    rest = [group[t:] for group, t in zip(groups, taken, strict=True)]
    return np.sort(np.concatenate([indices[:0], *rest])), held


def drawn(labels: np.ndarray, indices: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` of `indices`, all if there are no more, but one of each class at least; rising. They
    are stratified by class and drawn by `seed`."""
    if count >= len(indices):
        return indices
    return hold_out(labels, indices, [1 - count / len(indices)], seed)[0]


def _allocate(
    counts: np.ndarray, room: np.ndarray, fraction: float, rng: np.random.Generator
) -> np.ndarray:
    """Images to take of each class: `fraction` of all by largest remainders, at most `room`."""
    total = max(1, round(fraction * int(counts.sum()))) if fraction > 0 else 0
    total = min(total, int(room.sum()))
    ideal = counts * fraction
    quota = np.minimum(np.floor(ideal).astype(np.int64), room)
    order = np.lexsort((rng.random(len(counts)), np.floor(ideal) - ideal))
    while quota.sum() < total:
        for k in order:
            if quota.sum() < total and quota[k] < room[k]:
                quota[k] += 1
    return quota


def save_division(path: str | Path, source: Source, division: Division) -> None:
    """Write `division` as JSON: the source's fingerprint, and the keys of each part."""
    content: dict[str, Any] = {"fingerprint": source.fingerprint, "digests": source.digests}
    content |= {part: [source.keys[i] for i in indices] for part, indices in division.items()}
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=0)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_division(path: str | Path, source: Source) -> Division:
    """The division that `save_division` wrote. Raises `NoDivision` if the data have changed, or
    the file is damaged.

    One of an earlier version, which knows the sizes of files but not their contents, is told by its
    fingerprint and holds where names, labels, classes and sizes are the same; the log says so.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        saved = {part: list(content[part]) for part in ("train", "val", "test")}
        digests = dict(content["digests"])
        fingerprint = str(content["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NoDivision(
            f"{path} cannot be read as a division ({error})", "start a new run"
        ) from None
    position = {key: i for i, key in enumerate(source.keys)}
    old = "file sizes" in digests
    if fingerprint != (source.size_fingerprint if old else source.fingerprint):
        now = source.size_digests if old else source.digests
        changed = [what for what, digest in now.items() if digests.get(what) != digest]
        known = {key for keys in saved.values() for key in keys}
        gone, new = known - position.keys(), position.keys() - known
        details = [
            f"{len(some)} {word} (such as {min(some)})"
            for some, word in ((gone, "gone"), (new, "new"))
            if some
        ]
        how = ", ".join([f"{' and '.join(changed)} changed", *details])
        raise NoDivision(
            f"the data are not those of {path}: {how}", "restore them, or start a new run"
        )
    if old:
        logger.info(
            "%s is of an earlier version: its images are matched by name, label and size, not by "
            "their contents",
            path,
        )
    try:
        return {
            part: np.array(sorted(position[key] for key in keys), np.int64)
            for part, keys in saved.items()
        }
    except KeyError as error:
        raise NoDivision(
            f"{path} names {error}, which is not in the data", "start a new run"
        ) from None
