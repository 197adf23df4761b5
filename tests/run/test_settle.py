"""What a run from weights finds out by itself before it starts."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from settling import config, stored

import patchword
from patchword import UsageError, load_model
from patchword.data.registry import open_source
from patchword.data.splits import load_division
from patchword.data.unlabelled import open_images
from patchword.evaluation.probe import fit_logistic, sweep_logistic
from patchword.run import folder as runs
from patchword.run import trials
from patchword.run.inputs import Data, Inputs, build_model
from patchword.run.settle import assumed
from patchword.session.features import extract
from patchword.spec.parse import Interrupted, PatchwordError
from patchword.training.log import read_lines
from patchword.training.loop import Loop
from patchword.training.optim import learning_rate
from patchword.training.recipes import base_spec
from patchword.training.trainer import Trainer

Command = Callable[..., tuple[int, str, str]]
SETTINGS: dict[str, Any] = {"batch_size": 8, "workers": 0, "precision": "float32"}


@pytest.fixture
def train(finished: Path, photos: Path, monkeypatch: pytest.MonkeyPatch):
    """`train(run, **changes)`: a short run from the weights of another, without a report."""
    monkeypatch.setattr("patchword.run.finish.report_run", lambda *_: None)
    settings = SETTINGS | {"init": finished, "val_fraction": 0.2}
    return lambda run, **changes: patchword.train(photos, out=run, **settings | changes)


def test_a_head_alone_is_the_logistic_regression(train: Any, photos: Path, tmp_path: Path):
    """Of the features of the train part, with the regulariser that is best on val."""
    result = train(tmp_path / "run", recipe="head")
    assert (result.summary["steps"], result.summary["best_step"]) == (0, 0)
    model, source = load_model(tmp_path / "run"), open_source(str(photos))
    division = load_division(tmp_path / "run" / "splits.json", source)
    parts = [
        extract(model, source, division[part], device="cpu", cache=False)
        for part in ("train", "val")
    ]
    support, val = parts
    probe = sweep_logistic(support.pooled, support.labels, val.pooled, val.labels, 3)
    assert model.head is not None
    torch.testing.assert_close(model.head.weight.double(), probe.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.head.bias.double(), probe.bias, rtol=1e-4, atol=1e-5)
    assert result.summary["best_val_top1"] == pytest.approx(probe.accuracy)
    (line,) = read_lines(tmp_path / "run" / "evaluations.jsonl")
    assert (line["step"], line["top1"]) == (0, pytest.approx(probe.accuracy))


def test_without_a_val_part_the_head_is_fitted_to_all(
    train: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its regulariser is chosen on images that the sweep does not fit."""
    seen: list[tuple[int, int, float]] = []
    real = trials.sweep_logistic

    def spy(features: Any, labels: Any, val: Any, *rest: Any) -> Any:
        found = real(features, labels, val, *rest)
        seen.append((len(features), len(val), found.l2))
        return found

    monkeypatch.setattr(trials, "sweep_logistic", spy)
    train(tmp_path / "run", recipe="head", val_fraction=0.0)
    ((fitted, held, l2),) = seen
    division = json.loads((tmp_path / "run" / "splits.json").read_text())
    assert 0 < held < fitted
    assert division["val"] == []
    assert fitted + held in (len(division["train"]), len(division["train"]) - 1)  # one is broken
    model, source = load_model(tmp_path / "run"), open_source(str(photos))
    at = load_division(tmp_path / "run" / "splits.json", source)["train"]
    every = extract(model, source, at, device="cpu", cache=False)
    weight, _ = fit_logistic(every.pooled, every.labels, 3, l2)
    assert model.head is not None
    torch.testing.assert_close(model.head.weight.double(), weight, rtol=1e-4, atol=1e-5)


