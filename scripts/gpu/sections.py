"""The sections of scripts/on_gpu.sh, each in a process of its own with a time limit.

A section that fails or takes too long does not keep the next from running. `record.json` in the
folder `$OUT` (by default build/on_gpu) is written anew after each, so that a run which is cut short
leaves what it found. Only the standard library is needed to come this far.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / "build" / "wheels"
TOTAL = 465.0
"""Seconds for all sections: 8 minutes less what starting and stopping take."""
LEAST = 5.0
"""Seconds that a section is started with."""
TAIL = 25
"""Lines of a failed section's log that are shown."""


@dataclass(frozen=True)
class Section:
    """A command with a limit in seconds, and what reads its result."""

    name: str
    command: list[str]
    limit: float
    read: Callable[[], Any]


@dataclass
class Result:
    """How a section ended."""

    name: str
    status: str
    seconds: float
    limit: float
    found: Any = field(default=None)


# Before the sections -----------------------------------------------------------------------------


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, to compare it by."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def unpack_wheels(site: Path) -> list[str]:
    """Unpack the wheels of packages that are missing here or older; their names and versions."""
    unpacked: list[str] = []
    for wheel in sorted(WHEELS.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        try:
            here = importlib.metadata.version(name.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            here = ""
        if numbers(here) < numbers(version):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
            unpacked.append(f"{name} {version} (here: {here or 'none'})")
    return unpacked


def environment(site: Path, cache: Path) -> dict[str, str]:
    """Of every section. pytest's plugins stay out: a bare machine has many, and their warnings are
    errors here."""
    paths = [site, ROOT / "src", ROOT / "benchmarks"]
    here = os.environ.get("PYTHONPATH")
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *([here] if here else [])]),
        "PYTHONUNBUFFERED": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PATCHWORD_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "Agg",
    }


# The sections ------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """What a section wrote, None if it did not come to that."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def read_tests(path: Path) -> dict[str, Any] | None:
    """Counts, and the names of the tests that failed, of pytest's XML report."""
    try:
        suite = next(ET.parse(path).getroot().iter("testsuite"))
    except (OSError, ET.ParseError, StopIteration):
        return None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return counts | {"failed": failed}


def sections(device: str, quick: bool, work: Path) -> list[Section]:
    """What is run, after the environment."""
    python = sys.executable
    report, digits = work / "tests.xml", work / "digits.json"
    tests = [python, "-m", "pytest", "-m", "device", "tests/device", "-p", "no:cacheprovider", "-q"]
    runs = [python, "scripts/gpu/digits.py", str(work / "runs"), str(digits), "--device", device]
    found = [
        Section("tests", [*tests, f"--junitxml={report}"], 150, lambda: read_tests(report)),
        Section("digits", runs + ["--steps", "150"] * quick, 150, lambda: read_json(digits)),
    ]
    small = ["--image-size", "64", "--batch-size", "16", "--rounds", "3", "--depth", "1"]
    models = (("ViT-mu/16", 180),) if quick else (("ViT-B/16", 90), ("ViT-L/16", 150))
    for model, limit in models:
        name = f"step-{model.replace('/', '-')}"
        out = work / f"{name}.json"
        command = [python, "benchmarks/step_rate.py", "--model", model, "--device", device]
        command += ["--out", str(out), *(small if quick else [])]
        found.append(Section(name, command, limit, lambda out=out: read_json(out)))
    return found


def run(section: Section, log: Path, env: dict[str, str], left: float) -> Result:
    """Run a section to its end or its limit; its output goes to `log`."""
    limit = min(section.limit, left)
    if left < LEAST:
        return Result(section.name, "no time left", 0.0, section.limit)
    began = time.monotonic()
    with log.open("wb") as file:
        child = subprocess.Popen(
            section.command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            code = child.wait(limit)
            status = "passed" if code == 0 else f"failed (exit code {code})"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            status = "too slow"
    seconds = round(time.monotonic() - began, 1)
    return Result(section.name, status, seconds, limit, section.read())


# The record --------------------------------------------------------------------------------------


def commit() -> str | None:
    """That of the working tree, or what `PATCHWORD_COMMIT` says."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    except OSError:
        told = ""
    return told or os.environ.get("PATCHWORD_COMMIT")


def in_short(result: Result) -> str:
    """What a section found, in a few words."""
    found = result.found or {}
    if "tests" in found:
        bad = found["failures"] + found["errors"]
        return f"{found['tests']} tests, {bad} failed, {found['skipped']} skipped"
    if "resume" in found:
        top1 = f", top-1 {found['run']['top1']:.2%}" if "run" in found else ""
        return f"stopped at step {found['resume']['stopped_at']}, same bits{top1}"
    if "results" in found:
        rows = [
            f"{'compiled' if row['compiled'] else 'eager'} {row['images_per_second']:.0f} "
            f"images/s, {row['share']:.0%} of {row['product_tflops']:.3g} TFLOP/s"
            for row in found["results"]
        ]
        return f"{found['title']}: {'; '.join(rows)}"
    if "device" in found:
        device = found["device"] or {}
        missing = ", ".join(found["missing"]) or "nothing"
        return f"{device.get('name', device.get('type'))}; missing: {missing}"
    return ""


def tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(f"  | {line}" for line in lines[-TAIL:])


def say(result: Result, log: Path) -> None:
    print(f"{result.name}: {result.status}, {result.seconds:.0f} s", flush=True)
    if result.status != "passed":
        print(tail(log), flush=True)


def table(results: list[Result]) -> str:
    rows = [f"{r.name:16} {r.status:22} {r.seconds:6.1f} s  {in_short(r)}" for r in results]
    return "\n".join(["", f"{'section':16} {'status':22} {'time':>6}", *rows])


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The sections of scripts/on_gpu.sh")
    parser.add_argument("--quick", action="store_true", help="small models; always so on a CPU")
    parser.add_argument("--only", action="append", default=[], help="sections whose name has this")
    return parser.parse_args()


def main() -> int:
    """Exit code 1 if a section did not pass."""
    given, began = parsed(), time.monotonic()
    out = Path(os.environ.get("OUT") or ROOT / "build" / "on_gpu").absolute()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="patchword-gpu-") as folder:
        work = Path(folder)
        record: dict[str, Any] = {"commit": commit(), "unpacked": unpack_wheels(work / "site")}
        for line in record["unpacked"]:
            print(f"unpacked: {line}", flush=True)
        env = environment(work / "site", work / "cache")
        results: list[Result] = []

        def take(section: Section) -> None:
            log = out / f"{section.name}.log"
            results.append(run(section, log, env, TOTAL - (time.monotonic() - began)))
            say(results[-1], log)
            record["sections"] = [asdict(result) for result in results]
            record["seconds"] = round(time.monotonic() - began, 1)
            (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")

        script = [sys.executable, "scripts/gpu/environment.py", str(work / "environment.json")]
        take(Section("environment", script, 60, lambda: read_json(work / "environment.json")))
        found = results[0].found or {}
        device = (found.get("device") or {}).get("type", "cpu")
        record["quick"] = quick = given.quick or device == "cpu"
        env["PATCHWORD_TEST_DEVICE"] = device
        if device == "cpu":
            env.setdefault("OMP_NUM_THREADS", "1")  # threads wait for each other on a busy machine
        for section in sections(device, quick, work):
            if not given.only or any(part in section.name for part in given.only):
                take(section)
    print(table(results), flush=True)
    return 0 if all(result.status == "passed" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
