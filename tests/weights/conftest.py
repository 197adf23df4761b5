"""Random models with nothing left at zero, and what makes two of them the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from patchword import Model, create_model
from patchword.spec.model import CalibrationSpec, PreprocessSpec

CLASSES = ("cat", "dog", 'Größe [x] "quoted"\n', "")


@pytest.fixture
def scattered() -> Callable[..., Model]:
    """`scattered(name, image_size, **options)`: a model of four classes, all parameters perturbed,
    in evaluation mode."""

    def make(name: str = "ViT-mu/8", size: Any = 32, **options: Any) -> Model:
        model = create_model(
            name,
            len(CLASSES),
            size,
            preprocess=PreprocessSpec(mean=(0.1, 0.2, 0.3), interpolation="bilinear"),
            classes=CLASSES,
            **options,
        )
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        return model.eval()

    return make


@pytest.fixture
def calibrated(scattered: Callable[..., Model]) -> Callable[..., Model]:
    """`scattered`, with a calibration at temperature 1.7."""

    def make(name: str = "ViT-mu/8", size: Any = 32, **options: Any) -> Model:
        model = scattered(name, size, **options)
        model.calibration = CalibrationSpec(
            temperature=1.7,
            measured_on="9 images (val)",
            images=9,
            thresholds=(0.0, 0.5, 0.9),
            kept=(9, 6, 2),
            right=(7, 5, 2),
        )
        return model

    return make


@pytest.fixture
def same() -> Callable[[Model, Model], bool]:
    """Whether two models have the same tensors, spec, preprocessing, classes and calibration."""

    def compare(ours: Model, theirs: Model) -> bool:
        mine, other = ours.state_dict(), theirs.state_dict()
        return (
            mine.keys() == other.keys()
            and all(torch.equal(mine[name], other[name]) for name in mine)
            and (ours.spec, ours.preprocess, ours.classes, ours.calibration)
            == (theirs.spec, theirs.preprocess, theirs.classes, theirs.calibration)
        )

    return compare