def test_training_never_returns_less_than_the_head(train: Any, tmp_path: Path):
    """A learning rate that destroys the weights: the best are those of step 0."""
    result = train(tmp_path / "run", steps=3, optimizer="sgd", lr=3.0)
    lines = read_lines(tmp_path / "run" / "evaluations.jsonl")
    assert lines[0]["step"] == 0
    step, value = (result.summary[name] for name in ("best_step", "best_val_top1"))
    assert value >= lines[0]["top1"]
    assert value in {line["top1"] for line in lines if line["step"] == step}
    assert result.summary["best_step"] == max(
        line["step"] for line in lines if line["top1"] >= lines[0]["top1"]
    )


def test_the_head_can_be_used_before_training(
    train: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also of a run that was stopped while it found out its settings, and is started again."""
    run = tmp_path / "run"

    def die(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("patchword.run.settle.trials.fitting_parts", die)
        with pytest.raises(KeyboardInterrupt):
            train(run, steps=2, enlarge=1.0)
    assert not (run / "config.json").exists()
    early = patchword.evaluate(run / "head.safetensors", photos).classification
    head = train(tmp_path / "head", recipe="head").summary
    whole = patchword.evaluate(tmp_path / "head", photos, split="all").classification
    assert early.top1 == whole.top1
    assert head["steps"] == 0
    train(run, steps=2, enlarge=1.0)
    assert not (run / "head.safetensors").exists()


# The resolution ----------------------------------------------------------------------------------


@pytest.fixture
def accuracies(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], float]:
    """Image size -> what a head on the features there is worth; other sizes fail."""
    given: dict[tuple[int, int], float] = {}
    real = trials.probe_head

    def worth(inputs: Inputs, console: Any, **options: Any) -> Any:
        found = real(inputs, console, **options)
        assert found is not None
        return dataclasses.replace(found, accuracy=given[inputs.settled.image_size])

    monkeypatch.setattr(trials, "probe_head", worth)
    return given


@pytest.mark.parametrize(("larger", "side"), [(0.9, 32), (0.8, 16), (0.7, 16)])
def test_the_resolution_at_which_a_head_is_better_is_taken(
    train: Any,
    tmp_path: Path,
    accuracies: dict[tuple[int, int], float],
    capsys: pytest.CaptureFixture[str],
    larger: float,
    side: int,
):
    """Of equals the one of the weights; resuming and repeating keep to it."""
    accuracies |= {(16, 16): 0.8, (32, 32): larger}
    settings = {"steps": 2, "enlarge": 2.0}
    train(tmp_path / "run", **settings)
    assert config(tmp_path / "run").size == (side, side)
    assert load_model(tmp_path / "run").spec.image_size == (side, side)
    said = " ".join(capsys.readouterr().err.split())
    at = f"top-1 on val 80.00% at 16x16, {larger:.2%} at 32x32"
    assert f"resolution {side}x{side}: a head on frozen features has {at}" in said
    accuracies.clear()
    assert train(tmp_path / "run", **settings).result is None


def test_a_stopped_run_goes_on_at_its_resolution(
    train: Any,
    tmp_path: Path,
    accuracies: dict[tuple[int, int], float],
    monkeypatch: pytest.MonkeyPatch,
):
    """To the bits of the same run with the resolution given."""
    accuracies |= {(16, 16): 0.8, (32, 32): 0.9}
    settings = {"steps": 4, "checkpoint_every": 2, "lr": 1e-3}
    show = Loop.show

    def die(self: Loop, *args: Any) -> None:
        show(self, *args)
        if self.trainer.progress.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "show", die)
        with pytest.raises((KeyboardInterrupt, Interrupted)):
            train(tmp_path / "cut", enlarge=2.0, **settings)
    del accuracies[16, 16]
    train(tmp_path / "cut", enlarge=2.0, **settings)
    train(tmp_path / "given", image_size=32, **settings)
    cut, given = (load_model(tmp_path / name / "last") for name in ("cut", "given"))
    for name, value in given.state_dict().items():
        assert torch.equal(value, cut.state_dict()[name]), name


def test_resolutions_are_compared_by_real_heads(train: Any, tmp_path: Path, photos: Path):
    train(tmp_path / "run", steps=1, lr=1e-3, enlarge=2.0)
    source = open_source(str(photos))
    division = load_division(tmp_path / "run" / "splits.json", source)
    found: list[float] = []
    for size in (16, 32):
        model = load_model(config(tmp_path / "run").init or "", image_size=size)
        model.preprocess = config(tmp_path / "run").preprocess.over(model.preprocess)
        train_part, val = (
            extract(model, source, division[part], device="cpu", cache=False)
            for part in ("train", "val")
        )
        probe = sweep_logistic(
            train_part.pooled, train_part.labels, val.pooled, val.labels, len(source.classes)
        )
        found.append(probe.accuracy)
    side = 32 if found[1] > found[0] else 16
    assert config(tmp_path / "run").size == (side, side)


@pytest.mark.parametrize(("pace", "size"), [(1.0, (16, 16)), (0.1, (32, 32))])
def test_a_higher_resolution_needs_time(
    train: Any,
    tmp_path: Path,
    accuracies: dict[tuple[int, int], float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pace: float,
    size: tuple[int, int],
):
    """Five epochs of 28 images: 18 steps of 8."""
    accuracies |= {(16, 16): 0.8, (32, 32): 0.9}
    monkeypatch.setattr(trials, "pace", lambda *_, **__: pace)
    train(tmp_path / "run", time="12s", enlarge=2.0, lr=1e-3)
    assert config(tmp_path / "run").size == size
    said = " ".join(capsys.readouterr().err.split())
    assert ("epochs at 32x32" in said) == (size == (16, 16))


def test_a_given_resolution_is_not_compared(
    train: Any, tmp_path: Path, accuracies: dict[tuple[int, int], float]
):
    """Nor one without a val part, nor those of a sweep."""
    train(tmp_path / "given", steps=1, lr=1e-3, image_size=24, enlarge=2.0, probe=False)
    assert config(tmp_path / "given").size == (24, 24)
    train(tmp_path / "no-val", steps=1, lr=1e-3, val_fraction=0.0, enlarge=2.0, probe=False)
    assert config(tmp_path / "no-val").size == (16, 16)


def test_resolutions_need_weights_to_compare(photos: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="--enlarge compares resolutions by the features"):
        patchword.train(photos, model="ViT-mu/8", enlarge=1.5, out=tmp_path / "run")


# The learning rate -------------------------------------------------------------------------------


def test_the_rate_with_the_lowest_loss_is_taken(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    losses = {1e-4: 0.4, 1e-3: 0.2, 1e-2: float("nan")}
    tried: list[tuple[float, int]] = []

    def loss(inputs: Any, rate: float, count: int) -> float:
        tried.append((rate, count))
        return losses[rate]

    monkeypatch.setattr(trials, "trial_loss", loss)
    train(tmp_path / "run", steps=200, rates=tuple(losses), eval_every=200)
    assert tried == [(rate, 8) for rate in losses]
    spec = config(tmp_path / "run")
    assert spec.optim.lr == 1e-3
    assert max(line["lr"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")) <= 1e-3
    said = " ".join(capsys.readouterr().err.split())
    assert "learning rate 0.001: val loss 0.200 after 8 steps, against 0.400 at 0.0001" in said
    tried.clear()
    assert train(tmp_path / "run", steps=200, rates=tuple(losses), eval_every=200).result is None
    with pytest.raises(UsageError, match=r"optim\.rates"):
        train(tmp_path / "run", steps=200, rates=(1e-4, 1e-3), eval_every=200)
    assert not tried


def test_rates_are_compared_on_images_of_every_class(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where val is large: a folder's images are in order of their classes."""
    monkeypatch.setattr(trials, "TRIAL_IMAGES", 3)
    real, seen = Inputs.evaluator, list[list[int]]()

    def spy(self: Inputs, part: str, some: Any = None) -> Any:
        if some is not None:
            seen.append(self.source.labels[some].tolist())
        return real(self, part, some)

    monkeypatch.setattr(Inputs, "evaluator", spy)
    train(tmp_path / "run", steps=2, rates=(1e-4, 1e-3))
    assert seen == [[0, 1, 2]] * 2


def test_trials_are_real_and_leave_the_model_as_it_is(train: Any, tmp_path: Path):
    train(tmp_path / "tried", steps=4, rates=(3e-4, 1e-2))
    chosen = config(tmp_path / "tried").optim.lr
    assert chosen in (3e-4, 1e-2)
    train(tmp_path / "given", steps=4, lr=chosen)
    tried, given = (load_model(tmp_path / name / "last") for name in ("tried", "given"))
    for name, value in tried.state_dict().items():
        assert torch.equal(value, given.state_dict()[name]), name


def test_a_trial_is_a_short_run_with_its_own_schedule(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """From the warm-up to the end of the decay, in as many steps as it has."""
    rates: list[float] = []
    real = Trainer.step

    def step(self: Trainer, inputs: Any, targets: Any, lr: float) -> tuple[float, float]:
        rates.append(lr)
        return real(self, inputs, targets, lr)

    monkeypatch.setattr(Trainer, "step", step)
    train(tmp_path / "run", steps=1, rates=(1e-4, 1e-3), warmup=2)
    optim = config(tmp_path / "run").optim
    wanted = [
        learning_rate(at, 5, dataclasses.replace(optim, lr=rate))
        for rate in (1e-4, 1e-3)
        for at in range(5)
    ]
    assert rates[:10] == wanted
    assert wanted[0] < wanted[1] > wanted[4]


def test_a_given_rate_is_not_tried_against_others(
    train: Any, tmp_path: Path, photos: Path, finished: Path, command: Command
):
    train(tmp_path / "python", steps=1, lr=5e-4)
    words = ["train", photos, "--init", finished, "--steps", 1, "--lr", 5e-4]
    words += ["--batch-size", 8, "--workers", 0, "--out", tmp_path / "shell"]
    code, _, err = command(*words)
    assert code == 0, err
    for run in ("python", "shell"):
        optim = config(tmp_path / run).optim
        assert (optim.lr, optim.rates) == (5e-4, ())


def test_a_config_brings_the_rate_that_was_chosen(train: Any, tmp_path: Path, command: Command):
    """With --settled; without it they are tried again."""
    train(tmp_path / "first", steps=2)
    words = ["train", photos_of(tmp_path / "first"), "--config", tmp_path / "first" / "config.json"]
    for name, more in (("asked", []), ("settled", ["--settled"])):
        code, _, err = command(*words, *more, "--out", tmp_path / name)
        assert code == 0, err
        assert ("learning rate" in err) == (not more)
        assert stored(tmp_path / name).lr == stored(tmp_path / "first").lr
    assert len(stored(tmp_path / "asked").request.optim.rates) == 2
    assert stored(tmp_path / "settled").request.optim.rates == ()


def photos_of(run: Path) -> str:
    return config(run).source


@pytest.mark.parametrize("step", [1, 3])
def test_a_stopped_run_goes_on_with_what_was_found(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
):
    """To the same bits, also where it was stopped before the first checkpoint was due."""
    settings = {"steps": 6, "checkpoint_every": 2, "eval_every": 3}
    train(tmp_path / "whole", **settings)
    show = Loop.show

    def die(self: Loop, *args: Any) -> None:
        show(self, *args)
        if self.trainer.progress.step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "show", die)
        with pytest.raises((KeyboardInterrupt, Interrupted)):
            train(tmp_path / "cut", lr=config(tmp_path / "whole").optim.lr, **settings)
    train(tmp_path / "cut", lr=config(tmp_path / "whole").optim.lr, **settings)
    for link in ("best", "last"):
        whole, cut = (load_model(tmp_path / name / link) for name in ("whole", "cut"))
        for name, value in whole.state_dict().items():
            assert torch.equal(value, cut.state_dict()[name]), name
    logs = [read_lines(tmp_path / name / "evaluations.jsonl") for name in ("whole", "cut")]
    assert [line["step"] for line in logs[0]] == [0, 0, 3, 3, 6, 6]  # raw, average
    kept = [[{k: v for k, v in line.items() if k != "time"} for line in log] for log in logs]
    assert kept[0] == kept[1]


def test_a_batch_too_large_for_the_memory_is_taken_in_parts(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    real = os.sysconf
    pages = {"SC_PHYS_PAGES": 16}  # of 4 KiB
    monkeypatch.setattr(os, "sysconf", lambda name: pages.get(name, real(name)))
    train(tmp_path / "run", steps=2)
    parts = config(tmp_path / "run").optim.parts
    assert parts in (2, 4, 8)
    assert f"batch of 8 in {parts} parts" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("patchword.run.finish.report_run", lambda *_: None)
    assert train(tmp_path / "run", steps=2).result is None  # the same run, on a larger machine


def test_time_holds_for_the_whole(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Trials and evaluations are taken off before it is divided into steps."""
    monkeypatch.setattr(trials, "limit", lambda _: 0.0)
    paces: list[float] = []
    real = trials.pace

    def pace(*args: Any, **kwargs: Any) -> float:
        paces.append(10 * real(*args, **kwargs))  # so that the steps take a tenth of the time
        return paces[-1]

    monkeypatch.setattr(trials, "pace", pace)
    train(tmp_path / "run", time="40s")
    spec = config(tmp_path / "run")
    assert spec.steps is not None
    assert 0 < spec.steps < 40 / paces[0]
    assert "40s:" in capsys.readouterr().err


@pytest.mark.parametrize("probe", [True, False])
def test_time_too_short_for_a_step(
    train: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    probe: bool,
):
    """The head that there is already is the result; without one the time is refused."""
    monkeypatch.setattr(trials, "pace", lambda *_, **__: 100.0)
    settings = {"time": "60s", "probe": probe, "val_fraction": 0.2}
    if not probe:
        with pytest.raises(PatchwordError, match=r"--time 60s is too short: a step takes 1e\+02 s"):
            train(tmp_path / "run", **settings)
        assert not (tmp_path / "run" / "config.json").exists()
        return
    head = train(tmp_path / "head", recipe="head").summary
    result = train(tmp_path / "run", **settings)
    assert config(tmp_path / "run").steps == 0
    assert result.summary["top1"] == head["top1"]
    said = capsys.readouterr().err
    assert "60s leaves no time to train in" in said
    assert "too little time to try learning rates: 0.0001 it is" in said
    assert train(tmp_path / "run", **settings).result is None


@pytest.mark.parametrize("objective", ["classification", "mae"])
def test_the_time_of_an_evaluation_counts_the_images_it_looks_at(
    finished: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, objective: Any
):
    """Those of val, and without labels those of the probes besides."""
    spec = dataclasses.replace(
        base_spec(str(photos), None, str(finished), objective), init=str(finished), steps=1
    )
    source = open_images(str(photos)) if spec.self_supervised else open_source(str(photos))
    division = runs.open_division(None, source, spec)
    settled = assumed(spec, division)
    model, data = build_model(settled, source), Data(source=source, division=division)
    inputs = Inputs(data=data, settled=settled, model=model)
    clock = iter(range(10))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    trainer = trials.trainer_of(inputs)
    val = len(division["val"])
    looked = val if objective == "classification" else 2 * val + len(division["train"])
    assert trials.evaluation_time(inputs, trainer, "val") == pytest.approx(looked / val)


def test_evaluations_take_no_more_than_their_share_of_the_time(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With a resumed run knowing how often that was."""
    monkeypatch.setattr(trials, "limit", lambda _: 0.0)
    monkeypatch.setattr(trials, "evaluation_time", lambda *at: {"val": 1.0, "test": 1.0}[at[2]])
    monkeypatch.setattr(trials, "pace", lambda *_, **__: 0.5)
    settings = {"time": "60s", "average": 0.0}
    train(tmp_path / "run", **settings)
    spec = config(tmp_path / "run")
    assert spec.steps is not None
    assert spec.eval_every is not None
    assert 1 <= spec.steps / spec.eval_every <= 0.2 * 60
    assert train(tmp_path / "run", **settings).result is None
