"""`patchword train --sweep` and `--runs` on small generated data."""

from __future__ import annotations

import json
import os
import signal
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from settling import config, stored

import patchword
from patchword import PatchwordError, UsageError, load_model
from patchword.report.record import read_run
from patchword.run import finish as finishing
from patchword.run import trials
from patchword.run.inputs import Inputs
from patchword.run.sweep import SweepResult, rates_of, sweep
from patchword.spec.parse import changed
from patchword.spec.train import TrainSpec
from patchword.training.recipes import recipe_spec
from patchword.training.trainer import Trainer

Command = Callable[..., tuple[int, str, str]]
MakePhotos = Callable[..., Path]
RATES = (1e-50, 0.03, 3e38)
"""one that changes no weight, one that learns, and one whose loss is not finite"""
STEPS = 6


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports of the whole only, but in what the fixtures below have run before."""
    monkeypatch.setattr(finishing, "report_run", lambda *_: None)


@pytest.fixture(scope="module")
def asked(make_photos: MakePhotos, finished: Path, tmp_path_factory: pytest.TempPathFactory):
    """Three classes of 20 pictures, to be learned from the weights of a run on others."""
    data = make_photos(tmp_path_factory.mktemp("data") / "more", 20, first=1000)
    return changed(
        recipe_spec("finetune-small", str(data)),
        **{"init": str(finished), "image_size": [16], "steps": STEPS, "batch_size": 8},
        **{"warmup": 1, "workers": 0, "device": "cpu", "rates": list(RATES)},
        **{"val_fraction": 0.2, "test_fraction": 0.3, "momentum": 0.5},
    )


@pytest.fixture(scope="module")
def done(asked: TrainSpec, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    """A whole sweep with two final runs."""
    return sweep(asked, repeats=2, out=tmp_path_factory.mktemp("runs") / "sweep")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def parts(run: Path) -> dict[str, set[str]]:
    division = read(run / "splits.json")
    return {name: set(division[name]) for name in ("train", "val", "test")}


def same_weights(ours: Path, theirs: Path) -> bool:
    a, b = load_model(ours).state_dict(), load_model(theirs).state_dict()
    return all(torch.equal(a[name], b[name]) for name in b)


def test_the_best_rate_is_chosen_on_held_out_images(done: SweepResult):
    assert list(done.rates) == [str(rate) for rate in RATES]
    assert done.rates[str(RATES[2])] is None
    low, good = (done.rates[str(rate)] for rate in RATES[:2])
    assert low is not None
    assert good is not None
    assert good["top1"] > low["top1"]
    assert done.chosen == RATES[1]
    assert {stored(done.folder / run["run"]).lr for run in done.runs} == {RATES[1]}


def test_of_equals_the_rate_with_the_lower_loss(asked: TrainSpec, tmp_path: Path):
    """Two rates too low to change an answer."""
    spec = changed(asked, rates=[1e-9, 1e-4], steps=2)
    found = sweep(spec, out=tmp_path / "run")
    rows = {float(rate): row for rate, row in found.rates.items() if row is not None}
    assert rows[1e-9]["top1"] == rows[1e-4]["top1"]
    assert rows[1e-9]["loss"] != rows[1e-4]["loss"]
    assert found.chosen == min(rows, key=lambda rate: rows[rate]["loss"])


def test_the_divisions(done: SweepResult):
    """A sweep's run sees no test image; the final runs see all that is not test."""
    final = parts(done.folder / "run-0")
    assert (len(final["train"]), len(final["val"]), len(final["test"])) == (42, 0, 18)
    assert not final["train"] & final["test"]
    for run in ("run-1", "."):
        assert parts(done.folder / run) == final
    for rate in RATES:
        tried = parts(done.folder / "sweep" / f"lr-{rate}")
        assert (len(tried["train"]), len(tried["val"]), len(tried["test"])) == (30, 12, 0)
        assert tried["train"] | tried["val"] == final["train"]


def test_only_the_final_runs_measure_the_test_part(
    asked: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[float, str, int]] = []
    measure = Inputs.evaluator

    def spy(self: Inputs, part: str, some: Any = None):
        seen.append((self.settled.lr, part, len(self.division[part])))
        return measure(self, part, some)

    monkeypatch.setattr(Inputs, "evaluator", spy)
    found = sweep(changed(asked, rates=[0.01, 0.03], steps=1), out=tmp_path / "run")
    assert {part for _, part, _ in seen[:-1]} == {"val"}
    assert seen[-1] == (found.chosen, "test", 18)


