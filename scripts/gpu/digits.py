"""A run on the digits, evaluated in two batch sizes; then one that is stopped and goes on.

    python scripts/gpu/digits.py FOLDER RESULT.json [--steps N]

The second part is what a user does: `--deterministic`, SIGTERM after the first checkpoint, the same
call again in a process of its own; all weights must be bit for bit those of a run that was never
stopped.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch

import patchword
from patchword.spec.train import Device
from patchword.weights.native import load_tensors

CHILD = """
import sys, patchword
from patchword.spec.parse import Interrupted
from patchword.run import finish as finishing
finishing.report_run = lambda *_: None
try:
    patchword.train("digits", out=sys.argv[1], device=sys.argv[2], steps=int(sys.argv[3]),
                    checkpoint_every=10, eval_every=50, deterministic=True, workers=0)
except Interrupted as stop:
    sys.exit(stop.exit_code)
"""
"""Training from Python: a bare machine may have no tyro, which the command line needs. The report,
drawn on the CPU, takes longer than the run."""


def start(run: Path, device: str, steps: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CHILD, str(run), device, str(steps)])


def stopped(run: Path, device: str, steps: int) -> int:
    """Send SIGTERM once there is a checkpoint; returns the exit code."""
    child = start(run, device, steps)
    while child.poll() is None and not any((run / "checkpoints").glob("step-*")):
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    return child.wait()


def differing(one: Path, other: Path) -> list[str]:
    """Names of the tensors of two runs' last and best weights and optimiser that are not equal."""
    found: list[str] = []
    for part in ("last", "best"):
        names = {path.name for run in (one, other) for path in (run / part).glob("*.safetensors")}
        for name in sorted(names):
            ours, theirs = (load_tensors(run / part / name)[0] for run in (one, other))
            keys = sorted(ours.keys() | theirs.keys())
            found += [
                f"{part}/{name}: {key}"
                for key in keys
                if key not in ours or key not in theirs or not torch.equal(ours[key], theirs[key])
            ]
    return found


def resumed(folder: Path, device: str, steps: int) -> dict[str, Any]:
    """Raises `AssertionError` on any difference, and if nothing was stopped."""
    assert start(folder / "whole", device, steps).wait() == 0, "the undisturbed run failed"
    code = stopped(folder / "stopped", device, steps)
    assert code == 143, f"SIGTERM ended the run with exit code {code}, not 143"
    at = json.loads((folder / "stopped" / "last" / "state.json").read_text())["step"]
    assert start(folder / "stopped", device, steps).wait() == 0, "the resumed run failed"
    different = differing(folder / "whole", folder / "stopped")
    assert not different, f"not the same bits after a stop at step {at}: {different[:5]}"
    return {"steps": steps, "stopped_at": at, "differing_tensors": len(different)}


def trained(folder: Path, device: Device, steps: int | None, least: float) -> dict[str, Any]:
    """The run, and its figures on the test part in two batch sizes, which must agree."""
    began = time.monotonic()
    length: dict[str, Any] = {} if steps is None else {"steps": steps}
    run = patchword.train("digits", out=folder / "digits", device=device, **length)
    seconds = time.monotonic() - began
    found = [
        patchword.evaluate(
            folder / "digits", "digits", split="test", device=device, batch_size=size
        ).classification
        for size in (7, 512)
    ]
    one, other = found
    assert one.top1 == other.top1, f"top-1 {one.top1} and {other.top1} in two batch sizes"
    assert abs(one.loss - other.loss) < 2e-3, f"loss {one.loss} and {other.loss}"
    assert one.top1 > least, f"top-1 {one.top1:.2%} on test is too low"
    return {"steps": run.summary["steps"], "top1": one.top1, "loss": one.loss, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description="A run on the digits, and an exact resume")
    parser.add_argument("folder", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--steps", type=int, help="of the first run, by default its recipe's")
    given = parser.parse_args()
    device = cast(Device, given.device)
    least = 0.95 if given.steps is None else 0.5
    result: dict[str, Any] = {"resume": resumed(given.folder, device, 60)}
    given.result.write_text(json.dumps(result))
    result["run"] = trained(given.folder, device, given.steps, least)
    given.result.write_text(json.dumps(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
