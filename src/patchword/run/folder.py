"""The run directory: what is resolved once when a run starts, stored, and compared on resume."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

import patchword
from patchword.data.sources import Source
from patchword.data.splits import FILE as SPLITS
from patchword.data.splits import Division, divide, drawn, load_division, save_division
from patchword.models.zoo import model_family
from patchword.run.settle import fitting_options
from patchword.session.device import processor
from patchword.spec.parse import PatchwordError, UsageError, to_dict
from patchword.spec.settled import Settled, Stored, read_config
from patchword.spec.train import TrainSpec
from patchword.training.checkpoint import replace_text

logger = logging.getLogger("patchword")
CONFIG, SUMMARY = "config.json", "summary.json"
INIT = "init.json"
"""of an earlier version: what the weights are that a run starts from"""
HEAD = "head.safetensors"
"""the model with a head on its frozen features, to use while the run goes on"""
SWEEP = "sweep.json"
"""in the folder of a sweep or of repeated runs"""


def default_run(source: Source, request: TrainSpec) -> Path:
    """`runs/<data>-<model>`, for weights to transfer `runs/<data>-from-<their run or file>`; if not
    to classify, with the objective at the end."""
    name = request.model or "model"
    if request.init is not None:
        init = Path(request.init)
        name = f"from-{init.stem if init.is_file() else init.resolve().name}"
    what = f"-{request.objective}" if request.self_supervised else ""
    return Path("runs") / f"{source.name}-{name}{what}".replace("/", "-")


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run directory for this process. Raises `PatchwordError` if another one holds it, or
    if the folder holds anything else; it is then left as it is."""
    if not is_run(run) and _strangers(run):
        raise PatchwordError(f"{run} exists and is not a run directory; choose another --out")
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PatchwordError(
                f"another process is training in {run}; stop it, or choose another --out"
            ) from None
        yield


def is_run(run: Path) -> bool:
    """Whether a folder is the directory of a run that was started."""
    return (run / CONFIG).exists() and (run / SPLITS).exists()


def clear(run: Path, spared: str | None = None) -> None:
    """Empty a run directory but for hidden entries and the one that is `spared`; what makes it one
    goes last."""
    last = [CONFIG, SPLITS]
    for entry in sorted(run.iterdir(), key=lambda entry: entry.name in last):
        if entry.name.startswith(".") or entry.name == spared:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _strangers(run: Path) -> list[str]:
    """What a folder holds that is not left by a run which was stopped before it started."""
    ours = {"environment.json", "classes.json", HEAD, INIT, SPLITS, f"{SPLITS}.tmp"}
    names = {entry.name for entry in run.iterdir()} if run.exists() else set()
    return sorted(name for name in names - ours if not name.startswith("."))


def stored_config(run: Path) -> Stored | None:
    """What a run that was started was asked for and found; None if there is no run. Raises
    `PatchwordError` if it cannot be read."""
    path = run / CONFIG
    if not path.exists():
        return None
    try:
        return read_config(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise PatchwordError(
            f"{path} cannot be read: {error}; start again with --overwrite"
        ) from None


def check_same(run: Path, asked: TrainSpec, stored: Stored) -> None:
    """Raise `UsageError`, naming them, if settings that may change the result are asked for which
    the run was not started with."""
    model = stored.request.model
    if stored.earlier and model is not None:  # without the options that the model lacks
        options = fitting_options(asked, model, model_family(model))
        asked = dataclasses.replace(asked, options=options)
    changes = stored.conflicts(asked)
    if changes:
        raise UsageError(
            f"{run} was started with other settings of {', '.join(changes)}; "
            "give the same ones to resume, another --out, or --overwrite to start again"
        )


def resumed(run: Path, asked: TrainSpec, stored: Stored) -> Settled:
    """What a run settled to, for a request that differs from its own at most in what cannot change
    the result. Raises `UsageError` where it differs in more."""
    check_same(run, asked, stored)
    if stored.settled is None:
        raise UsageError(f"{run} holds several runs; go on with --sweep or --runs")
    return stored.settled.asked_again(asked)


def check_init_outlives(run: Path, request: TrainSpec) -> None:
    """Raise `UsageError` if a run in `run` would overwrite the weights that it starts from."""
    if request.init is not None and Path(request.init).resolve().is_relative_to(run.resolve()):
        raise UsageError(
            f"--init {request.init} lies in {run}, which the run would overwrite; give another "
            "--out"
        )


def open_division(run: Path | None, source: Source, request: TrainSpec) -> Division:
    """The division saved with `run`, or without one that which the request makes. Raises
    `PatchwordError` if there are labels to learn and nothing to tell apart."""
    if len(source.classes) < 2 and not request.self_supervised:
        raise PatchwordError(
            f"{source.name} has one class ({', '.join(source.classes)}); give the folder above it, "
            "with a folder per class"
        )
    if run is not None:
        return load_division(run / SPLITS, source)
    data = request.data
    division = divide(source, val=data.val_fraction, test=data.test_fraction, seed=request.seed)
    if data.train_images is None:
        return division
    train = drawn(source.labels, division["train"], data.train_images, request.seed)
    return division | {"train": train}


def store(
    run: Path, request: TrainSpec, settled: Settled | None, source: Source, division: Division
) -> None:
    """Write what a run is, `config.json` last: with it the run counts as started. `settled` is None
    of a folder of several runs."""
    save_division(run / SPLITS, source, division)
    replace_text(run / "classes.json", json.dumps(list(source.classes), indent=0))
    replace_text(run / "environment.json", json.dumps(environment(source), indent=1))
    config = {"request": to_dict(request)} if settled is None else settled.to_dict()
    replace_text(run / CONFIG, json.dumps(config, indent=1))


def environment(source: Source) -> dict[str, Any]:
    """Versions, threads, commit and data of this run; what the result may depend on."""
    return {
        "patchword": patchword.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "platform": platform.platform(),
        "processor": processor(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "data_fingerprint": source.fingerprint,
    }


def note_changes(run: Path, source: Source, stored: Stored) -> None:
    """Say what is not as it was when the run started."""
    if stored.earlier and stored.settled is not None and stored.settled.parts > 1:
        logger.warning(
            "%s was started by an earlier version: images are mixed within a part of the step now, "
            "no longer across parts, so it does not resume bit for bit",
            run,
        )
    path = run / "environment.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    now = environment(source)
    if before.get("data_fingerprint") == source.size_fingerprint:  # of an earlier version
        del now["data_fingerprint"]
    changes = [
        f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]
    ]
    if changes:
        logger.warning(
            "not as when the run started, so it may not resume bit for bit: %s", "; ".join(changes)
        )


def _git(*arguments: str) -> str | None:
    """What git says of the checkout that patchword runs from, None if it is not in one."""
    command = ["git", "-C", os.fspath(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