def test_mean_and_deviation(done: SweepResult):
    top1 = [read(done.folder / f"run-{k}" / "summary.json")["top1"] for k in range(2)]
    assert [run["top1"] for run in done.runs] == top1
    assert [stored(done.folder / f"run-{k}").request.seed for k in range(2)] == [0, 1]
    assert done.mean == pytest.approx(sum(top1) / 2)
    assert done.std == pytest.approx(statistics.stdev(top1))
    assert not same_weights(done.folder / "run-0", done.folder / "run-1")


def test_one_run_has_no_deviation():
    one = SweepResult(folder=Path(), rates={}, runs=[{"top1": 0.5}])
    assert (one.mean, one.std) == (0.5, None)


def test_the_directory_is_that_of_the_first_run(done: SweepResult, asked: TrainSpec):
    assert same_weights(done.folder, done.folder / "run-0" / "last")
    measured = patchword.evaluate(done.folder, asked.source, device="cpu", workers=0)
    assert (measured.split, measured.classification.top1) == ("test", done.runs[0]["top1"])
    summary = read(done.folder / "summary.json")
    assert summary["finished"]
    assert summary["top1"] == done.runs[0]["top1"]
    assert summary["sweep"] == read(done.folder / "sweep.json") == done.to_dict()


def test_a_sweeps_runs_keep_no_weights(done: SweepResult):
    for rate in RATES:
        run = done.folder / "sweep" / f"lr-{rate}"
        assert not list(run.rglob("*.safetensors"))
        assert not {path.name for path in run.iterdir()} & {"checkpoints", "best", "last"}
        assert (run / "metrics.jsonl").exists()


def test_the_report_has_what_the_first_run_found(done: SweepResult):
    """The folder of the whole holds what was asked."""
    config = read_run(done.folder).config
    assert config["model"] == "ViT-mu/8"
    assert config["optim"]["lr"] == done.chosen
    assert config["optim"]["rates"] == list(RATES)


def test_report_and_card_show_the_table(done: SweepResult):
    report, card = ((done.folder / name).read_text() for name in ("report.html", "MODEL_CARD.md"))
    for text in (report, card):
        assert f"learning rate {RATES[1]:g}" in text
        assert "loss not finite" in text
        assert "run-1, seed 1" in text
        assert f"{100 * (done.mean or 0):.2f} %" in text
        assert "--sweep --runs 2" in text
    assert "Learning rates and runs" not in (done.folder / "run-0" / "report.html").read_text()


class _Killed(BaseException):
    """As a kill: nothing may handle it."""


