"""Full and read-only disks: a small file system of its own where that is permitted, else injected
errors."""

import errno
import json
import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest

from patchword.training import checkpoint
from patchword.training.checkpoint import Checkpoints, damage, write_text
from patchword.training.log import Lines
from patchword.training.loop import Loop, TrainingError
from patchword.weights.load import load_model


@pytest.fixture(scope="session")
def may_mount(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mount")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False)
    if done.returncode == 0:
        subprocess.run(["umount", folder], check=True)
    return done.returncode == 0


class Mount:
    """A small file system, filled up."""

    def __init__(self, folder):
        self.folder = folder
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], check=True)

    def fail(self):
        with (self.folder / "filler").open("wb") as file:
            file.write(b"x" * (shutil.disk_usage(self.folder).free - 8192))

    def free(self):
        (self.folder / "filler").unlink(missing_ok=True)

    def close(self):
        subprocess.run(["umount", self.folder], check=True)


class Injected:
    """Writes that fail with an error of our choice."""

    def __init__(self, folder, monkeypatch, code):
        self.folder, self.failing = folder, False
        for owner, name in ((checkpoint, "write_folder"), (Lines, "_write")):
            monkeypatch.setattr(owner, name, self.wrapped(getattr(owner, name), code))

    def wrapped(self, real, code):
        def write(*args):
            if self.failing:
                raise OSError(code, os.strerror(code))
            return real(*args)

        return write

    def fail(self):
        self.failing = True

    def free(self):
        self.failing = False

    def close(self):
        pass


@pytest.fixture(params=["mounted", "full", "read-only"])
def disk(request, tmp_path, monkeypatch, may_mount):
    """A disk that can be made to fail."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "mounted" and may_mount:
        disk = Mount(folder)
    else:
        code = errno.EROFS if request.param == "read-only" else errno.ENOSPC
        disk = Injected(folder, monkeypatch, code)
    yield disk
    disk.free()
    disk.close()


@pytest.fixture
def failing(monkeypatch):
    """`with failing(disk, first, last)`: the disk fails after step `first`, until `last`."""
    show = Loop.show

    @contextmanager
    def arrange(disk, first, last=None):
        def show_on_bad_disk(self, *args):
            step = self.trainer.progress.step
            if step == first:
                disk.fail()
            if step == last:
                disk.free()
            show(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(Loop, "show", show_on_bad_disk)
            yield

    return arrange


def test_stops_and_goes_on_when_there_is_space(tmp_path, train, state_of, disk, failing):
    run = disk.folder / "run"
    with failing(disk, first=5), pytest.raises(TrainingError) as stop:
        train(run)
    message = str(stop.value)
    assert "\n" not in message
    assert "cannot save at step 6" in message
    assert f"last good checkpoint: {run}/checkpoints/step-00000003" in message
    assert "No space left on device" in message or "Read-only file system" in message
    assert damage(run / "checkpoints/step-00000003") is None
    load_model(run / "last")
    disk.free()
    train(run)
    train(tmp_path / "whole")
    assert state_of(run) == state_of(tmp_path / "whole")


def test_goes_on_if_asked_and_loses_no_line(tmp_path, train, state_of, disk, failing, caplog):
    run = disk.folder / "run"
    settings = {"checkpoint_every": 1, "eval_every": 2, "log_every": 1, "average": 0.0}
    with failing(disk, first=3, last=8):
        train(run, on_save_error="continue", **settings)
    said = [r.getMessage() for r in caplog.records if "cannot save" in r.getMessage()]
    assert any("cannot save at step 5" in line for line in said)
    assert all(line.endswith("step-00000002; going on") for line in said)
    assert not any("\n" in line for line in said)
    train(tmp_path / "whole", **settings)
    whole, found = state_of(tmp_path / "whole"), state_of(run)
    for name in whole:
        if name.startswith(("last/", "metrics", "evaluations")):
            assert found[name] == whole[name], name


def test_a_run_whose_end_cannot_be_saved_is_not_finished(tmp_path, train, state_of, disk, failing):
    run = disk.folder / "run"
    wanted = "step 10, which could not be saved; last good checkpoint: .*06;"
    with failing(disk, first=7), pytest.raises(TrainingError, match=wanted):
        train(run, on_save_error="continue")
    assert not (run / "summary.json").exists()
    disk.free()
    train(run, on_save_error="continue")
    train(tmp_path / "whole")
    assert state_of(run) == state_of(tmp_path / "whole")


@pytest.mark.parametrize("on_save_error", ["stop", "continue"])
def test_the_command_says_it_in_one_line(tmp_path, command, shell, may_mount, on_save_error):
    """A disk too small for the run, as a user meets it."""
    if not may_mount:
        folder, arguments = tmp_path, ["prlimit", "--fsize=60000"]
    else:
        folder, arguments = tmp_path / "disk", []
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], check=True)
    try:
        run = folder / "run"
        done = shell(
            [*arguments, *command(run, on_save_error=on_save_error, crop="resize", depth=4)]
        )
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("patchword: ")
        wanted = "cannot save at step 3" if on_save_error == "stop" else "could not be saved"
        assert wanted in last
        assert ("going on" in done.stderr) == (on_save_error == "continue")
        assert not list((run / "checkpoints").glob(".writing-*"))
        lines = (run / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines][:1] == [3]
    finally:
        if may_mount:
            subprocess.run(["umount", folder], check=True)


def test_a_failed_save_leaves_nothing_behind(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, lambda folder: write_text(folder / "a", "a"))

    def fail(folder):
        (folder / "a").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space"):
        checkpoints.save(2, fail)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000001"]
    assert (tmp_path / "last").resolve().name == "step-00000001"
