"""Exponential moving (Polyak) average of the weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from patchword.models.model import Model


class Average:
    """A float32 copy of the model that follows its weights: a = decay * a + (1 - decay) * w.

    The decay of update t (from 0) is min(decay, (1 + t) / (10 + t)), so that short runs are not
    dominated by the initial weights. The paper uses 0.9999 (section 4.1).
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self._mine: list[Tensor] = list(self.model.parameters())

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Follow the weights after update number `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._mine, [p.detach() for p in model.parameters()], 1 - decay)
