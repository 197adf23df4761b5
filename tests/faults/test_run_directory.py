"""What the same command, another one, or a second process does to a run directory."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from settling import config

from patchword.data.registry import open_source
from patchword.run import folder as runs
from patchword.spec.parse import PatchwordError, UsageError
from patchword.spec.settled import flatten
from patchword.training.checkpoint import Checkpoints


def snapshot(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_a_finished_run_is_left_as_it_is(tmp_path, train, command, here):
    run = tmp_path / "run"
    train(run)
    before = snapshot(run)
    code, said = here(command(run))
    assert code == 0
    assert f"{run} is finished; --overwrite trains it again" in said.replace("\n", "")
    assert snapshot(run) == before


def test_a_run_directory_of_an_earlier_version_resumes(
    tmp_path, train, stopped_at, state_of, caplog
):
    """Which knows file sizes in place of contents; what its version would have noticed is said."""
    train(tmp_path / "whole")
    run = tmp_path / "run"
    with pytest.raises(stopped_at(4)):
        train(run)
    source = open_source("digits")
    made = {
        "files": "\0".join(source.keys).encode(),
        "labels": source.labels.astype("<i8").tobytes(),
        "classes": "\0".join(source.classes).encode(),
        "file sizes": np.full(1797, 64, "<i8").tobytes(),
    }
    digests = {what: hashlib.sha256(data).hexdigest() for what, data in made.items()}
    old = hashlib.sha256("".join(digests.values()).encode()).hexdigest()

    def pretend(environment, **division):
        for name, changes in (("environment.json", environment), ("splits.json", division)):
            content = json.loads((run / name).read_text()) | changes
            (run / name).write_text(json.dumps(content))

    pretend({"data_fingerprint": "0" * 64}, fingerprint=old, digests=digests)
    caplog.set_level("INFO")
    with pytest.raises(stopped_at(7)):
        train(run)
    assert f"data_fingerprint {'0' * 64} -> {source.fingerprint}" in caplog.text
    caplog.clear()
    pretend({"data_fingerprint": old})
    train(run)
    assert "not as when the run started" not in caplog.text
    assert caplog.text.count("is of an earlier version: its images are matched by name") == 1
    assert state_of(run) == state_of(tmp_path / "whole")


def pretend_earlier(run):
    """Write the run's config as before 0.2."""
    flat = flatten(json.loads((run / "config.json").read_text()))
    flat["optim"]["accumulate"] = flat["optim"].pop("parts")
    (run / "config.json").write_text(json.dumps(flat))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_flat_config_of_an_earlier_version_resumes(
    tmp_path, train, stopped_at, state_of, caplog, parts
):
    """It holds only what was found. A step in several parts was augmented as a whole: that is
    said."""
    train(tmp_path / "whole", parts=parts)
    run = tmp_path / "run"
    with pytest.raises(stopped_at(4)):
        train(run, parts=parts)
    pretend_earlier(run)
    with pytest.raises(UsageError, match=r"other settings of seed, optim\.weight_decay"):
        train(run, parts=parts, seed=7, weight_decay=0.3)
    caplog.set_level("INFO")
    train(run, parts=parts)
    assert ("images are mixed within a part" in caplog.text) == (parts > 1)
    caplog.clear()
    train(run, parts=parts)
    assert "images are mixed" not in caplog.text  # it is finished
    assert state_of(run) == state_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ({}, {"registers": 1}, "options.registers"),
        ({"registers": 1}, {}, "options.registers"),
        ({"train_images": 500}, {}, "data.train_images"),
    ],
    ids=str,
)
def test_a_flat_config_refuses_other_settings(tmp_path, train, before, now, named):
    """None where nothing is found out is a setting like any other."""
    train(tmp_path, **before)
    pretend_earlier(tmp_path)
    with pytest.raises(UsageError, match=f"other settings of {named};"):
        train(tmp_path, **now)
    train(tmp_path, **before)


def test_other_settings_are_refused_and_named(tmp_path, train, command, here):
    run = tmp_path / "run"
    train(run)
    before = snapshot(run)
    code, said = here(command(run, lr=0.5, batch_size=32))
    assert code == 2
    assert "batch_size, optim.lr" in said
    assert len(said.strip().splitlines()) == 1
    assert snapshot(run) == before


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"heads": 2}, "options.heads"),
        ({"crop_fraction": 0.5}, "preprocess.crop_fraction"),
        ({"image_size": 32}, "image_size"),
        ({"eval_every": 5}, "eval_every"),
        ({"log_every": 4}, "log_every"),
    ],
    ids=str,
)
def test_settings_left_out_are_other_settings(tmp_path, train, setting, named):
    """Even where leaving them out means automatic, or the variant's own."""
    rest = {"eval_every": None, "log_every": None}
    train(tmp_path, **rest | setting)
    with pytest.raises(UsageError, match=rf"other settings of {named};"):
        train(tmp_path, **rest)


