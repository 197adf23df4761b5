"""Weight files made to harm: nothing in them runs, none takes more memory than it is large, and all
end in one readable line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.grows

PARSING = 32 << 20
"""Bytes that parsing may take besides twice the size of the file: the deepest pickle makes 200,000
small objects, each of which tracemalloc keeps books on. A file that inflates takes far more."""


@pytest.fixture(scope="module")
def outcome(
    tmp_path_factory: pytest.TempPathFactory, effort: Callable[[int, int, int], int]
) -> dict[str, Any]:
    """What loading every file came to, in a process of its own that watches itself."""
    program, folder = Path(__file__).with_name("hostile.py"), tmp_path_factory.mktemp("hostile")
    times = effort(1, 8, 50)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), str(folder), str(times)],
        capture_output=True,
        text=True,
        timeout=200 * times,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_nothing_runs_and_nothing_is_written(
    outcome: dict[str, Any], record_property: Callable[[str, object], None]
):
    """No command, no connection, no file opened to write: by Python's audit events, and by the file
    that the code in the files would leave."""
    assert outcome["seen"] == []
    assert outcome["marks"] == []
    record_property("hostile weight files", len(outcome["cases"]))


def test_each_is_one_readable_error(outcome: dict[str, Any]):
    rows = outcome["cases"]
    certain = [row for row in rows if not row["case"].startswith("flipped")]
    assert len(certain) >= 300
    for row in rows:
        if row in certain or row["error"]:
            assert row["error"] in ("PatchwordError", "UsageError"), row
            assert "\n" not in row["message"], row
            assert 20 < len(row["message"]) < 500, row
            assert "allocat" not in row["message"], row
    flipped = [row for row in rows if row not in certain]
    assert sum(row["error"] is not None for row in flipped) > 0.6 * len(flipped)


def test_none_takes_more_memory_than_it_is_large(outcome: dict[str, Any]):
    for row in outcome["cases"]:
        for kind in ("traced", "resident"):
            assert row[kind] < 2 * row["bytes"] + PARSING, row
