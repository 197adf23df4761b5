"""By which figure of an evaluation on the val part the best weights are chosen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Criterion:
    """A figure that an evaluator gives."""

    key: str
    """its name in the evaluation"""
    name: str
    """in words"""
    rising: bool = True
    """more is better, and it is a share; otherwise less is better"""
    counted: bool = False
    """it is a share of the `n` images of the evaluation"""

    def value(self, result: Mapping[str, Any]) -> float:
        """The figure of an evaluation."""
        return float(result[self.key])

    def holds(self, value: float, best: float) -> bool:
        """Whether `value` is as good as `best`, or better."""
        return value >= best if self.rising else value <= best

    def top(self, values: Iterable[float]) -> float:
        """The best of some values that are numbers, infinitely bad without any."""
        known = [value for value in values if not math.isnan(value)]
        if self.rising:
            return max(known, default=-math.inf)
        return min(known, default=math.inf)

    def bar(self, top: float, result: Mapping[str, Any]) -> float:
        """What is as good as `top`: of a share of `n` images, one standard error less (by Laplace's
        estimate of the share, for there is one at 100 % too)."""
        if not self.counted:
            return top
        n = int(result["n"])
        share = (top * n + 1) / (n + 2)
        return top - math.sqrt(share * (1 - share) / n)

    def shown(self, value: float) -> str:
        """In words."""
        return f"{100 * value:.2f} %" if self.rising else f"{value:.4f}"


TOP1 = Criterion("top1", "top-1", counted=True)
LINEAR = Criterion("linear", "top-1 of the linear probe")
LOSS = Criterion("loss", "loss", rising=False)
