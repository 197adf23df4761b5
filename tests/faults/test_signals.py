"""SIGTERM and SIGINT to real processes: a checkpoint within one step, and the right exit code."""

import json
import os
import signal
import subprocess
import time

import pytest

LONG = {"steps": 100_000, "checkpoint_every": 50_000, "eval_every": 50_000, "log_every": 1}


def start(arguments, run, wait_for=5):
    """A process in a group of its own, some steps after its start."""
    child = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) < wait_for:
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return child


def checkpoint_of(run):
    return json.loads((run / "last/state.json").read_text())["step"]


def last_line(run):
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]


@pytest.mark.parametrize(
    ("signum", "code", "workers"), [(signal.SIGTERM, 143, 0), (signal.SIGINT, 130, 2)]
)
def test_saves_within_one_step(tmp_path, command, shell, signum, code, workers):
    """SIGTERM to the process alone; SIGINT to it and its workers, as a terminal sends it."""
    run = tmp_path / "run"
    arguments = command(run, crop="inception", **LONG | {"workers": workers})
    child = start(arguments, run)
    before = last_line(run)
    os.killpg(child.pid, signum) if workers else child.send_signal(signum)
    _, said = child.communicate(timeout=60)
    assert child.returncode == code, said
    step = checkpoint_of(run)
    assert step == last_line(run)
    assert 0 <= step - before < 500
    assert "Traceback" not in said
    name = signal.Signals(signum).name
    last = said.strip().splitlines()[-1]
    assert last == f"stopped by {name} after step {step}; run the same command to go on"
    child = start(arguments, run, step + 2)  # goes on from there, and is stopped again
    child.send_signal(signum)
    _, said = child.communicate(timeout=60)
    assert child.returncode == code, said
    assert checkpoint_of(run) > step


def test_the_same_signal_twice_at_once_is_one(tmp_path, command):
    """timeout(1) signals its child, and then the group that the child is in."""
    run = tmp_path / "run"
    child = start(command(run, **LONG), run)
    for _ in range(3):
        os.killpg(child.pid, signal.SIGTERM)
        time.sleep(0.001)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 143, said
    assert checkpoint_of(run) == last_line(run)


def test_trains_outside_the_main_thread(tmp_path, train):
    """Python allows no signal handlers there."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(train, tmp_path / "run", steps=2, log_every=1).result()
    assert result.summary["steps"] == 2
