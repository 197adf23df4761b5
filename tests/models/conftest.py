"""What the tests of every family need: weights away from zero, products counted, a training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from patchword.models.model import Model
from patchword.models.zoo import build_model
from patchword.spec.model import ModelSpec


@pytest.fixture
def perturb() -> Callable[[nn.Module], None]:
    """Draws every parameter anew: heads, biases and some scales start at zero."""

    def draw(module: nn.Module) -> None:
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5 if parameter.ndim == 1 else 0.2)

    return draw


@pytest.fixture
def counted_macs() -> Callable[[ModelSpec], int]:
    """Multiply-accumulates of one image, counted by PyTorch as the products run, without data."""

    def count(spec: ModelSpec) -> int:
        with torch.device("meta"):
            model = build_model(spec)
            images = torch.empty(1, spec.in_channels, *spec.image_size)
            with FlopCounterMode(display=False) as counter:
                model.classify(model.features(images).pooled)
        return counter.get_total_flops() // 2

    return count


@pytest.fixture
def learn_digits() -> Callable[[Model, int, float], float]:
    """Trains a model on 1,200 digits for so many steps at a learning rate, and returns its accuracy
    on the other 597."""
    from sklearn.datasets import load_digits

    values, targets = load_digits(return_X_y=True)
    images = torch.from_numpy(values).float().view(-1, 1, 8, 8) / 8 - 1
    labels = torch.from_numpy(targets).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]

    def learn(model: Model, steps: int, lr: float) -> float:
        size = model.spec.image_size
        resized: Tensor = F.interpolate(images, size=size, mode="bilinear")
        optimizer = torch.optim.AdamW(model.parameters(), lr)
        model.train()
        for step in range(steps):
            at = torch.arange(step * 64, step * 64 + 64) % 1200
            optimizer.zero_grad()
            F.cross_entropy(model(resized[at]), labels[at]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.eval()
        with torch.no_grad():
            return (model(resized[1200:]).argmax(1) == labels[1200:]).float().mean().item()

    return learn
