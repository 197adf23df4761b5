"""Change one line of the source at a time, and see whether a test fails: `mutants.toml` lists the
changes and the tests that should notice. Not part of CI: all of them take half an hour.

    python scripts/mutants.py --only evaluation

The changes are made in a temporary copy, never in the working tree. Exits 1 if a change survives or
cannot be tried.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parent.parent
COPIED = ("src", "tests", "benchmarks", "pyproject.toml")
PRELOADED = (
    *("torch.utils.data", "safetensors.torch", "PIL.Image", "rich.console", "tyro"),
    *("matplotlib.figure", "sklearn.metrics", "sklearn.linear_model"),
)
"""What most tests need, imported once for all."""
TIMEOUT = 300
"""Seconds after which a change that makes tests hang counts as noticed."""
KILLED, SURVIVED, UNFIT = "killed", "survived", "does not apply"
BROKEN = "tests cannot run"
"""as where the module cannot be imported"""


@dataclass(frozen=True)
class Mutant:
    """A change that at least one of the tests should notice."""

    file: str
    """relative to the root"""
    old: str
    """occurs once in the file"""
    new: str
    tests: str
    """files, or single tests of them, with spaces between"""

    @property
    def folder(self) -> str:
        """The part of the package that it is in."""
        inside = self.file.removeprefix("src/patchword/")
        return inside.partition("/")[0]

    def __str__(self) -> str:
        return f"{self.file}: {shorter(self.old)} -> {shorter(self.new)}"


def shorter(text: str) -> str:
    """On one line, without indentation."""
    return " ".join(text.split()) or "nothing"


def read_mutants(path: Path) -> list[Mutant]:
    return [Mutant(**values) for values in tomllib.loads(path.read_text())["mutant"]]


class Copy:
    """A copy of the source and the tests, in which to try changes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.date = int(time.time())
        for name in COPIED:
            if (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / name, root / name, ignore=ignored)
            else:
                shutil.copy(ROOT / name, root / name)

    def outcome(self, mutant: Mutant) -> str:
        """What became of a change; the copy is afterwards as it was."""
        path = self.root / mutant.file
        text = path.read_text() if path.exists() else ""
        if text.count(mutant.old) != 1:
            return UNFIT
        self.write(path, text.replace(mutant.old, mutant.new))
        try:
            return {0: SURVIVED, 1: KILLED}.get(self.run(mutant.tests.split()), BROKEN)
        finally:
            self.write(path, text)

    def write(self, path: Path, text: str) -> None:
        """Each time with a newer date than ever, by which Python knows what to compile again."""
        path.write_text(text)
        self.date += 1
        os.utime(path, (self.date, self.date))

    def run(self, tests: Iterable[str], limit: int = TIMEOUT) -> int:
        """pytest's exit status: 0 all passed, 1 some failed or ran into the time limit."""
        child = os.fork()
        if not child:
            self.run_and_exit(tests, limit)
        try:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        except BaseException:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
        return 1 if status == -signal.SIGALRM else status

    def run_and_exit(self, tests: Iterable[str], limit: int) -> NoReturn:
        """What becomes of a forked process; `limit` is in seconds, 0 for none."""
        status = 3
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.alarm(limit)
            os.chdir(self.root)
            sys.path.insert(0, str(self.root / "src"))
            os.environ["PYTHONPATH"] = sys.path[0]
            with open(os.devnull, "w") as nowhere:
                for stream in (1, 2):
                    os.dup2(nowhere.fileno(), stream)
                status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
        finally:
            os._exit(status)


def show(outcomes: list[tuple[Mutant, str]]) -> None:
    """A table by folder, and what was not killed."""
    counts = Counter((mutant.folder, outcome) for mutant, outcome in outcomes)
    columns = (KILLED, SURVIVED, UNFIT, BROKEN)
    print(f"\n{'':12}" + "".join(f"{name:>18}" for name in columns))
    for folder in sorted({mutant.folder for mutant, _ in outcomes}):
        print(f"{folder:12}" + "".join(f"{counts[folder, name]:18}" for name in columns))
    totals = Counter(outcome for _, outcome in outcomes)
    print(f"{'all':12}" + "".join(f"{totals[name]:18}" for name in columns))
    for mutant, outcome in outcomes:
        if outcome != KILLED:
            print(f"{outcome}: {mutant}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="those whose line has this")
    only = parser.parse_args().only
    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    for name in PRELOADED:
        importlib.import_module(name)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    mutants = [m for m in read_mutants(Path(__file__).with_suffix(".toml")) if only in str(m)]
    outcomes: list[tuple[Mutant, str]] = []
    with tempfile.TemporaryDirectory(prefix="patchword-mutants-") as folder:
        copy = Copy(Path(folder))
        if copy.run(sorted({name for mutant in mutants for name in mutant.tests.split()}), 0):
            print("the tests fail without any change; put them right first", file=sys.stderr)
            return 1
        for mutant in mutants:
            start = time.monotonic()
            outcomes.append((mutant, copy.outcome(mutant)))
            taken = f"{time.monotonic() - start:4.0f} s"
            print(f"{taken}  {outcomes[-1][1]:14}  {mutant}", flush=True)
    show(outcomes)
    return int(any(outcome != KILLED for _, outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
