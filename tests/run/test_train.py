"""`patchword train` from end to end on small generated data."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from settling import config, stored

import patchword
from patchword import PatchwordError, UsageError, load_model
from patchword.cli import main as cli
from patchword.run.inputs import Inputs
from patchword.training.criterion import TOP1
from patchword.training.log import read_lines
from patchword.training.loop import Loop
from patchword.training.recipes import recipe_spec
from patchword.training.trainer import Trainer
from patchword.weights.load import read_weights

Command = Callable[..., tuple[int, str, str]]
MakePhotos = Callable[..., Path]


def test_the_run_directory(finished: Path, photos: Path):
    names = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    assert names >= {
        "config.json",
        "environment.json",
        "classes.json",
        "splits.json",
        "metrics.jsonl",
        "metrics.csv",
        "evaluations.jsonl",
        "summary.json",
        "checkpoints",
        "best",
        "last",
        "report.html",
        "MODEL_CARD.md",
    }
    assert json.loads((finished / "classes.json").read_text()) == ["blue", "green", "red"]
    spec = config(finished)
    assert spec.source == str(photos)
    assert (spec.device, spec.steps, spec.epochs) == ("cpu", 30, None)
    assert spec.precision in ("float32", "bfloat16")
    assert spec.eval_every is not None
    assert spec.checkpoint_every is not None
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["finished"]
    assert summary["steps"] == 30
    assert summary["images"] == 240
    assert summary["split"] == "test"
    assert summary["bad_images"] == 1
    assert summary["top1"] > 0.5
    environment = json.loads((finished / "environment.json").read_text())
    assert {"torch", "threads", "git_commit", "data_fingerprint"} <= environment.keys()


def test_the_weights_describe_themselves(finished: Path):
    model = load_model(finished)
    assert model.classes == ("blue", "green", "red")
    assert model.spec.image_size == (16, 16)
    summary = json.loads((finished / "summary.json").read_text())
    _, file = read_weights(finished)
    assert file.extra == {"step": summary["best_step"], "weights": summary["best_weights"]}


def test_metrics_csv_equals_jsonl(finished: Path):
    lines = read_lines(finished / "metrics.jsonl")
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 25, 30]
    assert [line["images"] for line in lines] == [40, 80, 120, 160, 200, 240]
    with (finished / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [list(row) for row in rows] == [list(line) for line in lines]
    assert [{k: float(v) for k, v in row.items()} for row in rows] == lines
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_evaluations_choose_the_best(finished: Path):
    lines = read_lines(finished / "evaluations.jsonl")
    assert {line["split"] for line in lines} == {"val"}  # never on test
    assert {line["weights"] for line in lines} == {"raw", "average"}
    summary = json.loads((finished / "summary.json").read_text())
    (kept,) = (
        line
        for line in lines
        if (line["step"], line["weights"]) == (summary["best_step"], summary["best_weights"])
    )
    top = max(line["top1"] for line in lines)
    bar = TOP1.bar(top, kept)
    assert bar <= kept["top1"] == summary["best_val_top1"]
    assert all(line["top1"] < bar for line in lines if line["step"] > kept["step"])


@pytest.mark.parametrize(
    ("n", "figures", "kept"),
    [
        (272, [(0.978, 0.967), (0.971, 0.974), (0.971, 0.971)], (3, "average")),
        (272, [(0.978, 0.967), (0.971, 0.974), (0.971, 0.965)], (3, "raw")),
        (272, [(0.978, 0.967), (0.971, 0.974), (0.96, 0.96)], (2, "average")),
        (100_000, [(0.978, 0.967), (0.971, 0.974), (0.971, 0.971)], (1, "raw")),
        (100_000, [(0.9, 0.9), (0.9, 0.9), (0.8, 0.9)], (3, "average")),
        (40, [(1.0, 1.0), (0.98, 0.98), (0.9, 0.9)], (2, "average")),
        (272, [(0.5, 0.5), (math.nan, math.nan), (0.4, 0.6)], (3, "average")),
    ],
)
def test_the_last_weights_that_are_as_good_as_any_are_kept(
    photos: Path,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    n: int,
    figures: list[tuple[float, float]],
    kept: tuple[int, str],
):
    """As good is within a standard error; of equal ones the average."""
    given = iter(figure for pair in figures for figure in pair)
    real = Inputs.evaluator
    monkeypatch.setattr(
        Inputs,
        "evaluator",
        lambda self, part, _=None: (
            (lambda _: {"top1": next(given), "loss": 1.0, "n": n})
            if part == "val"
            else real(self, part)
        ),
    )
    monkeypatch.setattr("patchword.run.finish.report_run", lambda *_: None)
    words = [*flags, "--steps", "3", "--eval-every", "1", "--average", "0.9"]
    assert cli.main(["train", str(photos), *words, "--out", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["best_step"], summary["best_weights"]) == kept


def test_report_and_card(finished: Path):
    report = (finished / "report.html").read_text()
    assert "green" in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    card = (finished / "MODEL_CARD.md").read_text()
    assert card.startswith("---\n")
    assert "blue" in card


def test_the_same_command_says_it_is_finished(
    finished: Path, photos: Path, flags: list[str], command: Command
):
    before = (finished / "last" / "model.safetensors").read_bytes()
    words = ["train", photos, *flags, "--average", "0.9", "--out", finished]
    code, _, err = command(*words)
    assert code == 0
    assert "is finished" in err
    code, _, err = command(*words, "--workers", 2, "--keep", 1)  # what does not change the result
    assert code == 0
    assert (finished / "last" / "model.safetensors").read_bytes() == before


def test_other_settings_are_refused_by_name(
    finished: Path, photos: Path, flags: list[str], command: Command
):
    words = ["train", photos, *flags, "--average", "0.9", "--out", finished]
    code, _, err = command(*words, "--lr", 1, "--seed", 5, "--crop", "resize")
    assert code == 2
    assert "seed, augment.crop, optim.lr" in err
    assert "--overwrite" in err
    assert "Traceback" not in err


def test_config_reads_back(
    finished: Path, tmp_path: Path, command: Command, photos: Path, flags: list[str]
):
    """The same weights from the config alone; flags win over it."""
    again = tmp_path / "again"
    code, _, err = command("train", "--config", finished / "config.json", "--out", again)
    assert code == 0, err
    assert config(again) == config(finished)
    ours, theirs = (load_model(run / "last").state_dict() for run in (again, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    other = tmp_path / "other"
    words = ["--config", finished / "config.json", "--steps", 2, "--seed", 9, "--out", other]
    code, _, err = command("train", *words)
    assert code == 0, err
    spec = config(other)
    assert (spec.steps, spec.seed, spec.optim.lr) == (2, 9, 3e-3)


def test_a_partial_config_lies_over_its_recipe(photos: Path, tmp_path: Path, command: Command):
    path = tmp_path / "mine.json"
    partial = {
        "source": str(photos),
        "recipe": "photos",
        "model": "ViT-mu/8",
        "image_size": [16],
        "steps": 2,
        "batch_size": 4,
        "workers": 0,
        "optim": {"weight_decay": 0.2},
    }
    path.write_text(json.dumps(partial))
    code, _, err = command("train", "--config", path, "--out", tmp_path / "run")
    assert code == 0, err
    spec = config(tmp_path / "run")
    assert (spec.steps, spec.epochs, spec.optim.weight_decay) == (2, None, 0.2)
    assert spec.augment.randaugment_layers == 2  # of the recipe
    assert spec.options.pool == "gap"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 1}, "holds nothing that a run found; give the config.json of one run"),
        ({"request": {"source": "digits"}}, "holds nothing that a run found"),
        ({"steps": 1, "model": "ViT-mu/8"}, "holds nothing that a run found"),
    ],
    ids=str,
)
def test_only_a_run_has_settled(
    tmp_path: Path, command: Command, values: dict[str, Any], message: str
):
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps({"source": "digits"} | values if "request" not in values else values)
    )
    code, _, err = command("train", "--config", path, "--settled", "--out", tmp_path / "run")
    assert code == 2
    assert message in " ".join(err.split())
    assert len(err.strip().splitlines()) <= 3


def test_transfer_from_a_run(
    finished: Path, make_photos: MakePhotos, tmp_path: Path, command: Command
):
    """New classes, another size; the same command resumes, with a recipe that names a model too."""
    data = make_photos(tmp_path / "two", 8, ("red", "blue"))
    run = tmp_path / "tuned"
    words = ["train", data, "--init", finished, "--image-size", 24, "--steps", 3, "--out", run]
    words += ["--batch-size", 4, "--workers", 0, "--val-fraction", 0.2, "--resize", "stretch"]
    code, _, err = command(*words)
    assert code == 0, err
    assert "position table" not in err  # sincos2d has none to resample
    spec, model = config(run), load_model(run)
    assert (spec.recipe, spec.model, spec.init) == ("transfer", "ViT-mu/8", str(finished))
    assert model.classes == ("blue", "red")
    assert model.spec.image_size == (24, 24)
    assert model.preprocess.resize == "stretch"
    code, _, err = command(*words)
    assert code == 0, err
    assert "is finished" in err
    words = [*words[:-1], "short", "--recipe", "plain-s16-90", "--model", "ViT-mu/8"]
    words[words.index("--out") + 1] = tmp_path / "other"
    words += ["--head", "linear"]
    for text in ("two", "is finished"):
        code, _, err = command(*words)
        assert code == 0, err
        assert text in err


def test_transfer_keeps_the_size_and_channels_of_the_weights(finished: Path, tmp_path: Path):
    """Grey digits of 8 px become what the weights take: 16 px in colour."""
    result = patchword.train("digits", init=finished, steps=1, batch_size=8, out=tmp_path / "run")
    model = load_model(result.folder)
    assert model.spec.image_size == config(result.folder).image_size == (16, 16)
    assert model.spec.in_channels == 3


def test_init_of_another_model_is_refused(
    finished: Path, photos: Path, tmp_path: Path, command: Command
):
    words = ["train", photos, "--init", finished, "--model", "ViT-S/16", "--out", tmp_path / "run"]
    code, _, err = command(*words)
    assert code == 2
    assert "holds ViT-mu/8, not ViT-S/16" in " ".join(err.split())


def test_one_class_is_no_task(make_photos: MakePhotos, tmp_path: Path, command: Command):
    data = make_photos(tmp_path / "one", 4, ("red",))
    code, _, err = command("train", data, "--out", tmp_path / "run")
    assert code == 1
    assert "one class (red)" in " ".join(err.split())


@pytest.mark.usefixtures("reported")
def test_with_nothing_held_out_it_is_measured_on_train(
    make_photos: MakePhotos, tmp_path: Path, command: Command
):
    data, run = make_photos(tmp_path / "all", 4, ("red", "blue")), tmp_path / "run"
    words = ["train", data, "--model", "ViT-mu/8", "--image-size", 16, "--steps", 2, "--out", run]
    words += ["--batch-size", 4, "--workers", 0, "--val-fraction", 0, "--test-fraction", 0]
    code, out, err = command(*words)
    assert code == 0, err
    assert "train images" in out
    assert "trained on" in (run / "report.html").read_text()


def test_python_takes_paths(finished: Path, make_photos: MakePhotos, tmp_path: Path):
    data = make_photos(tmp_path / "two", 8, ("red", "blue"))
    result = patchword.train(
        data,
        init=finished,
        out=tmp_path / "run",
        image_size=(16,),
        steps=2,
        batch_size=4,
        workers=0,
        device="cpu",
    )
    assert result.folder == tmp_path / "run"
    assert result.split == "test"
    assert result.result is not None
    assert patchword.evaluate(result.folder, data).split == "test"
    again = patchword.train(config(result.folder), out=tmp_path / "copy")
    assert again.summary["steps"] == 2
    with pytest.raises(UsageError, match="whole spec is no base for recipe 'photos'"):
        patchword.train(config(result.folder), "photos")
    with pytest.raises(UsageError, match="unknown setting 'lrr'; did you mean lr"):
        patchword.train(data, lrr=1)


def test_lengths(photos: Path, tmp_path: Path, flags: list[str], command: Command):
    """Epochs and images are turned into steps; two lengths at once are a mistake."""
    at = flags.index("--steps")
    rest = flags[:at] + flags[at + 2 :]
    for k, (words, steps) in enumerate(((["--epochs", 0.5], 2), (["--images", 25], 3))):
        run = tmp_path / str(k)
        code, _, err = command("train", photos, *rest, *words, "--out", run)
        assert code == 0, err
        assert config(run).steps == steps
        assert len(read_lines(run / "metrics.jsonl")) >= 1
    code, _, err = command("train", photos, *flags, "--epochs", 3, "--out", tmp_path / "x")
    assert code == 2
    assert "--steps and --epochs both set the length" in err


def test_time_becomes_steps_once(photos: Path, tmp_path: Path, flags: list[str], command: Command):
    at = flags.index("--steps")
    words = [*flags[:at], *flags[at + 2 :], "--time", "6s", "--out", tmp_path / "run"]
    code, _, err = command("train", photos, *words)
    assert code == 0, err
    spec = config(tmp_path / "run")
    assert spec.steps is not None
    assert spec.steps >= 1
    assert stored(tmp_path / "run").request.time == "6s"
    assert "6s: " in err
    code, _, err = command("train", photos, *words)
    assert code == 0, err
    assert "is finished" in err
    assert config(tmp_path / "run") == spec


def test_overwrite(photos: Path, tmp_path: Path, flags: list[str], command: Command):
    run = tmp_path / "run"
    words = ["train", photos, *flags, "--steps", 2, "--out", run]
    assert command(*words)[0] == 0
    assert command(*words[:-2], "--out", run, "--seed", 3, "--overwrite")[0] == 0
    assert config(run).seed == 3
    stranger = tmp_path / "mine"
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("precious")
    (stranger / "config.json").write_text("{}")
    for more in ([], ["--overwrite"]):
        code, _, err = command("train", photos, *flags, "--out", stranger, *more)
        assert code == 1, err
        assert len(err.strip().splitlines()) <= 2
        assert (stranger / "thesis.txt").read_text() == "precious"


def test_default_run_directory(elsewhere: Path, photos: Path, flags: list[str], command: Command):
    code, out, err = command("train", photos, *flags, "--steps", 1)
    assert code == 0, err
    assert (elsewhere / "runs" / "photos-ViT-mu-8" / "config.json").exists()
    assert "runs/photos-ViT-mu-8" in out


def test_tensorboard_writes_events(
    photos: Path, tmp_path: Path, flags: list[str], command: Command
):
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    code, _, err = command("train", photos, *flags, "--steps", 2, "--out", run, "--tensorboard")
    assert code == 0, err
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/lr", "val/raw/top1", "val/raw/loss"} <= tags
    lines = read_lines(run / "metrics.jsonl")
    shown = [event.value for event in events.Scalars("train/loss")]
    assert shown == pytest.approx([line["loss"] for line in lines])


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path):
    """What was shown after the last checkpoint is cut, as it is from metrics.jsonl."""
    pytest.importorskip("tensorboard")
    settings: dict[str, Any] = {"depth": 1, "steps": 6, "log_every": 1, "checkpoint_every": 2}
    settings |= {
        "batch_size": 8,
        "workers": 0,
        "device": "cpu",
        "tensorboard": True,
        "out": tmp_path,
    }
    show = Loop.show

    def show_and_die(self: Loop, *args: Any) -> None:
        show(self, *args)
        if self.trainer.progress.step == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "show", show_and_die)
        with pytest.raises(KeyboardInterrupt):
            patchword.train("digits", **settings)
    patchword.train("digits", **settings)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("length", [{"steps": 3}, {"time": "60s"}], ids=str)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["cuda", "cpu"],
)
def test_too_little_memory_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError, length: dict[str, Any]
):
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Trainer, "step", fail)
    with pytest.raises(PatchwordError, match="out of memory with 8 images at a time; use --parts"):
        patchword.train(
            "digits", depth=1, batch_size=16, parts=2, workers=0, out=tmp_path, **length
        )


def test_bad_images_can_be_fatal(photos: Path, tmp_path: Path, flags: list[str], command: Command):
    words = ["train", photos, *flags, "--out", tmp_path / "run", "--on-bad-image", "fail"]
    code, _, err = command(*words)
    assert code == 1
    assert "broken.jpg" in err
    assert "Traceback" not in err


def test_data_that_change_are_refused(
    make_photos: MakePhotos, tmp_path: Path, flags: list[str], command: Command
):
    data = make_photos(tmp_path / "data", 6)
    words = ["train", data, *flags, "--steps", 1, "--out", tmp_path / "run"]
    assert command(*words)[0] == 0
    shutil.copy(data / "red" / "00.jpg", data / "red" / "new.jpg")
    code, _, err = command(*words)
    assert code == 1
    assert "1 new (such as red/new.jpg)" in err


def test_given_splits_are_kept(
    make_photos: MakePhotos, tmp_path: Path, flags: list[str], command: Command
):
    names = [f"{part}/{name}" for part in ("train", "val", "test") for name in ("red", "green")]
    data = make_photos(tmp_path / "split", 5, names)
    run = tmp_path / "run"
    code, _, err = command("train", data, *flags, "--steps", 2, "--out", run)
    assert code == 0, err
    assert "10 train, 10 val, 10 test" in err
    parts = json.loads((run / "splits.json").read_text())
    for part in ("train", "val", "test"):
        assert all(key.startswith(f"{part}/") for key in parts[part])
        assert len(parts[part]) == 10


def test_a_part_of_the_labels(photos: Path, tmp_path: Path, flags: list[str], command: Command):
    """So many training images, the same val and test parts, and so a resume."""
    words = ["train", photos, *flags, "--steps", 2]
    for number in (6, 1000):
        run = tmp_path / str(number)
        code, _, err = command(*words, "--train-images", number, "--out", run)
        assert code == 0, err
    few, all_ = (json.loads((tmp_path / n / "splits.json").read_text()) for n in ("6", "1000"))
    assert len(few["train"]) == 6 < len(all_["train"])
    assert set(few["train"]) < set(all_["train"])
    assert (few["val"], few["test"]) == (all_["val"], all_["test"])
    code, _, err = command(*words, "--train-images", 6, "--out", tmp_path / "6")
    assert code == 0
    assert "is finished" in err


def test_it_learns_digits(tmp_path: Path, command: Command):
    """A minimal model in a few seconds: far above chance (10 %)."""
    words = "train --model ViT-mu/2 --steps 120 --batch-size 64 --lr 1e-2 --depth 1 --width 32"
    words += " --mlp-width 64 --heads 2 --workers 0 --device cpu --average 0 --eval-every 120"
    words += " --rotate 0 --scale 0 --translate 0 --shear 0 digits"
    code, _, err = command(*words.split(), "--out", tmp_path / "run")
    assert code == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["split"] == "test"
    assert summary["top1"] > 0.6
    spec = config(tmp_path / "run")
    assert spec.recipe == "digits"  # although the flags come first
    assert spec.size == recipe_spec("digits", "digits").size
