"""Setting unreadable files and surplus copies aside, and bringing them back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from patchword.audit.copies import surplus_copies
from patchword.audit.scan import Scan
from patchword.data.sources import Source
from patchword.spec.parse import PatchwordError

LOG = "moved.jsonl"


@dataclass(frozen=True)
class Move:
    """A file that was set aside."""

    path: str
    """relative to the data, and to the folder of what is set aside"""
    why: str


def aside_of(root: Path) -> Path:
    """The folder beside `root` that files are moved to."""
    whole = Path(os.path.abspath(root))
    return whole.with_name(f"{whole.name}.set-aside")


def set_aside(root: Path, source: Source, scan: Scan) -> list[Move]:
    """Move unreadable files and surplus copies below `aside_of(root)`, under their own paths.

    Each move is first written to `moved.jsonl` there, so that a killed run can be undone too. A
    copy that is the kept file itself, seen through a link, stays. Raises `PatchwordError`.
    """
    keys = source.keys
    planned = {keys[i]: reason for i, reason in scan.bad.items()}
    for index, kept in surplus_copies(source, scan):
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
    """Bring back what `set_aside` moved for the folder `data`, last moved first. A file stays aside
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
