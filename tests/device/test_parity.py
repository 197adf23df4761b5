"""Every family of models on the device, against the same in float64 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchword.models.model import Model
from patchword.models.vit import ViT
from patchword.session.device import Working

pytestmark = pytest.mark.device

TOLERANCE = {torch.float32: (2e-5, 1e-4), torch.bfloat16: (3e-2, 6e-2)}
"""Relative, of the logits and of all gradients."""
CONVOLVED = 0.4
"""Of the gradients of a ResNet in bfloat16, whose max pooling and ReLU choose otherwise after
rounding; an unrelated gradient has 1.4."""
TF32 = 1e-2
"""The same where CUDA multiplies convolutions in TF32, as PyTorch has it by default."""
Distance = Callable[[Tensor, Tensor], float]


def batch(model: Model, count: int = 3) -> tuple[Tensor, Tensor]:
    images = torch.randn(count, model.spec.in_channels, *model.spec.image_size)
    return images, torch.arange(count) % model.spec.num_classes


def convolves(model: Model) -> bool:
    return isinstance(model, ViT) and model.stem is not None


def float32_tolerance(model: Model, device: torch.device) -> float:
    """Of what a model computes in float32 on the device."""
    return TF32 if convolves(model) and device.type == "cuda" else TOLERANCE[torch.float32][0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_logits_and_gradients(
    small_model: Model,
    dtype: torch.dtype,
    device: torch.device,
    distance: Distance,
    gradients: Callable[[nn.Module], Tensor],
):
    images, labels = batch(small_model)
    wide = copy.deepcopy(small_model).double()
    wanted = wide(images.double())
    F.cross_entropy(wanted, labels).backward()
    model = small_model.to(device)
    working = Working(model, dtype)
    logits = working(images.to(device))
    F.cross_entropy(logits, labels.to(device)).backward()
    working.collect()
    near, far = TOLERANCE[dtype]
    if convolves(model):
        far = CONVOLVED if dtype is torch.bfloat16 else far
        near, far = (max(near, TF32), max(far, TF32)) if device.type == "cuda" else (near, far)
    assert logits.dtype is torch.float32
    assert distance(logits, wanted) < near
    assert distance(gradients(model), gradients(wide)) < far


def test_features(small_model: Model, device: torch.device, distance: Distance):
    images, _ = batch(small_model)
    wanted = small_model.eval().features(images)
    found = small_model.to(device).features(images.to(device))
    assert found.grid == wanted.grid
    for ours, theirs in zip(found[:2], wanted[:2], strict=True):
        assert distance(ours, theirs) < float32_tolerance(small_model, device)


def test_an_image_does_not_depend_on_its_batch(
    small_model: Model, device: torch.device, distance: Distance
):
    images = batch(small_model, 7)[0].to(device)
    model = small_model.to(device).eval()
    with torch.inference_mode():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    assert distance(alone, together) < float32_tolerance(model, device)
