"""A run that was stopped ends with the same bits as one that was not."""

import json
import logging
import shutil

import pytest

import patchword
from patchword.run.inputs import Inputs
from patchword.spec.parse import Interrupted, UsageError
from patchword.training.checkpoint import Checkpoints
from patchword.training.criterion import TOP1
from patchword.training.loop import Loop
from patchword.weights.files import find_weights
from patchword.weights.native import load_tensors

KINDS = {
    "adamw-float32": {"optimizer": "adamw"},
    "adamw-bfloat16": {"optimizer": "adamw", "precision": "bfloat16"},
    "sgd-float32": {"optimizer": "sgd", "lr": 0.1},
    "sgd-bfloat16": {"optimizer": "sgd", "lr": 0.1, "precision": "bfloat16"},
    "plain-sgd": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.0, "average": 0.0},
}


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("crop", ["resize", "inception"])
@pytest.mark.parametrize("kind", KINDS)
def test_stopped_after_every_step(tmp_path, train, stopped_at, state_of, kind, crop):
    settings = KINDS[kind] | {"crop": crop}
    train(tmp_path / "whole", **settings)
    for step in range(1, 10):
        with pytest.raises(stopped_at(step)):
            train(tmp_path / "stopped", **settings)
    train(tmp_path / "stopped", **settings)
    assert state_of(tmp_path / "stopped") == state_of(tmp_path / "whole")


TUNINGS = {
    "lora-float32": {"tune": "lora", "lora_rank": 2},
    "lora-bfloat16": {"tune": "lora", "precision": "bfloat16", "optimizer": "sgd", "lr": 0.1},
    "last-float32": {"tune": "last", "last_blocks": 1, "layer_decay": 0.7},
    "last-bfloat16": {"tune": "last", "last_blocks": 1, "precision": "bfloat16"},
    "sampler": {"balance": "sampler"},
    "loss": {"balance": "loss"},
}


@pytest.mark.parametrize("kind", TUNINGS)
def test_fine_tuning_stopped_after_every_step(tmp_path, train, stopped_at, state_of, kind):
    train(tmp_path / "start", steps=2)
    options = {"width": None, "depth": None, "dropout": 0.1}  # those of the start
    settings = {"init": tmp_path / "start", "recipe": "transfer", "image_size": 16}
    settings |= options | TUNINGS[kind]
    train(tmp_path / "whole", **settings)
    for step in range(1, 10):
        with pytest.raises(stopped_at(step)):
            train(tmp_path / "stopped", **settings)
    train(tmp_path / "stopped", **settings)
    assert state_of(tmp_path / "stopped") == state_of(tmp_path / "whole")
    plain, _ = load_tensors(find_weights(tmp_path / "stopped"))
    start, _ = load_tensors(find_weights(tmp_path / "start"))
    assert plain.keys() == start.keys()


@pytest.mark.parametrize("kind", [*TUNINGS, "probe"])
def test_the_weights_to_start_from_are_needed_only_at_the_start(
    tmp_path, train, stopped_at, state_of, kind
):
    """Without them a run goes on to the same bits, is finished, and still knows its settings."""
    start = tmp_path / "start"
    train(start, steps=2)
    settings = {"init": start, "recipe": "transfer", "width": None, "depth": None}
    settings |= {"resize": "stretch"} | TUNINGS.get(kind, {"probe": True})
    train(tmp_path / "whole", **settings)
    with pytest.raises(stopped_at(5)):
        train(tmp_path / "stopped", **settings)
    shutil.rmtree(start)
    train(tmp_path / "stopped", **settings)
    assert state_of(tmp_path / "stopped") == state_of(tmp_path / "whole")
    assert train(tmp_path / "whole", **settings).result is None
    changes = {"image_size": 24, "resize": "short", "drop_path": 0.5}
    for name, value in changes.items():
        with pytest.raises(UsageError, match=f"other settings of .*{name}"):
            train(tmp_path / "whole", **settings | {name: value})
    for name, value in {"model": "ViT-S/16", "init": tmp_path / "other"}.items():
        with pytest.raises(UsageError, match=f"other settings of {name}"):
            train(tmp_path / "whole", **settings | {name: value})


PRETRAININGS = {
    "masked-patch-float32": {"objective": "masked-patch"},
    "masked-patch-bfloat16": {"objective": "masked-patch", "precision": "bfloat16"},
    "4x4": {"objective": "masked-patch", "predict": "4x4", "probe_images": 0, "average": 0.0},
    "mae-float32": {"objective": "mae", "position": "sincos2d"},
    "mae-bfloat16": {"objective": "mae", "precision": "bfloat16", "pool": "token"},
}


@pytest.mark.parametrize("kind", PRETRAININGS)
def test_pretraining_stopped_after_every_step(tmp_path, train, stopped_at, state_of, kind):
    """With the objective's own parts and their average; the probes leave no trace in the draws."""
    settings = {"mixup": 0.0} | PRETRAININGS[kind]
    train(tmp_path / "whole", **settings)
    for step in range(1, 10):
        with pytest.raises(stopped_at(step)):
            train(tmp_path / "stopped", **settings)
    train(tmp_path / "stopped", **settings)
    state = state_of(tmp_path / "stopped")
    assert state == state_of(tmp_path / "whole")
    assert {"last/objective.safetensors", "best/objective.safetensors"} <= state.keys()
    assert ("last/average-objective.safetensors" in state) == (settings.get("average") != 0.0)


