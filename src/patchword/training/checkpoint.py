"""Checkpoints: written whole or not at all, checked on load.

A checkpoint is a folder `checkpoints/step-00001000/` with the weights, their average, the
optimiser's tensors, `state.json`, and a `manifest.json` of every file's SHA-256. It is written
under a temporary name, flushed to the disk and renamed, so that a kill at any instant leaves the
last good one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from patchword.spec.parse import PatchwordError
from patchword.weights.native import sync

logger = logging.getLogger("patchword")
MANIFEST = "manifest.json"


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Make the folder `target` with what `write(folder)` puts there and a manifest, atomically.

    An intact `target` is left as it is; a damaged one is replaced. Raises `OSError` if the disk is
    full or read-only; `target` is then untouched and nothing is left behind.
    """
    if target.exists():
        if damage(target) is None:
            return
        shutil.rmtree(_aside(target))
    temporary = target.with_name(f".writing-{target.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        sums = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
        write_text(temporary / MANIFEST, json.dumps(sums, indent=1))
        sync(temporary)
        temporary.rename(target)
        sync(target.parent)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replace a file of a checkpoint folder by what `write(path)` puts there in one step, then its
    sum in the manifest. A kill in between leaves a file that loads, and a folder that counts as
    damaged: no run goes on from it."""
    write(path)
    manifest = path.parent / MANIFEST
    sums = json.loads(manifest.read_text(encoding="utf-8"))
    replace_text(manifest, json.dumps(sums | {path.name: _sha256(path)}, indent=1))


def _aside(folder: Path) -> Path:
    """Rename a folder so that it no longer counts, before it is removed."""
    return folder.rename(folder.with_name(f".removing-{folder.name}"))


def write_text(path: Path, text: str) -> None:
    """Write a small file and flush it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Write a small file under another name, flush it, and rename it into place."""
    temporary = path.with_name(f".writing-{path.name}")
    write_text(temporary, text)
    temporary.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder: a file that is missing or does not match the
    manifest; None if it is whole."""
    try:
        sums = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, wanted in sums.items():
            if _sha256(folder / name) != wanted:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, OSError, AttributeError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None if sums else f"{MANIFEST} is empty"


def link(name: Path, target: Path) -> None:
    """Point the symbolic link `name` at `target` (relative), replacing it in one step."""
    temporary = name.with_name(f".linking-{name.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, name.parent))
    temporary.replace(name)


class Checkpoints:
    """The checkpoints of a run directory."""

    def __init__(self, run: Path, keep: int) -> None:
        self.run = run
        self.folder = run / "checkpoints"
        self.keep = keep
        for stray in (*self.folder.glob(".writing-*"), *self.folder.glob(".removing-*")):
            shutil.rmtree(stray, ignore_errors=True)

    def steps(self) -> list[Path]:
        """Step checkpoints, newest first."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Save the state of `step`, point `last` at it, and drop the oldest. Raises `OSError`."""
        target = self.folder / f"step-{step:08d}"
        write_folder(target, write)
        link(self.run / "last", target)
        for old in self.steps()[self.keep :]:
            shutil.rmtree(_aside(old), ignore_errors=True)
        return target

    def best_folder(self, position: int) -> Path:
        """Where the best weights are, if they are those of `position`."""
        return self.folder / f"best-{position:08d}"

    def save_best(self, position: int, write: Callable[[Path], None]) -> None:
        """Keep the weights that `write` puts into a folder as `best`. Raises `OSError`."""
        target = self.best_folder(position)
        write_folder(target, write)
        link(self.run / "best", target)
        for old in self.folder.glob("best-*"):
            if old != target:
                shutil.rmtree(_aside(old), ignore_errors=True)

    def forget_best(self) -> None:
        """Let no weights count as the best."""
        (self.run / "best").unlink(missing_ok=True)

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint and its `state.json`, or None if there is no checkpoint;
        `last` then points at it.

        A damaged one is named in the log and passed over. Raises `PatchwordError` if there are
        checkpoints and all of them are damaged.
        """
        found = self.steps()
        for folder in found:
            problem = damage(folder)
            if problem is None:
                link(self.run / "last", folder)  # a kill may have come before `save` did
                return folder, json.loads((folder / "state.json").read_text(encoding="utf-8"))
            logger.warning("checkpoint %s is damaged (%s); trying the one before", folder, problem)
        if found:
            raise PatchwordError(
                f"every checkpoint under {self.folder} is damaged; start again with --overwrite"
            )
        return None
