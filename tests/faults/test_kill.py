"""`kill -9` at random instants of real processes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.grows
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long)])
def test_killed_runs_end_with_the_same_bits(effort, record_property, seed):
    """With two seeds, so that two cores kill at once."""
    kills = effort(3, 25, 100)
    script = Path(__file__).with_name("kill.py")
    done = subprocess.run(
        [sys.executable, script, "--kills", str(kills), "--seed", str(seed)],
        capture_output=True,
        text=True,
        timeout=60 * kills,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills, 0 differences" in done.stdout
    for count, phase in re.findall(r"(\d+) kills (.+)", done.stdout):
        record_property(f"kills {phase}", int(count))