def test_probes_change_no_weight(tmp_path, train, state_of):
    states = []
    for images in (0, 50):
        run = tmp_path / str(images)
        train(run, mixup=0.0, objective="mae", probe_images=images)
        states.append(state_of(run))
    assert "knn" in states[1]["evaluations.jsonl"][0]
    assert "knn" not in states[0]["evaluations.jsonl"][0]
    for name in ("last/model.safetensors", "last/objective.safetensors", "metrics.jsonl"):
        assert states[0][name] == states[1][name]


def test_stopped_after_every_step_with_workers(tmp_path, train, stopped_at, state_of):
    train(tmp_path / "whole", crop="inception", workers=0)
    for step in range(1, 10):
        with pytest.raises(stopped_at(step)):
            train(tmp_path / "stopped", crop="inception", workers=2)
    train(tmp_path / "stopped", crop="inception", workers=2)
    assert state_of(tmp_path / "stopped") == state_of(tmp_path / "whole")


def test_stopped_after_the_last_step(tmp_path, train, stopped_at, state_of):
    """The evaluation comes after the last checkpoint then, which does not know of it."""
    train(tmp_path / "whole")
    with pytest.raises(stopped_at(10)):
        train(tmp_path / "stopped")
    train(tmp_path / "stopped")
    whole, stopped = state_of(tmp_path / "whole"), state_of(tmp_path / "stopped")
    assert stopped.pop("progress")["evaluated"] == 8
    assert whole.pop("progress")["evaluated"] == 10
    assert stopped == whole


def test_lost_since_the_last_checkpoint(tmp_path, train, stopped_at, state_of):
    """Killed after each step, before it is saved: goes back to the checkpoint before."""
    train(tmp_path / "whole")
    for step in range(1, 11):
        with pytest.raises(stopped_at(step, Killed())):
            train(tmp_path / "killed")
    train(tmp_path / "killed")
    assert state_of(tmp_path / "killed") == state_of(tmp_path / "whole")


@pytest.mark.parametrize("after", ["write_folder", "link"])
def test_killed_between_the_parts_of_a_save(tmp_path, train, state_of, monkeypatch, after):
    """The last checkpoint is whole, but `last` does not point at it yet; or old ones remain."""
    import patchword.training.checkpoint as module

    real = getattr(module, after)
    train(tmp_path / "whole")

    def write_and_die(target, *args):
        real(target, *args)
        if target.name in ("step-00000010", "last") and (
            module.damage(tmp_path / "killed/checkpoints/step-00000010") is None
        ):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, after, write_and_die)
        with pytest.raises(Killed):
            train(tmp_path / "killed")
    train(tmp_path / "killed")
    assert state_of(tmp_path / "killed") == state_of(tmp_path / "whole")


@pytest.mark.parametrize("step", [4, 8])
def test_a_signal_cuts_an_evaluation_short(tmp_path, train, state_of, monkeypatch, step):
    """The checkpoint does not wait for an evaluation; the resumed run makes up for it."""
    train(tmp_path / "whole")
    forwards = []
    stoppable = Loop.stoppable

    def signalled(self, model):
        forward = stoppable(self, model)

        def first_then_signal(images):
            forwards.append(self.trainer.progress.step)
            self.signals.append(15)
            return forward(images)

        return first_then_signal if self.trainer.progress.step == step else forward

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "stoppable", signalled)
        with pytest.raises(Interrupted, match=f"after step {step}"):
            train(tmp_path / "cut")
        with pytest.raises(Interrupted, match=f"after step {step}"):
            train(tmp_path / "cut")  # again, while it makes up for the evaluation
    assert forwards == [step, step]
    train(tmp_path / "cut")
    assert state_of(tmp_path / "cut") == state_of(tmp_path / "whole")


def test_best_holds_the_weights_that_were_measured(tmp_path, train):
    """Raw or averaged, whichever the summary says, and from the step that it says."""
    run = tmp_path / "run"
    train(run, steps=24, average=0.8, lr=0.01, mixup=0.0, log_every=20)
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    said = (summary["best_step"], summary["best_weights"])
    (best,) = (line for line in lines if (line["step"], line["weights"]) == said)
    bar = TOP1.bar(max(line["top1"] for line in lines), best)
    assert best["top1"] == summary["best_val_top1"] >= bar
    assert all(line["top1"] < bar for line in lines if line["step"] > best["step"])
    measured = patchword.evaluate(run, "digits", split="val").classification
    assert measured.top1 == best["top1"]
    assert measured.loss == pytest.approx(best["loss"], abs=1e-6)


def test_best_is_the_average_where_that_is_better(tmp_path, train, monkeypatch):
    """Both are measured at the same step, the raw weights first and better than any before."""
    results = iter([{"top1": k / 10, "loss": 1.0, "n": 10_000} for k in range(10)])
    real = Inputs.evaluator
    monkeypatch.setattr(
        Inputs,
        "evaluator",
        lambda self, part, _=None: (lambda f: next(results)) if part == "val" else real(self, part),
    )
    train(tmp_path / "run")
    _, header = load_tensors(find_weights(tmp_path / "run"))
    assert header["extra"] == {"step": 10, "weights": "average"}


def test_what_was_saved_is_said(tmp_path, train, stopped_at, caplog):
    caplog.set_level(logging.INFO)
    with pytest.raises(stopped_at(5)) as stop:
        train(tmp_path / "run")
    assert str(stop.value) == "stopped by SIGTERM after step 5"
    assert stop.value.exit_code == 143
    assert [p.name for p in Checkpoints(tmp_path / "run", 2).steps()] == [
        "step-00000005",
        "step-00000003",
    ]
