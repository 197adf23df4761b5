"""A calibration travels with the weights, and no further than it holds."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from patchword import Model, PatchwordError, load_model, save_model
from patchword.weights.load import describe_weights, transfer
from patchword.weights.native import load_tensors, model_header, save_tensors

Make = Callable[..., Model]
Same = Callable[[Model, Model], bool]


def test_it_is_saved_and_loaded(tmp_path: Path, calibrated: Make, same: Same):
    model = calibrated()
    path = save_model(model, tmp_path / "m.safetensors", step=3)
    loaded = load_model(path)
    assert same(model, loaded)
    assert loaded.temperature == 1.7
    assert describe_weights(path).calibration == model.calibration
    again = load_model(save_model(loaded, tmp_path / "again.safetensors"))
    assert same(model, again)


def test_it_changes_probabilities_and_no_logit(calibrated: Make, scattered: Make):
    model = calibrated()
    images = torch.randn(3, 3, 32, 32)
    logits = model(images)
    wanted = (logits.double() / 1.7).softmax(1)
    torch.testing.assert_close(model.probabilities(logits), wanted)
    model.calibration = None
    torch.testing.assert_close(model(images), logits, rtol=0, atol=0)
    torch.testing.assert_close(model.probabilities(logits), logits.double().softmax(1))
    sigmoid = calibrated(probability="sigmoid")
    logits = sigmoid(images)
    torch.testing.assert_close(sigmoid.probabilities(logits), (logits.double() / 1.7).sigmoid())


def test_a_model_without_one_has_the_header_it_always_had(scattered: Make):
    assert model_header(scattered()).keys() == {"model", "preprocess", "classes", "extra"}


def test_a_new_head_starts_without(tmp_path: Path, calibrated: Make):
    path = save_model(calibrated(), tmp_path / "m.safetensors")
    model = transfer(path, num_classes=7, image_size=(32, 32))
    assert model.calibration is None
    assert model.temperature == 1


def test_another_image_size_keeps_it_and_says_so(
    tmp_path: Path, calibrated: Make, caplog: pytest.LogCaptureFixture
):
    path = save_model(calibrated(), tmp_path / "m.safetensors")
    assert load_model(path, image_size=32).temperature == 1.7
    assert "was calibrated at" not in caplog.text
    assert load_model(path, image_size=48).temperature == 1.7
    assert "was calibrated at 32x32 px; at 48x48 px" in caplog.text


@pytest.mark.parametrize(("format", "name"), [("timm", "m.safetensors"), ("huggingface", "folder")])
def test_other_formats_have_no_place_for_it_and_that_is_said(
    tmp_path: Path,
    format: str,
    name: str,
    calibrated: Make,
    scattered: Make,
    caplog: pytest.LogCaptureFixture,
):
    """The logits stay as they are."""
    caplog.set_level(logging.WARNING)
    model = calibrated()
    path = save_model(model, tmp_path / name, format=format)
    assert "no place for the calibration" in caplog.text
    assert "divide them by 1.7" in caplog.text
    hints: dict[str, Any] = {"heads": 2} if format == "timm" else {}
    loaded = load_model(path, **hints)
    assert loaded.calibration is None
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(images), model(images), rtol=1e-5, atol=1e-5)
    caplog.clear()
    save_model(scattered(), path, format=format, overwrite=True)
    assert "calibration" not in caplog.text


@pytest.mark.parametrize("damage", [{"temperature": -1}, {"kept": [1]}, {"extra": 1}, 7])
def test_a_damaged_one_is_an_error(tmp_path: Path, calibrated: Make, damage: object):
    path = save_model(calibrated(), tmp_path / "m.safetensors")
    tensors, header = load_tensors(path)
    header = json.loads(json.dumps(header))
    header["calibration"] = header["calibration"] | damage if isinstance(damage, dict) else damage
    save_tensors(path, tensors, header)
    with pytest.raises(PatchwordError, match=r"m\.safetensors is damaged or newer"):
        load_model(path)
