"""Where images come from: every kind of data set as one indexable, picklable `Source`."""

from __future__ import annotations

import csv
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from patchword.data.contents import WHOLE_BYTES, digest_files
from patchword.data.images import BadImage
from patchword.spec.parse import PatchwordError

ACCEPTED = (
    "a folder with one folder per class, a .csv manifest (path,label[,split]), "
    "a .parquet file or a folder of them, digits, or hub:ORG/NAME"
)
SPLITS = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("val", "validation", "valid", "dev"), "val"
)
"""Names that data give to their parts, and ours."""

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)
MAX_FILE_BYTES = 1 << 29


class Reader(Protocol):
    """The images of a source, by position."""

    def read(self, index: int) -> bytes | np.ndarray: ...
    def location(self, index: int) -> str: ...
    def digest(self, *, whole: bool) -> str: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """N labelled images. Picklable; cheap to hand to a worker process."""

    name: str
    """short, fit for a folder name"""
    classes: tuple[str, ...]
    labels: np.ndarray
    """int64 `[N]`, positions in `classes`"""
    keys: Sequence[str]
    """N unique names that stay the same from run to run"""
    sizes: np.ndarray
    """int64, bytes of the files the source is made of; -1 for a missing one"""
    reader: Reader
    parts: dict[str, np.ndarray] = field(default_factory=dict)
    """the splits that the data give: some of train, val, test -> int64 positions, rising"""
    channels: int = 3
    default_fractions: tuple[float, float] | None = None
    """(val, test) shares of this source where the user asks for none"""

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes | np.ndarray:
        """The encoded file, or uint8 `[H, W, C]`. Raises `BadImage` if it cannot be read."""
        return self.reader.read(int(index))

    def location(self, index: int) -> str:
        """Where image `index` is, for messages."""
        return self.reader.location(int(index))

    @cached_property
    def digests(self) -> dict[str, str]:
        """sha256 of each thing that makes the data what they are.

        The contents are all bytes of the files where these are together at most `WHOLE_BYTES`
        (2 GiB), else a sample of each (`digest_files`), read once; the pixels of arrays; of a data
        set of the hub, what `HubReader.digest` says.
        """
        whole = int(self.sizes.clip(0).sum()) <= WHOLE_BYTES
        return self._named() | {"file contents": self.reader.digest(whole=whole)}

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over keys, labels, classes and contents; wherever the data lie."""
        return _sha256("".join(self.digests.values()).encode())

    @cached_property
    def size_digests(self) -> dict[str, str]:
        """As `digests`, with sizes for contents: what run directories of earlier versions hold."""
        return self._named() | {"file sizes": _sha256(self.sizes.astype("<i8").tobytes())}

    @property
    def size_fingerprint(self) -> str:
        """sha256 (hex) over keys, labels, classes and file sizes."""
        return _sha256("".join(self.size_digests.values()).encode())

    def _named(self) -> dict[str, str]:
        made = {
            "files": _bytes(self.keys),
            "labels": self.labels.astype("<i8").tobytes(),
            "classes": _bytes(self.classes),
        }
        return {what: _sha256(data) for what, data in made.items()}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _bytes(names: Sequence[str]) -> bytes:
    """Names in one piece; what a file name has besides UTF-8 stays as it is."""
    return "\0".join(names).encode("utf-8", "surrogatepass")


def open_source(name: str) -> Source:
    """The source called `name`: what `ACCEPTED` lists. Raises `PatchwordError`."""
    if name == "digits":
        return _digits()
    if name.startswith("hub:"):
        from patchword.data.parquet import open_hub

        return open_hub(name.removeprefix("hub:"))
    path = Path(name).expanduser()
    if not path.exists():
        raise PatchwordError(f"no data at {name!r}; give {ACCEPTED}")
    if path.is_file() and path.suffix.lower() == ".csv":
        return _manifest(path)
    if path.is_file() and path.suffix.lower() == ".parquet":
        from patchword.data.parquet import open_parquet

        return open_parquet(path, [path])
    if path.is_dir():
        if files := parquet_files(path):
            from patchword.data.parquet import open_parquet

            return open_parquet(path, files)
        return _folder(path)
    raise PatchwordError(f"{name!r} is no data set; give {ACCEPTED}")


def short_name(text: str) -> str:
    """`text` with letters, digits and ._- only."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "data"


