"""Flipped bits, truncated and missing files: found on load, and the checkpoint before is used."""

import random
import shutil

import pytest

import patchword
from patchword.spec.parse import Interrupted, PatchwordError
from patchword.training.checkpoint import damage
from patchword.training.loop import Loop
from patchword.weights.load import load_model

FILES = [
    "model.safetensors",
    "average.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
]


def flip(path, seed):
    data = bytearray(path.read_bytes())
    position = random.Random(seed).randrange(8 * len(data))
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)


def truncate(path, seed):
    data = path.read_bytes()
    path.write_bytes(data[: random.Random(seed).randrange(len(data))])


def remove(path, seed):
    path.unlink()


FAULTS = {"flip": flip, "truncate": truncate, "remove": remove}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run, and one stopped after step 7 with the checkpoints of 6 and 7."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {
        "steps": 10,
        "batch_size": 16,
        "width": 32,
        "depth": 1,
        "eval_every": 4,
        "checkpoint_every": 3,
        "precision": "float32",
    }
    show = Loop.show

    def show_and_stop(self, *args):
        show(self, *args)
        if self.trainer.progress.step == 7:
            self.signals.append(15)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("patchword.run.finish.report_run", lambda *args: None)
        patchword.train("digits", out=folder / "whole", **settings)
        patch.setattr(Loop, "show", show_and_stop)
        with pytest.raises(Interrupted):
            patchword.train("digits", out=folder / "stopped", **settings)
    return folder, settings


@pytest.fixture
def stopped(runs, tmp_path):
    """A copy of the stopped run to damage."""
    shutil.copytree(runs[0] / "stopped", tmp_path / "run", symlinks=True)
    return tmp_path / "run"


@pytest.fixture
def resume(runs, stopped):
    """The same call again on that copy."""
    return lambda **changes: patchword.train("digits", out=stopped, **runs[1] | changes)


@pytest.mark.grows
@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found(runs, tmp_path, effort, record_property, name):
    """At both ends of each file, where the structure is, and at random in between."""
    folder = tmp_path / "copy"
    shutil.copytree(runs[0] / "stopped/checkpoints/step-00000007", folder)
    assert damage(folder) is None
    data = (folder / name).read_bytes()
    size = 8 * len(data)
    positions = {*range(64), *range(size - 64, size)}
    rng = random.Random(0)
    positions |= {rng.randrange(size) for _ in range(effort(40, 2_000, 20_000))}
    for position in sorted(positions):
        changed = bytearray(data)
        changed[position // 8] ^= 1 << position % 8
        (folder / name).write_bytes(changed)
        assert damage(folder) is not None, position
    (folder / name).write_bytes(data)
    assert damage(folder) is None
    record_property("flipped bits of a checkpoint", len(positions))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_checkpoint_before_is_used_and_named(
    runs, stopped, resume, state_of, caplog, capsys, name, fault
):
    newest = stopped / "checkpoints/step-00000007"
    FAULTS[fault](newest / name, name)
    resume()
    warning = next(r.getMessage() for r in caplog.records if "is damaged" in r.message)
    assert f"checkpoint {newest} is damaged" in warning
    assert "\n" not in warning
    assert "step-00000006" in capsys.readouterr().err.replace("\n", "")
    assert state_of(stopped) == state_of(runs[0] / "whole")


def test_all_damaged_is_one_clear_error(resume, stopped):
    for number, folder in enumerate(sorted((stopped / "checkpoints").glob("step-*"))):
        flip(folder / "model.safetensors", number)
    with pytest.raises(PatchwordError, match=r"every checkpoint under .* is damaged;.*overwrite"):
        resume()


@pytest.mark.parametrize("seed", range(20))
def test_damaged_weights_do_not_load(runs, stopped, seed):
    flip(stopped / "best/model.safetensors", seed)
    with pytest.raises(PatchwordError) as error:
        load_model(stopped)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_best_weights_are_chosen_anew(runs, stopped, resume, caplog, fault):
    """The run finishes, with the best of what came after."""
    FAULTS[fault](stopped / "best/model.safetensors", 0)
    result = resume()
    assert any("best weights" in r.getMessage() for r in caplog.records)
    assert result.summary["best_step"] in (8, 10)
    load_model(stopped)


def test_damaged_log_lines_are_named_and_left_out(runs, stopped, resume, caplog):
    path = stopped / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\xff" + lines[1] + b"".join(lines[2:]) + b'{"step": 7, "lo')
    resume()
    assert any("line 2 is damaged" in r.getMessage() for r in caplog.records)
    whole = (runs[0] / "whole/metrics.jsonl").read_bytes().splitlines()
    assert len(path.read_bytes().splitlines()) == len(whole) - 1


def test_a_damaged_config_is_one_clear_error(resume, stopped):
    path = stopped / "config.json"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(PatchwordError, match=r"config.json cannot be read: .*--overwrite"):
        resume()
    result = resume(overwrite=True)
    assert result.summary["steps"] == 10
