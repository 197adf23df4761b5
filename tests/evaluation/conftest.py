"""Features to probe."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def _clusters(
    count: int, width: int, classes: int, apart: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Correlated float32 features `[count, width]` away from 0, and their labels, each class among
    them."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g) * torch.logspace(0, -1, width)
    labels = torch.arange(count) % classes
    centres = apart * torch.randn(classes, width, generator=g)
    noise = torch.randn(count, width, generator=torch.Generator().manual_seed(seed + 1))
    return (centres[labels] + noise) @ mix + 5, labels


@pytest.fixture
def clusters() -> Callable[..., tuple[Tensor, Tensor]]:
    """`clusters(count, width, classes, apart=1, seed=0)`: correlated float32 features
    `[count, width]` away from 0, and their labels, each class among them."""
    return _clusters
