"""Images without labels: a flat folder, or files by their names, as a source."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from patchword.data.files import class_folders, image_files
from patchword.data.parquet import parquet_files
from patchword.data.registry import open_source
from patchword.data.sources import SPLITS, FileReader, Source, group_parts, short_name
from patchword.spec.parse import PatchwordError

logger = logging.getLogger("patchword")


def open_images(name: str) -> Source:
    """The source called `name`, whose labels may be missing: as `open_source`, but a folder of
    images without class folders in it is taken as it is, and so is one with such a folder each for
    train, val and test. Where these are not divided there is no test part: nothing could be
    measured on it. Raises `PatchwordError`."""
    path = Path(name).expanduser()
    parts = _flat_parts(path) if name != "digits" and path.is_dir() else {}
    found = sorted(
        (os.path.relpath(file, path).replace(os.sep, "/"), part, size)
        for folder, part in parts.items()
        for file, size in image_files(str(path / folder))
    )
    if not found:
        return open_source(name)
    keys = tuple(key for key, _, _ in found)
    return Source(
        name=short_name(path.resolve().name),
        classes=(),
        labels=np.full(len(keys), -1, np.int64),
        keys=keys,
        sizes=np.array([size for _, _, size in found], np.int64),
        reader=FileReader(str(path), keys),
        parts=group_parts([part for _, part, _ in found]),
        default_fractions=(0.1, 0.0),
    )


def _flat_parts(root: Path) -> dict[str, str]:
    """The folders below `root` that hold images without labels, and the parts they are, "" for
    none; empty if the folders stand for classes, or the data are parquet."""
    if parquet_files(root):
        return {}
    names = [
        (part, entry.name)
        for part, entry in class_folders(root)
        if next(image_files(entry.path), None) is not None
    ]
    if not names:
        return {"": ""}
    if all(not part and name.lower() in SPLITS for part, name in names):
        return {name: SPLITS[name.lower()] for _, name in names}
    return {}


def image_source(paths: Sequence[str]) -> Source:
    """Image files as a source without labels."""
    return Source(
        name="images",
        classes=(),
        labels=np.full(len(paths), -1, np.int64),
        keys=paths,
        sizes=np.zeros(len(paths), np.int64),
        reader=FileReader("", paths),
    )


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
