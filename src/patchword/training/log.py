"""What a run writes while it trains: JSON lines, a CSV of them, and a live line."""

from __future__ import annotations

import csv
import io
import json
import logging
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from patchword.training.checkpoint import replace_text
from patchword.weights.native import sync

logger = logging.getLogger("patchword")


class Lines:
    """A `.jsonl` file that only ever holds whole lines, each with its `step`.

    Lines that could not be written (disk full) are kept and written with the next ones.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        """Open for appending, after cutting lines of steps beyond `last_step` (a resumed run)."""
        self.path = path
        kept = [line for line in read_lines(path) if line["step"] <= last_step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        if path.exists():
            replace_text(path, text)
        self._size = len(text.encode())
        self._pending: list[str] = []

    def append(self, line: dict[str, Any]) -> None:
        """Add a line. Raises `OSError` if it cannot be written; it is then tried again later."""
        self._pending.append(json.dumps(line) + "\n")
        self._write()

    def flush(self) -> None:
        """Write what could not be written yet, and flush all to the disk. Raises `OSError`."""
        if self._pending:
            self._write()
        if self.path.exists():
            sync(self.path)

    def _write(self) -> None:
        data = "".join(self._pending).encode()
        with self.path.open("ab") as file:
            file.truncate(self._size)
            file.seek(self._size)
            file.write(data)
        self._size += len(data)
        self._pending.clear()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a `.jsonl` file, without a last line that a kill cut short. Other lines that
    are no objects are left out, and named in the log."""
    if not path.exists():
        return []
    found: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            found.append(value)
        else:
            logger.warning("%s: line %d is damaged and left out", path, number)
    return found


def write_csv(path: Path) -> None:
    """Write `metrics.csv` beside `metrics.jsonl`, the same lines as a table."""
    lines = read_lines(path)
    if lines:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(lines[0]), restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(lines)
        replace_text(path.with_suffix(".csv"), text.getvalue())


def duration(value: float) -> str:
    """`"1:02:03"` or `"2:03"` from seconds."""
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class LiveLine:
    """One line on stderr that follows the run; on anything but a terminal, a line now and then."""

    def __init__(self, console: Console, every: float = 10.0) -> None:
        self._console = console
        self._every = every
        self._last = time.monotonic()
        self._live = Live(console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveLine:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, line: str, *, last: bool = False) -> None:
        """Show the newest state of the run."""
        if self._console.is_terminal:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"))
        elif last or time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
