"""Evaluation, features and inspection on the device: in any batch size what the CPU finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import patchword
from patchword.commands.calibrating import calibrate_model
from patchword.commands.explaining import explain_images
from patchword.commands.inspecting import inspect_model
from patchword.data.registry import open_source
from patchword.models.model import Model
from patchword.models.zoo import create_model
from patchword.session.features import extract
from patchword.spec.train import Device

Distance = Callable[[Tensor, Tensor], float]

pytestmark = pytest.mark.device


def named(device: torch.device) -> Device:
    """What `--device` calls it."""
    return cast(Device, device.type)


@pytest.fixture
def digits_model() -> Model:
    """A classifier of the digits, untrained, whose logits depend on the image."""
    torch.manual_seed(1)
    classes = open_source("digits").classes
    model = create_model("ViT-mu/4", 10, 16, in_channels=1, depth=2, classes=tuple(classes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_any_batch_size(digits_model: Model, device: torch.device):
    """In float32: the same classes as on the CPU, loss and confidence within rounding."""
    settings: dict[str, Any] = {"split": "all", "workers": 0, "precision": "float32"}
    wanted = patchword.evaluate(digits_model, "digits", device="cpu", batch_size=64, **settings)
    for batch_size in (7, 64, 1000):
        found = patchword.evaluate(
            digits_model, "digits", device=named(device), batch_size=batch_size, **settings
        ).classification
        assert found.n == wanted.classification.n
        np.testing.assert_array_equal(found.predicted, wanted.classification.predicted)
        np.testing.assert_allclose(found.confidence, wanted.classification.confidence, atol=1e-5)
        assert found.loss == pytest.approx(wanted.classification.loss, abs=1e-5)


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_features(
    precision: str, tolerance: float, digits_model: Model, device: torch.device, distance: Distance
):
    source, some = open_source("digits"), np.arange(50)
    wanted = extract(digits_model, source, some, device="cpu", cache=False)
    found = extract(digits_model, source, some, device=device, cache=False, precision=precision)
    assert found.pooled.device.type == "cpu"
    assert distance(found.pooled, wanted.pooled) < tolerance


def test_a_temperature(digits_model: Model, device: torch.device):
    """Fitted to logits of the device as to those of the CPU."""
    places: tuple[Device, ...] = ("cpu", named(device))
    found = [
        calibrate_model(digits_model, "digits", split="half/half", device=at, workers=0)
        for at in places
    ]
    temperatures = [each.calibration.temperature for each in found]
    assert temperatures[0] == pytest.approx(temperatures[1], rel=1e-3)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two noisy pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (20, 24), np.uint8)).save(folder / name)
    return folder


def test_what_is_predicted(digits_model: Model, pictures: Path, device: torch.device):
    wanted = patchword.predict(digits_model, pictures, device="cpu", precision="float32")
    found = patchword.predict(digits_model, pictures, device=named(device), precision="float32")
    for ours, theirs in zip(found, wanted, strict=True):
        assert [name for name, _ in ours.top] == [name for name, _ in theirs.top]


def test_seeing_inside(digits_model: Model, pictures: Path, tmp_path: Path, device: torch.device):
    """Every figure and explanation is drawn from tensors of the device."""
    net = digits_model
    seen = inspect_model(
        net, pictures, out=tmp_path / "seen", pictures=1, device=named(device), workers=0
    )
    assert seen.out.is_dir()
    explained = explain_images(
        net, pictures / "a.png", out=tmp_path / "why.png", device=named(device), workers=0, window=1
    )
    assert len(explained.images) == 1
