"""What an objective has to show."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Pictures(NamedTuple):
    """Images beside what a network saw of them and made of that, float `[B, C, H, W]`, 0 to 1."""

    original: Tensor
    seen: Tensor
    predicted: Tensor
    """where it predicts nothing, the original"""
