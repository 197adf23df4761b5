"""Images without labels: a flat folder as a source of one class."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from patchword.data.sources import (
    SPLITS,
    FileReader,
    Source,
    class_folders,
    group_parts,
    image_files,
    open_source,
    parquet_files,
    short_name,
)

CLASS = "images"
"""The one class of images without labels."""


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
        classes=(CLASS,),
        labels=np.zeros(len(keys), np.int64),
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
