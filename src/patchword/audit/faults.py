"""What is wrong with a data set: findings about its files, copies, classes and image forms."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from patchword.audit.copies import copies, near_copies, split_names
from patchword.audit.findings import Finding, Item, finding
from patchword.audit.forms import forms
from patchword.audit.hashing import NEAR_BITS
from patchword.audit.labels import likely_typos, same_spelling
from patchword.audit.scan import Scan
from patchword.data.balance import WORTH_SAYING
from patchword.data.files import class_folders, is_image, visible_files
from patchword.data.sources import Source

STRONG_IMBALANCE = 10.0
"""Largest to smallest class, from which on it is a warning."""


@dataclass(frozen=True)
class Beside:
    """What a source of class folders does not show."""

    empty: tuple[str, ...] = ()
    """class folders without an image file, relative to the root"""
    unread: tuple[str, ...] = ()
    """files in class folders whose suffix is no image's, and images outside of class folders"""


def look_beside(root: Path) -> Beside:
    """Empty class folders and unread files of a folder source."""
    empty: list[str] = []
    unread: list[str] = []
    folders = class_folders(root)
    for _, folder in folders:
        files = [(entry.path, is_image(entry.name)) for entry in visible_files(folder.path)]
        if not any(image for _, image in files):
            empty.append(folder.path)
        unread += [path for path, image in files if not image]
    parents = {root, *(Path(folder.path).parent for _, folder in folders)}
    for parent in parents:
        with os.scandir(parent) as entries:
            unread += [
                entry.path
                for entry in entries
                if entry.is_file() and not entry.name.startswith(".") and is_image(entry.name)
            ]
    return Beside(
        *(tuple(sorted(_relative(path, root) for path in paths)) for paths in (empty, unread))
    )


def _relative(path: str, root: Path) -> str:
    return os.path.relpath(path, root).replace(os.sep, "/")


def find_faults(
    source: Source, scan: Scan, beside: Beside | None = None, *, bits: int = NEAR_BITS
) -> list[Finding]:
    """Everything found, in a fixed order: errors, warnings, notes.

    `bits` is how far apart the perceptual hashes of near duplicates may be, 0 to 15.
    """
    beside = beside or Beside()
    split = split_names(source)
    found = [
        *_unreadable(source, scan),
        *copies(source, scan, split),
        *near_copies(source, scan, split, bits),
        *_labels(source, scan, beside),
        *_class_sizes(source, scan, split, beside),
        *_unread(beside),
        *forms(source, scan),
    ]
    rank = ("error", "warning", "note")
    return sorted(found, key=lambda one: rank.index(one.severity))


# Files -------------------------------------------------------------------------------------------


def _unreadable(source: Source, scan: Scan) -> Iterator[Finding]:
    items = [Item((source.keys[i],), reason) for i, reason in scan.bad.items()]
    advice = "get them again, or set them aside with --fix"
    yield from finding("unreadable", "error", "unreadable images", items, advice)


def _unread(beside: Beside) -> Iterator[Finding]:
    items = [
        Item((name,), "outside of class folders" if is_image(name) else "no image suffix")
        for name in beside.unread
    ]
    advice = "convert, rename or move the images among them; they are not read"
    yield from finding("unread", "warning", "files that are not read", items, advice)


# Classes -----------------------------------------------------------------------------------------


def _labels(source: Source, scan: Scan, beside: Beside) -> Iterator[Finding]:
    counts = np.bincount(source.labels[scan.good], minlength=len(source.classes))
    sizes = dict(zip(source.classes, counts.tolist(), strict=True))
    names = [*source.classes, *(path.rpartition("/")[2] for path in beside.empty)]

    def item(some: Iterable[str], why: str = "") -> Item:
        some = tuple(some)
        images = " and ".join(f"{sizes.get(name, 0):,}" for name in some)
        return Item(tuple(map(_shown, some)), f"{why}{', ' if why else ''}{images} images")

    same = [item(group) for group in same_spelling(names)]
    what = "labels that differ in spelling only"
    yield from finding("same-label", "error", what, same, "merge them into one")
    similar = [item((a, b), why) for a, b, why in likely_typos(names)]
    advice = "merge them if they mean one class"
    yield from finding("similar-label", "warning", "labels that look like one", similar, advice)


def _shown(name: str) -> str:
    """A name with what cannot be seen in it made visible: Unicode forms, and space at its ends."""
    plain = name.isascii() and name == name.strip()
    return name if plain else ascii(name)


def _class_sizes(
    source: Source, scan: Scan, split: np.ndarray, beside: Beside
) -> Iterator[Finding]:
    total = len(source.classes)
    counts = np.bincount(source.labels[scan.good], minlength=total)
    folders = {path.rpartition("/")[2] for path in beside.empty}
    void = [name for name, count in zip(source.classes, counts, strict=True) if not count]
    empty = [Item((name,)) for name in sorted({*void, *(folders - set(source.classes))})]
    what, advice = "classes without a readable image", "add images, or remove the class"
    yield from finding("empty-class", "error", what, empty, advice)
    for part in source.parts:
        here = np.bincount(source.labels[scan.good[split[scan.good] == part]], minlength=total)
        lacking = [Item((source.classes[k],)) for k in np.flatnonzero((here == 0) & (counts > 0))]
        severity, advice = "warning", "they are not measured"
        if part == "train":
            severity, advice = "error", "they cannot be learned: move some images"
        what = f"classes without an image in {part}"
        yield from finding(f"missing-in-{part}", severity, what, lacking, advice)
    yield from _imbalance(source, scan, split)


def _imbalance(source: Source, scan: Scan, split: np.ndarray) -> Iterator[Finding]:
    """Over train, or everything where the data are not divided."""
    part = "train" if "train" in source.parts else ""
    shown = scan.good[split[scan.good] == part] if part else scan.good
    counts = np.bincount(source.labels[shown], minlength=len(source.classes))
    present = np.flatnonzero(counts)
    if not len(present):
        return
    large = present[counts[present].argmax()]
    small = present[counts[present].argmin()]
    ratio = counts[large] / counts[small]
    if ratio <= WORTH_SAYING:
        return
    items = [
        Item((source.classes[k],), f"{counts[k]:,} images, {word}")
        for k, word in ((large, "most"), (small, "fewest"))
    ]
    yield Finding(
        "imbalance",
        "warning" if ratio >= STRONG_IMBALANCE else "note",
        f"largest class {ratio:,.1f} times the smallest" + (f" in {part}" if part else ""),
        1,
        tuple(items),
        "train with --balance sampler or loss; judge by balanced accuracy",
    )
