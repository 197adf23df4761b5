"""The range of a number, as metadata of its field, and one check for all fields of a spec.

Standard library only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from patchword.spec.parse import UsageError


@dataclass(frozen=True)
class Range:
    """Which numbers a field takes, unless it is None: `lr: float = NOT_NEGATIVE(1e-3)`."""

    holds: Callable[[float], bool]
    words: str
    """what to do about a value outside of it"""

    def __call__(self, default: Any = dataclasses.MISSING, *, free: bool = False) -> Any:
        """A field with this range; `free` as `may_change`."""
        return dataclasses.field(default=default, metadata={"range": self, "free": free})


ZERO_OR_MORE = Range(lambda value: value >= 0, "use 0 or more")
ONE_OR_MORE = Range(lambda value: value >= 1, "use 1 or more")
AT_LEAST_ONE = Range(lambda value: value >= 1, "it must be at least 1")
POSITIVE = Range(lambda value: 0 < value < math.inf, "it must be positive")
NOT_NEGATIVE = Range(lambda value: 0 <= value < math.inf, "it must be 0 or more and finite")
FINITE = Range(math.isfinite, "it must be finite")
BELOW_ONE = Range(lambda value: 0 <= value < 1, "it must be in [0, 1)")
UP_TO_ONE = Range(lambda value: 0 <= value <= 1, "it must be in [0, 1]")
SHARE = Range(lambda value: 0 < value <= 1, "it must be in (0, 1]")


def may_change(default: Any) -> Any:
    """A field that a resumed run may change: an undisturbed run computes the same with any."""
    return dataclasses.field(default=default, metadata={"free": True})


def check_ranges(spec: Any) -> None:
    """Raises `UsageError` for the first field of a spec that is out of its range."""
    for field in dataclasses.fields(spec):
        within: Range | None = field.metadata.get("range")
        value = getattr(spec, field.name)
        if within is not None and value is not None:
            require(within.holds(value), f"{field.name} is {value}; {within.words}")


def require(condition: bool, message: str) -> None:
    """Raises `UsageError` with `message` unless `condition` holds."""
    if not condition:
        raise UsageError(message)
