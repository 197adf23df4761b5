"""`patchword check`: what is wrong with a data set."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from patchword.audit.faults import find_faults, look_beside
from patchword.audit.findings import Finding
from patchword.audit.fix import Move, aside_of, set_aside
from patchword.audit.hashing import MAX_BITS, NEAR_BITS
from patchword.audit.scan import scan
from patchword.data.registry import open_source
from patchword.data.sources import FileReader, Source
from patchword.session.device import eval_workers
from patchword.spec.parse import UsageError


@dataclass(frozen=True)
class Checked:
    """The result of a check."""

    source: Source
    findings: list[Finding]
    """what is there, after the moves"""
    images: int
    moved: list[Move]
    aside: Path | None
    """where the files were moved"""

    def count(self, severity: str) -> int:
        """Findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the same for the same data."""
        return {
            "data": self.source.name,
            "images": self.images,
            "classes": len(self.source.classes),
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "notes": self.count("note"),
            "findings": [finding.to_dict() for finding in self.findings],
            "set_aside": {
                "folder": str(self.aside) if self.moved else None,
                "files": [vars(move) for move in self.moved],
            },
        }


def check(
    data: str | Path,
    *,
    fix: bool = False,
    workers: int | None = None,
    near: int = NEAR_BITS,
    console: Console | None = None,
) -> Checked:
    """Read all images of a source and say what is wrong with it.

    `near` is how many of 64 bits the perceptual hashes of near duplicates may differ in, 0 to 15.
    With `fix`, unreadable files and surplus copies of a folder are moved to a folder beside it;
    `audit.fix.undo` brings them back. Raises `PatchwordError` if there are no data, or a file
    cannot be moved.
    """
    if not 0 <= near <= MAX_BITS:
        raise UsageError(f"--near is {near}; use 0 to {MAX_BITS} bits")
    source = open_source(str(data))
    console = console or Console(stderr=True, markup=False, emoji=False)
    root = Path(data) if isinstance(source.reader, FileReader) and Path(data).is_dir() else None
    if fix and root is None:
        raise UsageError("--fix moves files of a folder with class folders; this is none")
    with _progress(console, len(source)) as tell:
        seen = scan(source, workers=eval_workers(workers, len(source)), progress=tell)
    moved: list[Move] = []
    if fix and root is not None:
        moved = set_aside(root, source, seen)
        gone = {move.path for move in moved}
        seen = seen.without([i for i, key in enumerate(source.keys) if key in gone])
    beside = look_beside(root) if root else None
    return Checked(
        source=source,
        findings=find_faults(source, seen, beside, bits=near),
        images=len(source) - len(moved),
        moved=moved,
        aside=aside_of(root) if root else None,
    )


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Any]:
    """A function to call with the number of images done; shows rate and time left."""
    columns = (
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} images"),
        BarColumn(),
        TextColumn("{task.fields[rate]:,.0f} images/s"),
        TimeRemainingColumn(),
    )
    start = time.monotonic()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total, rate=0.0)

        def tell(count: int) -> None:
            bar.update(task, completed=count, rate=count / max(time.monotonic() - start, 1e-3))

        yield tell
    done, seconds = bar.tasks[task].completed, time.monotonic() - start
    rate = done / max(seconds, 1e-3)
    console.print(f"read {done:,} images in {seconds:.1f} s ({rate:,.0f} images/s)", style="dim")
