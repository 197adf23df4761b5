"""The device that these tests say something about, and models whose every weight counts.

It is the one that `PATCHWORD_TEST_DEVICE` names (`cpu`, `cuda`), else the best there is. The
reference is always plain code in float64 on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from patchword.models.model import Model
from patchword.models.zoo import create_model
from patchword.session.device import resolve_device

Distance = Callable[[Tensor, Tensor], float]

FAMILIES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "token": ("ViT-mu/4", 16, {"depth": 2}),
    "gap": ("ViT-mu/4", 20, {"depth": 2, "pool": "gap", "position": "sincos2d"}),
    "map": ("ViT-mu/4", 20, {"depth": 2, "pool": "map", "registers": 3, "qk_norm": True}),
    "rotary": ("ViT-mu/4", 16, {"depth": 2, "position": "rotary", "activation": "swiglu"}),
    "relative": ("ViT-mu/4", 16, {"depth": 2, "position": "relative", "layer_scale": 0.1}),
    "hybrid": ("ViT-mu/16", 32, {"stem": {"layers": (1, 1), "width": 32}}),
    "mixer": ("Mixer-S/8", 16, {"depth": 2, "width": 32}),
}
"""Name, image side and changed fields of a small model of each kind. The hybrid's stem has all that
a ResNet is made of; BiT's smallest has ten million weights."""


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test."""
    named = os.environ.get("PATCHWORD_TEST_DEVICE", "auto")
    if named not in ("auto", "cpu", "cuda", "mps"):
        raise pytest.UsageError(f"PATCHWORD_TEST_DEVICE is {named!r}; give auto, cpu, cuda or mps")
    return resolve_device(named)


@pytest.fixture(params=FAMILIES)
def small_model(request: pytest.FixtureRequest) -> Model:
    """A model of each kind on the CPU, float32, all weights away from zero."""
    name, size, changes = FAMILIES[request.param]
    model = create_model(name, 5, size, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def distance() -> Distance:
    """`distance(found, wanted)`: the norm of the difference over that of `wanted`, in float64 on
    the CPU; NaN where either holds one."""

    def relative(found: Tensor, wanted: Tensor) -> float:
        assert found.shape == wanted.shape
        ours, theirs = found.detach().cpu().double(), wanted.detach().cpu().double()
        return ((ours - theirs).norm() / theirs.norm()).item()

    return relative


@pytest.fixture
def gradients() -> Callable[[nn.Module], Tensor]:
    """`gradients(module)`: those of all parameters in one row, float64 on the CPU."""

    def joined(module: nn.Module) -> Tensor:
        found = [p.grad for p in module.parameters()]
        assert all(grad is not None for grad in found)
        return torch.cat(
            [grad.detach().cpu().double().flatten() for grad in found if grad is not None]
        )

    return joined


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `--deterministic` switches on is off again after the test."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.use_deterministic_algorithms(False)