# Steps in order: 6 with the low rate, 6 with the good one, 1 or 2 with the high one, 12 at the end.
@pytest.mark.parametrize("at", [9, 20])
def test_a_killed_sweep_ends_as_an_undisturbed_one(
    at: int, done: SweepResult, asked: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    step, count = Trainer.step, 0

    def stop(self: Trainer, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            raise _Killed
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "step", stop)
    run = tmp_path / "sweep"
    with pytest.raises(_Killed):
        sweep(asked, repeats=2, out=run)
    before, at = count, 0
    again = sweep(asked, repeats=2, out=run)
    assert (
        count - before <= 4 * STEPS + 2 - (before - 1) + STEPS // 3
    )  # what was done is not redone
    assert again.to_dict() == done.to_dict()
    for name in ("run-0", "run-1"):
        assert same_weights(run / name, done.folder / name)
    count = 0
    assert sweep(asked, repeats=2, out=run).to_dict() == done.to_dict()
    assert count == 0


def test_all_runs_of_a_sweep_have_one_resolution(
    asked: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """That of the weights: the final runs have no val part to compare others on."""
    monkeypatch.setattr(trials, "fitting_size", lambda *_: (24, 24))
    spec = changed(asked, image_size=None, enlarge=1.5, rates=[0.01, 0.03], steps=1)
    sweep(spec, out=tmp_path)
    runs = [tmp_path / "sweep/lr-0.01", tmp_path / "sweep/lr-0.03", tmp_path / "run-0"]
    assert [stored(run).image_size for run in runs] == [(16, 16)] * 3
    assert sweep(spec, out=tmp_path).chosen in (0.01, 0.03)


def test_advice_for_the_data_is_said_once(
    asked: TrainSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """And not at each run."""
    spec = changed(asked, init=None, model="ViT-mu/8", recipe=None, steps=1, rates=[])
    sweep(spec, choose=False, repeats=2, out=tmp_path)
    assert capsys.readouterr().err.count("are few to train ViT-mu/8 on from scratch") == 1


def test_more_runs_join_those_that_are_done(done: SweepResult, asked: TrainSpec, tmp_path: Path):
    run = tmp_path / "sweep"
    spec = changed(asked, rates=[0.03], steps=2)
    one = sweep(spec, out=run)
    assert one.rates == {}  # one rate leaves nothing to choose
    assert one.chosen == 0.03
    assert not (run / "sweep").exists()
    changed_at = (run / "run-0" / "summary.json").stat().st_mtime_ns
    three = sweep(spec, repeats=3, out=run)
    assert [row["seed"] for row in three.runs] == [0, 1, 2]
    assert three.runs[0] == one.runs[0]
    assert (run / "run-0" / "summary.json").stat().st_mtime_ns == changed_at
    assert "run-2, seed 2" in (run / "report.html").read_text()


def test_repeats_are_runs_of_train(asked: TrainSpec, tmp_path: Path):
    """Without a sweep run-0 is what `train` gives; the others differ in the seed, not in the
    images."""
    spec = changed(asked, rates=[], steps=2, lr=0.02, seed=5)
    found = sweep(spec, choose=False, repeats=2, out=tmp_path / "runs")
    assert (found.rates, found.chosen) == ({}, 0.02)
    alone = patchword.train(spec, out=tmp_path / "alone")
    assert same_weights(found.folder, alone.folder)
    assert found.runs[0]["top1"] == alone.summary["top1"]
    assert parts(found.folder / "run-0") == parts(found.folder / "run-1") == parts(alone.folder)
    first, second = (config(found.folder / f"run-{k}") for k in range(2))
    assert (first.seed, second.seed) == (5, 6)
    assert replace(first, seed=6) == second
    assert not same_weights(found.folder / "run-0" / "last", found.folder / "run-1" / "last")


def test_repeats_share_the_steps_that_the_time_gave(
    asked: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trials, "pace", lambda *_: 2.0)  # seconds a step
    spec = replace(changed(asked, rates=[]), steps=None, time="30s")
    found = sweep(spec, choose=False, repeats=2, out=tmp_path / "runs")
    steps = [stored(found.folder / run["run"]).steps for run in found.runs]
    assert steps[0] == steps[1] > 0


def test_the_data_s_own_parts(make_photos: MakePhotos, asked: TrainSpec, tmp_path: Path):
    """With train, val and test the val part chooses and is trained on in the end; with train and
    val alone, val is the test."""
    data = tmp_path / "data"
    for k, (part, count) in enumerate({"train": 5, "val": 2, "test": 3}.items()):
        make_photos(data / part, count, first=300 * k)
    spec = changed(asked, source=str(data), rates=[0.01, 0.03], steps=1)
    run = sweep(spec, out=tmp_path / "three").folder
    tried, final = parts(run / "sweep" / "lr-0.01"), parts(run)
    assert {key.split("/")[0] for key in tried["val"]} == {"val"}
    assert {key.split("/")[0] for key in final["test"]} == {"test"}
    assert final["train"] == tried["train"] | tried["val"]
    assert (len(final["train"]), len(final["test"])) == (21, 9)
    for path in (data / "test").rglob("*.*"):
        path.unlink()
    run = sweep(spec, out=tmp_path / "two").folder
    tried, final = parts(run / "sweep" / "lr-0.01"), parts(run)
    assert {key.split("/")[0] for key in final["test"]} == {"val"}
    assert (len(tried["train"]), len(tried["val"])) == (12, 3)
    assert final["train"] == tried["train"] | tried["val"]


@pytest.mark.parametrize(
    ("recipe", "changes", "rates"),
    [
        ("finetune", {}, (0.003, 0.01, 0.03, 0.06)),
        ("finetune-cifar", {}, (0.001, 0.003, 0.01, 0.03)),
        ("finetune-vtab", {}, (0.01,)),
        ("finetune-cifar", {"rates": [0.2, 0.1, 0.2]}, (0.1, 0.2)),
        ("finetune-cifar", {"lr": 0.1}, (0.01, 0.03, 0.1, 0.3)),
        ("lora", {}, (1e-4, 3e-4, 1e-3, 3e-3)),
    ],
)
def test_the_rates_to_try(recipe: str, changes: dict[str, Any], rates: tuple[float, ...]):
    """Table 4's for its recipes; else four around the learning rate."""
    assert rates_of(changed(recipe_spec(recipe, "x"), **changes)) == rates


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_fraction": 0.0}, "no images to choose on"),
        ({"test_fraction": 0.0}, "no images to measure the final runs on"),
        ({"steps": None, "time": "1m"}, "--time does not go with --sweep"),
    ],
)
def test_what_a_sweep_needs(
    changes: dict[str, Any], message: str, asked: TrainSpec, tmp_path: Path
):
    with pytest.raises(UsageError, match=message):
        sweep(changed(asked, **changes), out=tmp_path / "run")


def test_all_rates_too_high(asked: TrainSpec, tmp_path: Path):
    with pytest.raises(PatchwordError, match="give lower --rates"):
        sweep(changed(asked, rates=[2e38, 3e38]), out=tmp_path / "run")


# The command -------------------------------------------------------------------------------------


@pytest.fixture
def words(asked: TrainSpec) -> list[object]:
    flags = "--recipe finetune-small --image-size 16 --steps 3 --batch-size 8 --warmup 1"
    flags += " --workers 0 --device cpu --rates 1e-3 0.03 --val-fraction 0.2"
    return ["train", asked.source, "--init", asked.init, *flags.split()]


def test_the_command(words: list[object], elsewhere: Path, command: Command):
    code, out, err = command(*words, "--sweep", "--runs", 2, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert Path(found["run"]).name == "more-from-first-sweep"
    assert list(found["rates"]) == ["0.001", "0.03"]
    assert found["chosen"] in (0.001, 0.03)
    assert len(found["runs"]) == 2
    assert found["mean"] == pytest.approx(sum(run["top1"] for run in found["runs"]) / 2)
    assert found["std"] is not None
    for number in range(1, 5):
        assert f"run {number} of 4: " in err
    code, out, err = command(*words, "--sweep", "--runs", 2)
    assert code == 0, err
    assert "is finished" in err
    assert "run 1 of" not in err
    assert "chosen" in out
    assert "run-1, seed 1" in out


def test_a_signal_stops_it_and_the_same_command_goes_on(
    words: list[object], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
):
    words = [*words, "--sweep", "--out", tmp_path / "run", "--json"]
    step, count = Trainer.step, 0

    def interrupt(self: Trainer, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupt)
        code, _, err = command(*words)
    assert code == 143
    assert "run the same command to go on" in err
    assert not (tmp_path / "run" / "run-0").exists()
    code, out, err = command(*words)
    assert code == 0, err
    assert "resuming from" in err
    assert len(json.loads(out)["runs"]) == 1


def test_usage_errors(words: list[object], finished: Path, tmp_path: Path, command: Command):
    run = tmp_path / "run"
    assert command(*words, "--sweep", "--out", run)[0] == 0
    for change, message in (
        (["--sweep", "--rates", 0.1, 0.2], "other settings of optim.rates"),
        (["--sweep", "--seed", 3, "--batch-size", 4], "other settings of batch_size, seed"),
        (["--runs", 0], "--runs is 0; use 1 or more"),
        (["--runs", 2, "--rates"], "other settings of optim.rates"),
    ):
        code, _, err = command(*words, *change, "--out", run)
        assert code == 2, change
        assert message in " ".join(err.split())
    code, _, err = command(*words, "--sweep", "--out", finished)
    assert code == 2
    assert "holds a single run" in " ".join(err.split())
    code, _, err = command(*words, "--sweep", "--out", run, "--steps", 2, "--overwrite")
    assert code == 0, err
    assert stored(run / "run-0").steps == 2


def test_an_ordinary_run_does_not_go_on_inside_a_sweep(tmp_path: Path):
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(UsageError, match="holds a sweep"):
        patchword.train("digits", out=tmp_path, steps=1)
