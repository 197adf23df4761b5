"""By which figure of an evaluation on the val part the best weights are chosen."""

from __future__ import annotations

from collections.abc import Mapping
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

    def value(self, result: Mapping[str, Any]) -> float:
        """The figure of an evaluation."""
        return float(result[self.key])

    def holds(self, value: float, best: float) -> bool:
        """Whether `value` is as good as `best`, or better."""
        return value >= best if self.rising else value <= best

    def shown(self, value: float) -> str:
        """In words."""
        return f"{100 * value:.2f} %" if self.rising else f"{value:.4f}"


TOP1 = Criterion("top1", "top-1")
LINEAR = Criterion("linear", "top-1 of the linear probe")
LOSS = Criterion("loss", "loss", rising=False)
