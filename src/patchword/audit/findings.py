"""What a check reports: findings, each with its cases and a piece of advice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Item:
    """One case of a finding."""

    names: tuple[str, ...]
    """keys of images, paths relative to the folder, or class names"""
    about: str = ""


@dataclass(frozen=True)
class Finding:
    code: str
    severity: Severity
    """error: fix it before training; warning: look at it; note: good to know"""
    what: str
    count: int
    items: tuple[Item, ...]
    advice: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def finding(
    code: str,
    severity: Severity,
    what: str,
    items: Sequence[Item],
    advice: str,
    count: int | None = None,
) -> Iterator[Finding]:
    """A finding, if there is a case of it."""
    if items:
        yield Finding(code, severity, what, count or len(items), tuple(items), advice)
