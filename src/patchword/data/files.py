"""Image files as a source: a folder for each class, or a .csv file that lists them."""

from __future__ import annotations

import csv
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from patchword.data.images import SUFFIXES
from patchword.data.sources import SPLITS, FileReader, Source, group_parts, numbered, short_name
from patchword.spec.parse import PatchwordError

_SUFFIXES = frozenset(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)


def _of_files(
    name: str,
    root: Path,
    keys: tuple[str, ...],
    names: Sequence[str],
    parts: Sequence[str],
    sizes: Sequence[int],
) -> Source:
    """Files by path (`keys`, relative to `root`), class, part and bytes."""
    classes, labels = numbered(names)
    return Source(
        name=short_name(name),
        classes=classes,
        labels=labels,
        keys=keys,
        sizes=np.array(sizes, np.int64),
        reader=FileReader(str(root), keys),
        parts=group_parts(parts),
    )


# A folder per class ------------------------------------------------------------------------------


def open_folder(root: Path) -> Source:
    """A folder with one folder for each class, or such folders in train, val, test. Raises
    `PatchwordError`."""
    found: list[tuple[str, str, str, int]] = []  # key, class, split, bytes
    for part, folder in class_folders(root):
        for path, size in image_files(folder.path):
            key = os.path.relpath(path, root).replace(os.sep, "/")
            found.append((key, folder.name, part, size))
    if not found:
        raise PatchwordError(
            f"{root}: no images in class folders; put them into one folder per class, or give "
            "a .csv manifest"
        )
    keys, names, parts, sizes = zip(*sorted(found), strict=True)
    return _of_files(root.resolve().name, root, keys, names, parts, sizes)


def class_folders(root: Path) -> list[tuple[str, os.DirEntry[str]]]:
    """The folders of `root` that stand for classes, each with its part: train, val, test, or ""
    where the data are not divided. Raises `PatchwordError` if it is not clear which they are."""
    tops = sorted(entry.name for entry in _entries(root) if _visible_folder(entry))
    split_of = {
        top: SPLITS[top.lower()]
        for top in tops
        if top.lower() in SPLITS and any(map(_visible_folder, _entries(root / top)))
    }
    if split_of and (
        stray := [top for top in tops if top not in split_of and _has_image(root, top)]
    ):
        raise PatchwordError(
            f"{root}: images in {stray[0]}/ beside the split {next(iter(split_of))}/; "
            "move that folder out, or into a split"
        )
    return [
        (split_of.get(parent, ""), entry)
        for parent in split_of or [""]
        for entry in _entries(root / parent)
        if _visible_folder(entry)
    ]


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _visible_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not entry.name.startswith((".", "__MACOSX"))


def image_files(folder: str) -> Iterator[tuple[str, int]]:
    """(path, bytes) of every image file below `folder` but hidden ones; links are followed, but not
    in circles."""
    for entry in visible_files(folder):
        if is_image(entry.name):
            yield entry.path, entry.stat().st_size


def visible_files(
    folder: str | Path, above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[os.DirEntry[str]]:
    """Every file below `folder` but hidden ones; links are followed, but not in circles."""
    here = os.stat(folder)
    if (here.st_dev, here.st_ino) in above:
        return
    above |= {(here.st_dev, here.st_ino)}
    for entry in _entries(folder):
        if _visible_folder(entry):
            yield from visible_files(entry.path, above)
        elif not entry.name.startswith(".") and entry.is_file():
            yield entry


def is_image(name: str) -> bool:
    """Whether a file is read as an image, by its suffix."""
    return os.path.splitext(name)[1].lower() in _SUFFIXES


def _has_image(root: Path, top: str) -> bool:
    return next(image_files(str(root / top)), None) is not None


# CSV manifest ------------------------------------------------------------------------------------


def open_manifest(path: Path) -> Source:
    """A .csv file with columns path, label and, if the data are divided, split. Raises
    `PatchwordError`."""
    keys, names, parts = zip(*_manifest_rows(path), strict=True)
    root = path.parent
    sizes = [_size(os.path.join(root, key)) for key in keys]
    if max(sizes) < 0:
        raise PatchwordError(
            f"{path}: none of its {len(keys)} files exist, such as {keys[0]!r}; paths are relative "
            f"to {root}"
        )
    return _of_files(path.stem, root, keys, names, parts, sizes)


def _manifest_rows(path: Path) -> list[tuple[str, str, str]]:
    """(path, label, split) of each line, split "" where the file has no such column."""
    rows: list[tuple[str, str, str]] = []
    seen: dict[str, int] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, skipinitialspace=True)
            missing = {"path", "label"} - set(table.fieldnames or ())
            if missing:
                raise PatchwordError(
                    f"{path}: no column {min(missing)!r}; the first line must be path,label or "
                    "path,label,split"
                )
            divided = "split" in (table.fieldnames or ())
            for row in table:
                where = f"{path} line {table.line_num}"
                key, label, split = row["path"], row["label"], row.get("split") or ""
                if not key or not label:
                    raise PatchwordError(f"{where}: empty path or label; fill it in")
                if key in seen:
                    raise PatchwordError(f"{where}: {key!r} is on line {seen[key]} too; drop one")
                if divided and split.lower() not in SPLITS:
                    raise PatchwordError(f"{where}: split {split!r}; use train, val or test")
                seen[key] = table.line_num
                rows.append((key, label, SPLITS[split.lower()] if divided else ""))
    except (UnicodeDecodeError, csv.Error) as error:
        raise PatchwordError(
            f"{path} is not a CSV file in UTF-8 ({error}); save it as one"
        ) from None
    if not rows:
        raise PatchwordError(f"{path} lists no images; add lines path,label")
    return rows


def _size(path: str) -> int:
    """Bytes of a regular file, -1 if there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1
