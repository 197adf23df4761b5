"""Exponential moving (Polyak) average of the weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from patchword.objectives.base import body


class Average:
    """A float32 copy of a model, and of what its objective trains besides, that follows the
    weights: a = decay * a + (1 - decay) * w.

    The paper uses 0.9999 (section 4.1), which alone would leave 13 % of the initial weights after
    20,000 updates, 95 % after 500. So the decay of update t (from 0) is min(decay, (1 + t) / (10 +
    t)): until that reaches `decay`, at 90,000 updates for 0.9999, the average is over the last
    tenth or so of the run (after T updates those of update t count as t^8, T / 10 behind on
    average) and holds none of the initial weights. Weights that do not train are left alone.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        """`network` is a model, or one joined with an objective's parts."""
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.model = body(self.network)
        self.decay = decay
        self._mine: list[Tensor] = [
            mine
            for mine, p in zip(self.network.parameters(), network.parameters(), strict=True)
            if p.requires_grad
        ]

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Follow the weights after update number `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        theirs = [p.detach() for p in network.parameters() if p.requires_grad]
        torch._foreach_lerp_(self._mine, theirs, 1 - decay)
