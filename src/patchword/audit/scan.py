"""One pass over all images of a source: what each file is, and what it looks like."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from patchword.audit.hashing import SIDE, thumbnail
from patchword.data.images import FORMATS, MAX_PIXELS, BadImage, decode, exif_orientation, strips
from patchword.data.pillow import guarded
from patchword.data.sources import Source
from patchword.data.workers import serve

CHUNK = 64
"""Images per message of a worker."""

KINDS = ("RGB", "greyscale", "with transparency", "CMYK", "16-bit", "palette", "other colours")
"""How a file stores its pixels."""

FACTS = np.dtype(
    [
        ("file", "V32"),  # SHA-256 of the bytes; of arrays, which have no file, that of the pixels
        ("pixels", "V32"),  # SHA-256 of the decoded image: size, mode and pixels
        ("thumb", np.uint8, (SIDE, SIDE)),
        ("height", np.int32),  # upright
        ("width", np.int32),
        ("kind", np.uint8),  # position in KINDS
        ("format", "U4"),  # Pillow's name for it, empty for an array
        ("turned", np.bool_),  # by its EXIF orientation
        ("animated", np.bool_),
    ]
)
_MODES = {"L": "greyscale", "1": "greyscale", "P": "palette", "CMYK": "CMYK"} | dict.fromkeys(
    ("RGB", "RGBX", "YCbCr"), "RGB"
)


@dataclass(frozen=True, eq=False)
class Scan:
    """What is known of every image."""

    facts: np.ndarray
    """`FACTS` `[N]`; zeros where an image is bad"""
    bad: dict[int, str]
    """position in the source -> why it cannot be read, by rising position"""
    gone: frozenset[int] = frozenset()
    """positions of images that were set aside since"""

    @cached_property
    def good(self) -> np.ndarray:
        """int64 positions of the images that can be read, rising."""
        keep = np.ones(len(self.facts), np.bool_)
        keep[[*self.bad, *self.gone]] = False
        return np.flatnonzero(keep)

    def without(self, positions: Iterable[int]) -> Scan:
        """The same of the other images."""
        gone = self.gone | set(positions)
        return Scan(self.facts, {i: why for i, why in self.bad.items() if i not in gone}, gone)


def scan(
    source: Source, *, workers: int = 0, progress: Callable[[int], None] | None = None
) -> Scan:
    """Read and fully decode every image, in `workers` processes.

    Holds about 1.2 KB per image. `progress` is called with the number of images done. Raises
    `PatchwordError` where a worker dies.
    """
    facts = np.zeros(len(source), FACTS)
    bad: dict[int, str] = {}
    chunks = _Chunks(source)
    done = 0
    for part, broken in serve(chunks, range(len(chunks)), workers):
        facts[done : done + len(part)] = part
        bad |= {done + row: reason for row, reason in broken.items()}
        done += len(part)
        if progress is not None:
            progress(done)
    return Scan(facts, bad)


class _Chunks(Dataset[tuple[np.ndarray, dict[int, str]]]):
    """`FACTS` of `CHUNK` images at a time, and why some of them (by row) cannot be read."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return -(-len(self.source) // CHUNK)

    def __getitem__(self, number: int) -> tuple[np.ndarray, dict[int, str]]:
        positions = range(len(self.source))[number * CHUNK : (number + 1) * CHUNK]
        facts = np.zeros(len(positions), FACTS)
        bad: dict[int, str] = {}
        for row, index in enumerate(positions):
            try:
                _examine(self.source.read(index), self.source.channels, facts[row])
            except BadImage as error:
                bad[row] = str(error)
        return facts, bad


def _examine(data: bytes | np.ndarray, channels: int, row: np.void) -> None:
    """Fill in `row`, a `FACTS`, for one image. Raises `BadImage`."""
    image = decode(data, channels)
    shape = f"{image.width} x {image.height} {image.mode} "
    pixels = hashlib.sha256(shape.encode())
    for _, strip in strips(image):
        pixels.update(strip.tobytes())
    row["pixels"] = pixels.digest()
    row["thumb"] = np.asarray(thumbnail(image))
    row["width"], row["height"] = image.size
    if isinstance(data, np.ndarray):
        row["file"] = row["pixels"]
        row["kind"] = KINDS.index("greyscale" if data.shape[2] == 1 else "RGB")
        return
    row["file"] = hashlib.sha256(data).digest()
    with guarded(MAX_PIXELS), Image.open(io.BytesIO(data), formats=FORMATS) as header:
        row["format"] = header.format or ""
        row["kind"] = KINDS.index(_kind(header))
        row["turned"] = exif_orientation(header) != 1
        row["animated"] = header.format not in ("JPEG", "MPO") and _animated(header)


def _kind(header: Image.Image) -> str:
    """Which of `KINDS` an image is, from what its header says."""
    if header.mode.startswith("I") or header.mode == "F" or _deep(header):
        return "16-bit"
    if header.mode != "RGBX" and header.has_transparency_data:
        return "with transparency"
    return _MODES.get(header.mode, "other colours")


def _deep(header: Image.Image) -> bool:
    """Whether a file of more than one channel has 16 bits in each; Pillow opens it as 8 bits."""
    tiles = getattr(header, "tile", None)
    if header.format not in ("PNG", "TIFF") or not tiles:
        return False
    arguments = tiles[0][3]
    layout = arguments[0] if isinstance(arguments, tuple) else arguments
    return ";16" in str(layout)


def _animated(header: Image.Image) -> bool:
    try:
        return bool(getattr(header, "is_animated", False))
    except Exception:  # the frames after the first are not ours to judge
        return False
