"""Short runs on the digits, in this process or in one of their own."""

import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

import patchword
from patchword.cli.main import main
from patchword.spec.parse import Interrupted
from patchword.training.loop import Loop

SETTINGS = {
    "steps": 10,
    "batch_size": 16,
    "width": 32,
    "depth": 2,
    "dropout": 0.1,
    "drop_path": 0.1,
    "mixup": 0.2,
    "parts": 2,
    "average": 0.9,
    "log_every": 3,
    "eval_every": 4,
    "checkpoint_every": 3,
    "workers": 0,
    "device": "cpu",
    "precision": "float32",
}


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """The report is tested elsewhere, and takes longer than these runs."""
    monkeypatch.setattr("patchword.run.finish.report_run", lambda *args: None)
    monkeypatch.setattr("patchword.run.pretraining.report", lambda *args: None)


@pytest.fixture
def train():
    """`train(run, **changes)`: the short run, in this process."""
    return lambda run, **changes: patchword.train("digits", out=run, **SETTINGS | changes)


@pytest.fixture
def stopped_at(monkeypatch):
    """`stopped_at(step, error)`: the next run ends by `error` after that step, before it is
    saved; by a signal without one."""

    def arrange(step, error=None):
        show = Loop.show

        def show_and_stop(self, *args):
            show(self, *args)
            if self.trainer.progress.step == step:
                monkeypatch.setattr(Loop, "show", show)
                if error is not None:
                    raise error
                self.signals.append(15)

        monkeypatch.setattr(Loop, "show", show_and_stop)
        return Interrupted if error is None else type(error)

    return arrange


@pytest.fixture(scope="session")
def state_of():
    """`state_of(run)`: what must be the same however often a run was interrupted."""
    spec = importlib.util.spec_from_file_location("kill", Path(__file__).with_name("kill.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.state_of


def words(run, **changes):
    """The short run as a command line."""
    values = SETTINGS | {"out": run} | changes
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in values.items()]
    flags = itertools.chain.from_iterable(pairs)
    return [sys.executable, "-m", "patchword", "train", "digits", *flags]


@pytest.fixture(scope="session")
def command():
    """`command(run, **changes)`: the short run as a command line."""
    return words


@pytest.fixture
def here(capsys):
    """`here(arguments)`: a command line in this process: its exit code and standard error."""

    def run(arguments):
        capsys.readouterr()
        code = main(arguments[arguments.index("patchword") + 1 :])
        return code, capsys.readouterr().err

    return run


@pytest.fixture(scope="session")
def shell():
    """`shell(arguments)`: a command, run to its end."""
    return lambda arguments, **options: subprocess.run(
        arguments, capture_output=True, text=True, timeout=200, **options
    )