def group_parts(splits: Sequence[str]) -> dict[str, np.ndarray]:
    """Positions of each part, from one of "train", "val", "test" or "" (none) per image."""
    values = np.asarray(splits)
    return {
        part: np.flatnonzero(values == part) for part in ("train", "val", "test") if part in values
    }


# Readers -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArrayReader:
    images: np.ndarray
    """uint8 `[N, H, W, C]`"""
    name: str

    def read(self, index: int) -> np.ndarray:
        return self.images[index]

    def location(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def digest(self, *, whole: bool) -> str:
        """SHA-256 (hex) of shape and pixels, always all of them."""
        return _sha256(str(self.images.shape).encode() + self.images.tobytes())


@dataclass(frozen=True)
class FileReader:
    root: str
    paths: Sequence[str]
    """relative to `root`, or absolute"""

    def read(self, index: int) -> bytes:
        path = self.location(index)
        try:
            status = os.stat(path)  # before opening: a pipe would block
            if not stat.S_ISREG(status.st_mode):
                raise BadImage("not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise BadImage(f"file of more than {MAX_FILE_BYTES >> 20} MiB")
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise BadImage(error.strerror or "cannot be read") from None
        except ValueError as error:
            raise BadImage(str(error)) from None

    def location(self, index: int) -> str:
        return os.path.join(self.root, self.paths[index])

    def digest(self, *, whole: bool) -> str:
        """SHA-256 (hex) of the files, as `digest_files` takes it."""
        return digest_files([os.path.join(self.root, path) for path in self.paths], whole=whole)


# Digits ------------------------------------------------------------------------------------------


def _digits() -> Source:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey (UCI Optical Recognition, test part)."""
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    images = np.rint(np.asarray(values) * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return Source(
        name="digits",
        classes=tuple("0123456789"),
        labels=np.asarray(labels).astype(np.int64),
        keys=tuple(f"digits/{i:04}" for i in range(len(images))),
        sizes=np.full(len(images), 64, np.int64),
        reader=ArrayReader(images, "digits"),
        channels=1,
        default_fractions=(0.04, 0.2),
    )


# A folder per class ------------------------------------------------------------------------------


def _folder(root: Path) -> Source:
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
    found.sort()
    keys = tuple(row[0] for row in found)
    classes = tuple(sorted({row[1] for row in found}))
    number = {name: i for i, name in enumerate(classes)}
    return Source(
        name=short_name(root.resolve().name),
        classes=classes,
        labels=np.array([number[row[1]] for row in found], np.int64),
        keys=keys,
        sizes=np.array([row[3] for row in found], np.int64),
        reader=FileReader(str(root), keys),
        parts=group_parts([row[2] for row in found]),
    )


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
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _has_image(root: Path, top: str) -> bool:
    return next(image_files(str(root / top)), None) is not None


def parquet_files(root: Path) -> list[Path]:
    """Parquet files of the layouts that the Hugging Face hub uses."""
    files: list[Path] = []
    for base in (root, root / "data", root / "default"):
        folders = [base, *(base / split for split in SPLITS)]
        files += [file for folder in folders for file in folder.glob("*.parquet")]
    return sorted(file for file in files if not file.name.startswith("."))


# CSV manifest ------------------------------------------------------------------------------------


def _manifest(path: Path) -> Source:
    rows = _manifest_rows(path)
    keys = tuple(row[0] for row in rows)
    root = str(path.parent)
    sizes = np.array([_size(os.path.join(root, key)) for key in keys], np.int64)
    if (sizes < 0).all():
        raise PatchwordError(
            f"{path}: none of its {len(keys)} files exist, such as {keys[0]!r}; paths are relative "
            f"to {root}"
        )
    classes = tuple(sorted({row[1] for row in rows}))
    number = {name: i for i, name in enumerate(classes)}
    return Source(
        name=short_name(path.stem),
        classes=classes,
        labels=np.array([number[row[1]] for row in rows], np.int64),
        keys=keys,
        sizes=sizes,
        reader=FileReader(root, keys),
        parts=group_parts([row[2] for row in rows]),
    )


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
