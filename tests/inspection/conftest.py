"""What the tests share: the pixels of a figure, small models with random weights."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from patchword.inspection.figures.drawing import encode
from patchword.models.vit import ViT
from patchword.spec.model import ViTSpec


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


SMALL = ViTSpec(
    depth=2,
    width=64,
    mlp_width=32,
    heads=2,
    patch_size=(4, 2),
    image_size=(12, 10),
    num_classes=5,
)


def _random_vit(**options: Any) -> ViT:
    model = ViT(dataclasses.replace(SMALL, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.fixture(scope="session")
def random_vit() -> Callable[..., ViT]:
    """`random_vit(**spec)`: a ViT of two layers and two heads on a grid of 3 x 5 patches of 4 x 2
    pixels, no parameter of which is at its initial value."""
    return _random_vit