def test_settings_that_change_no_weights_may_differ(tmp_path, train, stopped_at, state_of):
    train(tmp_path / "whole")
    run = tmp_path / "run"
    with pytest.raises(stopped_at(5)):
        train(run)
    train(run, workers=1, keep=3, checkpoint_every=2, on_nan="rollback", on_save_error="continue")
    assert state_of(run) == state_of(tmp_path / "whole")


def test_overwrite_starts_again(tmp_path, train, state_of):
    train(tmp_path / "run")
    (tmp_path / "run/.hidden").write_text("of the user")
    train(tmp_path / "run", overwrite=True, seed=1)
    train(tmp_path / "other", seed=1)
    assert state_of(tmp_path / "run") == state_of(tmp_path / "other")
    assert (tmp_path / "run/.hidden").read_text() == "of the user"


@pytest.mark.parametrize(
    "changes",
    [{"model": "ViT-Tii/2"}, {"width": 33}, {"init": "nowhere"}, {"init": "run"}],
    ids=str,
)
def test_a_run_that_cannot_start_overwrites_nothing(tmp_path, train, monkeypatch, changes):
    monkeypatch.chdir(tmp_path)
    run = Path("run")
    train(run)
    before = snapshot(run)
    with pytest.raises(PatchwordError):
        train(run, overwrite=True, **changes)
    assert snapshot(run) == before


@pytest.mark.parametrize("survivors", range(1, 6))
def test_a_clearing_that_was_killed_can_be_taken_up(tmp_path, train, monkeypatch, survivors):
    """Wherever it was killed, the folder still counts as a run directory."""
    run = tmp_path / "run"
    train(run)
    unlink = Path.unlink

    def unlink_or_die(self, **options):
        if len([path for path in run.iterdir() if path.name[0] != "."]) <= survivors:
            raise KeyboardInterrupt
        unlink(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink_or_die)
        with pytest.raises(KeyboardInterrupt):
            train(run, overwrite=True)
    train(run, overwrite=True, seed=1)
    assert config(run).seed == 1


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("files", [["photo.jpg"], ["config.json", "model.safetensors"]])
def test_a_folder_that_is_no_run_is_not_touched(tmp_path, train, overwrite, files):
    for name in files:
        (tmp_path / name).write_text("{}")
    before = snapshot(tmp_path)
    with pytest.raises(PatchwordError, match="is not a run directory; choose another --out"):
        train(tmp_path, overwrite=overwrite)
    assert snapshot(tmp_path) == before


def test_a_run_that_was_stopped_before_it_was_stored_starts(tmp_path, train):
    """With another seed, so that the division left behind must not be used."""
    train(tmp_path / "other", seed=1)
    run = tmp_path / "run"
    train(run)
    splits = (run / "splits.json").read_bytes()
    runs.clear(run)
    (run / "splits.json").write_bytes(splits)
    (run / "splits.json.tmp").write_bytes(splits[:100])
    (run / "classes.json").write_text("[]")
    train(run, seed=1)
    assert (run / "splits.json").read_bytes() == (tmp_path / "other/splits.json").read_bytes()


def test_a_second_process_is_refused(tmp_path, train, command, shell):
    run = tmp_path / "run"
    with runs.locked(run):
        done = shell(command(run))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        f"patchword: another process is training in {run}; stop it, or choose another --out"
    ]
    train(run)


def test_time_is_turned_into_steps_once(tmp_path, train, stopped_at):
    run = tmp_path / "run"
    settings = {"steps": None, "time": "10m", "eval_every": None, "checkpoint_every": None}
    with pytest.raises(stopped_at(1)):
        train(run, **settings)
    written = (run / "config.json").read_bytes()
    assert json.loads(written)["settled"]["steps"] > 2
    with pytest.raises(UsageError, match="time"):
        train(run, **settings | {"time": "20m"})
    with pytest.raises(stopped_at(2)):
        train(run, **settings)
    assert (run / "config.json").read_bytes() == written


def test_what_changed_since_the_start_is_said(tmp_path, train, stopped_at, caplog):
    run = tmp_path / "run"
    with pytest.raises(stopped_at(3)):
        train(run)
    path = run / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"torch": "1.0"}))
    train(run)
    assert any("torch 1.0 -> " in r.getMessage() for r in caplog.records)


def test_weights_are_as_readable_as_other_files(tmp_path, train):
    train(tmp_path / "run", steps=1, log_every=1)
    folder = Checkpoints(tmp_path / "run", 2).steps()[0]
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1


def test_a_missing_data_source_leaves_nothing(tmp_path, here, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _ = here(["patchword", "train", "nowhere", "--out", "run"])
    assert code in (1, 2)
    assert not (tmp_path / "run").exists()
