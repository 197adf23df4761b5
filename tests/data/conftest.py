"""Pictures and data sets made on the spot."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchword.data.sources import ArrayReader, Source


def _photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth random RGB picture, as photographs are: JPEG keeps it nearly unchanged."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 7, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def _encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def photo() -> Callable[..., Image.Image]:
    return _photo


@pytest.fixture
def encode() -> Callable[..., bytes]:
    return _encode


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """`folder({"cat": 3, "dog": 2})` or `{"train/cat": 3}`: that many PNG files in each folder."""

    def make(counts: dict[str, int], size: tuple[int, int] = (12, 16)) -> Path:
        root = tmp_path / "pets"
        for k, (name, count) in enumerate(counts.items()):
            (root / name).mkdir(parents=True)
            for i in range(count):
                (root / name / f"{i:03}.png").write_bytes(_encode(_photo(*size, 100 * k + i)))
        return root

    return make


@pytest.fixture
def labelled() -> Callable[..., Source]:
    """A source with the given labels and 2 x 2 images, for what looks at labels alone."""

    def make(labels: list[int], parts: dict[str, list[int]] | None = None) -> Source:
        count = len(labels)
        return Source(
            name="made",
            classes=tuple(f"c{k:03}" for k in range(max(labels) + 1)),
            labels=np.array(labels, np.int64),
            keys=tuple(f"image{i}" for i in range(count)),
            sizes=np.full(count, 12, np.int64),
            reader=ArrayReader(np.zeros((count, 2, 2, 3), np.uint8), "made"),
            parts={part: np.array(at, np.int64) for part, at in (parts or {}).items()},
        )

    return make
