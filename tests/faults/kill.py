"""Kill real `patchword train` processes at random instants; the same command must finish the run
with the very bits of an undisturbed one.

    python tests/faults/kill.py --kills 40 --seed 0

Every other process is killed at an instant spread over its whole life; the others once a save is
under way, or a moment later. Prints how many kills fell where; exits 1 on any difference.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from patchword.weights.native import load_tensors

STEPS = 30
TIMES = {"time", "seconds", "images_per_s", "data_wait"}
"""what may differ between runs that are the same"""


def state_of(run: Path) -> dict[str, Any]:
    """Everything a run leaves that must not depend on how often it was interrupted: tensors as
    bytes, headers, progress, log lines."""
    state: dict[str, Any] = {"last": (run / "last").resolve().name}
    for folder in ("last", "best"):
        for file in sorted((run / folder).glob("*.safetensors")):
            tensors, header = load_tensors(file)
            state[f"{folder}/{file.name}"] = header | {
                name: (str(value.dtype), value.flatten().numpy().tobytes())
                for name, value in tensors.items()
            }
    state["progress"] = _timeless(json.loads((run / "last" / "state.json").read_text()))
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        lines = (run / name).read_text().splitlines()
        state[name] = [_timeless(json.loads(line)) for line in lines]
    return state


def _timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in TIMES}


def command(run: Path, workers: int) -> list[str]:
    """A run of a second or two that saves at every step."""
    options = {
        "depth": 1,
        "width": 32,
        "steps": STEPS,
        "batch-size": 16,
        "eval-every": 10,
        "checkpoint-every": 1,
        "log-every": 3,
        "dropout": 0.1,
        "crop": "inception",
        "workers": workers,
        "device": "cpu",
        "out": run,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "patchword", "train", "digits", *flags]


class Killer:
    """Starts the command over and over, and kills it."""

    def __init__(self, folder: Path, kills: int, seed: int) -> None:
        self.folder, self.kills, self.rng = folder, kills, random.Random(seed)
        self.phases: Counter[str] = Counter()
        self.different: list[str] = []
        self.life = self.finish(folder / "reference", 0)
        self.wanted = state_of(folder / "reference")

    def finish(self, run: Path, workers: int) -> float:
        """Run to the end, undisturbed; returns the seconds taken."""
        started = time.monotonic()
        done = subprocess.run(command(run, workers), capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise SystemExit(f"exit code {done.returncode}: {done.stderr}")
        return time.monotonic() - started

    def run(self) -> None:
        """Kill runs until the kills are used up; every one of them is finished and compared."""
        number = killed = 0
        while killed < self.kills:
            run, finished = self.folder / f"run-{number}", False
            while killed < self.kills and not finished:
                finished = not self.kill(
                    run, in_save=killed % 2 == 1, workers=2 * (killed // 2 % 2)
                )
                killed += not finished
            if not finished:
                self.finish(run, 0)
            self.compare(run)
            shutil.rmtree(run)
            number += 1

    def kill(self, run: Path, in_save: bool, workers: int) -> bool:
        """Start the command and kill it; False if it ended before."""
        before = newest(run)
        log = (self.folder / "log").open("wb")
        child = subprocess.Popen(command(run, workers), stdout=log, stderr=log)
        if in_save:
            skipped = self.rng.randrange(8)
            while child.poll() is None and (not saving(run) or skipped):
                if saving(run):
                    skipped -= 1
                    time.sleep(self.rng.uniform(0, 0.05))
            time.sleep(self.rng.uniform(0, 0.01))
        else:
            deadline = time.monotonic() + self.rng.uniform(0, self.life)
            while child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.002)
        if child.poll() is not None:
            if child.returncode:
                text = (self.folder / "log").read_text()
                raise SystemExit(f"exit code {child.returncode}: {text}")
            return False
        child.kill()
        child.wait()
        self.phases[phase(run, before)] += 1
        return True

    def compare(self, run: Path) -> None:
        """Note what differs from the undisturbed run."""
        found = state_of(run)
        names = sorted(found.keys() | self.wanted.keys())
        differing = [name for name in names if found.get(name) != self.wanted.get(name)]
        self.different += [f"{run.name}: {name}" for name in differing]


def saving(run: Path) -> bool:
    """Whether a checkpoint is being written, or an old one removed."""
    folder = run / "checkpoints"
    return any(folder.glob(".writing-*")) or any(folder.glob(".removing-*"))


def newest(run: Path) -> str:
    """The name of the newest checkpoint."""
    return max((path.name for path in (run / "checkpoints").glob("step-*")), default="")


def phase(run: Path, before: str) -> str:
    """Where in its life a killed process was."""
    if saving(run):
        return "during a save"
    if not (run / "config.json").exists():
        return "before the run was stored"
    if newest(run) == before:
        return "before the first step"
    return "after the last step" if newest(run) == f"step-{STEPS:08d}" else "in training"


def main() -> int:
    """Exit code 1 if any run ended differently."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        killer = Killer(Path(folder), args.kills, args.seed)
        killer.run()
    for name, count in killer.phases.most_common():
        print(f"{count:4} kills {name}")
    for line in killer.different:
        print(f"differs from the undisturbed run: {line}")
    print(f"{args.kills} kills, {len(killer.different)} differences")
    return 1 if killer.different else 0


if __name__ == "__main__":
    sys.exit(main())
