"""What a source of images is, whatever kind of data set it comes from, and how it reads them."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from patchword.data.contents import WHOLE_BYTES, digest_files
from patchword.data.images import BadImage

SPLITS = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("val", "validation", "valid", "dev"), "val"
)
"""Names that data give to their parts, and ours."""

MAX_FILE_BYTES = 1 << 29


class Reader(Protocol):
    """The images of a source, by position."""

    def read(self, index: int) -> bytes | np.ndarray: ...
    def location(self, index: int) -> str: ...
    def digest(self, *, whole: bool) -> str: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """N images, with labels or without. Picklable; cheap to hand to a worker process."""

    name: str
    """short, fit for a folder name"""
    classes: tuple[str, ...]
    """none if the images have no labels"""
    labels: np.ndarray
    """int64 `[N]`, positions in `classes`; -1 if the images have no labels"""
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

    @property
    def labelled(self) -> bool:
        """Whether anybody has said what is on the images."""
        return bool(self.classes)

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
        labels, classes = self.labels, self.classes
        if not self.labelled:  # known to the runs of earlier versions as one class of this name
            labels, classes = labels + 1, ("images",)
        made = {
            "files": _bytes(self.keys),
            "labels": labels.astype("<i8").tobytes(),
            "classes": _bytes(classes),
        }
        return {what: _sha256(data) for what, data in made.items()}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _bytes(names: Sequence[str]) -> bytes:
    """Names in one piece; what a file name has besides UTF-8 stays as it is."""
    return "\0".join(names).encode("utf-8", "surrogatepass")


def short_name(text: str) -> str:
    """`text` with letters, digits and ._- only."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "data"


def group_parts(splits: Sequence[str]) -> dict[str, np.ndarray]:
    """Positions of each part, from one of "train", "val", "test" or "" (none) per image."""
    values = np.asarray(splits)
    return {
        part: np.flatnonzero(values == part) for part in ("train", "val", "test") if part in values
    }


def numbered(names: Sequence[Any]) -> tuple[tuple[str, ...], np.ndarray]:
    """The classes that `names`, one for each image, make, in order; and int64 `[N]` labels."""
    ordered = sorted(set(names))
    number = {name: i for i, name in enumerate(ordered)}
    return tuple(map(str, ordered)), np.array([number[name] for name in names], np.int64)


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
