"""The tests that grow with effort, at their full counts, and the record of what they came to.

    make soak

Hundreds of kills, a million mutated images: hours. Writes `results/soak-MACHINE.json`, and exits 1
if anything failed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import timing

TESTS = Path(__file__).parent.parent / "tests" / "faults"


def run(effort: str, report: Path) -> int:
    """Run the tests into a JUnit report; pytest's exit code."""
    command = [sys.executable, "-m", "pytest", "-n", "auto", "--effort", effort]
    into = [f"--junitxml={report}", "-o", "junit_family=legacy"]  # the others hold no properties
    return subprocess.run([*command, *into, str(TESTS)]).returncode


def summarize(report: Path) -> dict[str, Any]:
    """What a JUnit report says: counts that the tests recorded, and each test with its outcome."""
    counts: Counter[str] = Counter()
    tests: list[dict[str, Any]] = []
    for case in ElementTree.parse(report).iter("testcase"):
        for property in case.iter("property"):
            counts[property.attrib["name"]] += int(property.attrib["value"])
        bad = any(case.find(kind) is not None for kind in ("failure", "error"))
        tests.append(
            {
                "name": f"{case.attrib['classname']}::{case.attrib['name']}",
                "passed": not bad,
                "seconds": float(case.attrib["time"]),
            }
        )
    return {"counts": dict(sorted(counts.items())), "tests": tests}


def main(effort: str = "soak") -> int:
    """Exit code 0 if all passed."""
    started, date = time.monotonic(), datetime.now(UTC)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = run(effort, report)
        if not report.exists():  # pytest could not start
            return code
        content = summarize(report)
    head = {
        "date": date.isoformat(timespec="seconds"),
        "effort": effort,
        "passed": code == 0,
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    print(f"record {timing.record(effort, 'cpu', head | content)}")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
