"""What the tests of figures share."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from patchword.inspection.drawing import encode


def _pixels(drawn: bytes | Figure) -> np.ndarray:
    png = drawn if isinstance(drawn, bytes) else encode(drawn)
    assert png.startswith(b"\x89PNG")
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=np.int16)


def _share_of(image: np.ndarray, colour: str, tolerance: int = 12) -> float:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return float((np.abs(image - wanted).max(axis=2) <= tolerance).mean())


@pytest.fixture(scope="session")
def pixels() -> Callable[[bytes | Figure], np.ndarray]:
    """The pixels of a figure or a PNG, `[H, W, 3]`."""
    return _pixels


@pytest.fixture(scope="session")
def share_of() -> Callable[..., float]:
    """`share_of(pixels, colour, tolerance)`: the share of pixels of that colour."""
    return _share_of
