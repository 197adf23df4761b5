"""`kill -9` at random instants of real processes."""

import subprocess
import sys
from pathlib import Path


def test_killed_runs_end_with_the_same_bits():
    script = Path(__file__).with_name("kill.py")
    done = subprocess.run(
        [sys.executable, script, "--kills", "6", "--seed", "1"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 kills, 0 differences" in done.stdout
