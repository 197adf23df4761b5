"""`patchword check`: what is wrong with a data set, and setting files aside."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from patchword.audit.copies import surplus_copies
from patchword.audit.faults import find_faults, look_beside
from patchword.audit.findings import Finding
from patchword.audit.hashing import MAX_BITS, NEAR_BITS
from patchword.audit.scan import Scan, scan
from patchword.data.sources import FileReader, Source, open_source
from patchword.session.device import default_workers
from patchword.spec.parse import PatchwordError, UsageError

LOG = "moved.jsonl"


@dataclass(frozen=True)
class Move:
    """A file that was set aside."""

    path: str
    """relative to the data, and to the folder of what is set aside"""
    why: str


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
    `undo` brings them back. Raises `PatchwordError` if there are no data, or a file cannot be
    moved.
    """
    if not 0 <= near <= MAX_BITS:
        raise UsageError(f"--near is {near}; use 0 to {MAX_BITS} bits")
    source = open_source(str(data))
    console = console or Console(stderr=True, markup=False, emoji=False)
    root = Path(data) if isinstance(source.reader, FileReader) and Path(data).is_dir() else None
    if fix and root is None:
        raise UsageError("--fix moves files of a folder with class folders; this is none")
    if workers is None:
        workers = default_workers() if len(source) > 256 else 0
    with _progress(console, len(source)) as tell:
        found = scan(source, workers=workers, progress=tell)
    moved: list[Move] = []
    if fix and root is not None:
        moved = set_aside(root, source, found)
        gone = {move.path for move in moved}
        found = found.without([i for i, key in enumerate(source.keys) if key in gone])
    beside = look_beside(root) if root else None
    return Checked(
        source=source,
        findings=find_faults(source, found, beside, bits=near),
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
    done = 0
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total, rate=0.0)

        def tell(count: int) -> None:
            nonlocal done
            done = count
            bar.update(task, completed=count, rate=count / max(time.monotonic() - start, 1e-3))

        yield tell
    seconds = time.monotonic() - start
    rate = done / max(seconds, 1e-3)
    console.print(f"read {done:,} images in {seconds:.1f} s ({rate:,.0f} images/s)", style="dim")


# Setting aside -----------------------------------------------------------------------------------


def aside_of(root: Path) -> Path:
    """The folder beside `root` that files are moved to."""
    whole = Path(os.path.abspath(root))
    return whole.with_name(f"{whole.name}.set-aside")


def set_aside(root: Path, source: Source, found: Scan) -> list[Move]:
    """Move unreadable files and surplus copies below `aside_of(root)`, under their own paths.

    Each move is first written to `moved.jsonl` there, so that a killed run can be undone too. A
    copy that is the kept file itself, seen through a link, stays. Raises `PatchwordError`.
    """
    keys = source.keys
    planned = {keys[i]: reason for i, reason in found.bad.items()}
    for index, kept in surplus_copies(source, found):
        if not _is_target(root / keys[index], root / keys[kept]):
            planned[keys[index]] = f"same pixels as {keys[kept]}"
    once: dict[str, Move] = {}
    for key, why in sorted(planned.items()):
        once.setdefault(_entry(root / key), Move(key, why))
    moves = list(once.values())
    aside = aside_of(root)
    taken = [move.path for move in moves if os.path.lexists(aside / move.path)]
    if taken:
        raise PatchwordError(
            f"{aside / taken[0]} exists already; move what is in {aside} elsewhere"
        )
    if moves:
        with _moving(aside):
            aside.mkdir(exist_ok=True)
            with open(aside / LOG, "a", encoding="utf-8") as log:
                for move in moves:
                    log.write(json.dumps(vars(move)) + "\n")
                log.flush()
                os.fsync(log.fileno())
            for move in moves:
                (aside / move.path).parent.mkdir(parents=True, exist_ok=True)
                os.rename(root / move.path, aside / move.path)
    return moves


def _is_target(path: Path, kept: Path) -> bool:
    """Whether moving `path` would take `kept` away: it is the same file seen through links, or
    what `kept` is a link to."""
    same_file = os.path.realpath(path) == os.path.realpath(kept)
    return _entry(path) == _entry(kept) or (same_file and not path.is_symlink())


def _entry(path: Path) -> str:
    """One name for each file or link, through whatever linked folders it is reached."""
    return os.path.join(os.path.realpath(path.parent), path.name)


@contextmanager
def _moving(aside: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PatchwordError(
            f"{error.filename}: {error.strerror or error}; nothing is lost: what was moved is in "
            f"{aside}, and --undo brings it back"
        ) from None


def undo(data: str | Path) -> list[Move]:
    """Bring back what `check` set aside for the folder `data`, last moved first. A file stays aside
    where another has taken its place. Raises `PatchwordError` if nothing was set aside."""
    root, aside = Path(data), aside_of(Path(data))
    try:
        lines = (aside / LOG).read_text(encoding="utf-8").splitlines()
        moves = [Move(**json.loads(line)) for line in lines]
    except FileNotFoundError:
        raise PatchwordError(f"nothing of {root} was set aside: no {aside / LOG}") from None
    except (OSError, ValueError, TypeError) as error:
        raise PatchwordError(
            f"{aside / LOG} cannot be read ({error}); move the files back by hand"
        ) from None
    back: list[Move] = []
    left: list[Move] = []
    with _moving(aside):
        for move in reversed(moves):
            if not os.path.lexists(aside / move.path):
                continue  # a move that a kill prevented
            if os.path.lexists(root / move.path):
                left.append(move)
                continue
            (root / move.path).parent.mkdir(parents=True, exist_ok=True)
            os.rename(aside / move.path, root / move.path)
            back.append(move)
        _rewrite(aside, left[::-1])
    return back[::-1]


def _rewrite(aside: Path, left: Sequence[Move]) -> None:
    """Keep in the log what is still aside; without any, leave no empty folders behind."""
    if left:
        text = "".join(json.dumps(vars(move)) + "\n" for move in left)
        (aside / f"{LOG}.tmp").write_text(text, encoding="utf-8")
        os.replace(aside / f"{LOG}.tmp", aside / LOG)
        return
    (aside / LOG).unlink()
    for folder, _, _ in os.walk(aside, topdown=False):
        if not os.listdir(folder):
            os.rmdir(folder)
