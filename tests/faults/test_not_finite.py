"""A loss that is not finite: the update is not applied, and the policy decides."""

import json
import math

import pytest
import torch

from patchword.run.inputs import Inputs
from patchword.training.loop import TrainingError


@pytest.fixture
def poisoned(monkeypatch):
    """`poisoned(value, positions)`: those batches hold `value` instead of a pixel."""
    prepare = Inputs.prepare

    def arrange(value, *positions):
        def poison(self, batch, position):
            images, targets = prepare(self, batch, position)
            if position in positions:
                images[0, 0, 0, 0] = value
            return images, targets

        monkeypatch.setattr(Inputs, "prepare", poison)

    return arrange


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_stops_before_the_update(tmp_path, train, state_of, stopped_at, poisoned, value, precision):
    poisoned(value, 7)
    run = tmp_path / "run"
    for _ in range(2):  # and again from the checkpoint
        with pytest.raises(TrainingError) as stop:
            train(run, precision=precision)
        message = str(stop.value)
        assert "at step 8: update not applied" in message
        assert f"last good checkpoint: {run}/checkpoints/step-00000006;" in message
        assert "\n" not in message
    poisoned(value)
    train(run, precision=precision)
    train(tmp_path / "whole", precision=precision)
    assert state_of(run) == state_of(tmp_path / "whole")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_is_not_finite_changes_nothing(dtype):
    from settling import settled

    from patchword.models.zoo import create_model
    from patchword.spec.parse import changed
    from patchword.spec.train import TrainSpec
    from patchword.training.trainer import Trainer

    spec = changed(TrainSpec(source="digits"), average=0.9, parts=2, warmup=0.0)
    model = create_model("ViT-mu/2", 10, 8)
    trainer = Trainer(model, settled(spec, dtype))
    images, targets = torch.randn(4, 3, 8, 8), torch.tensor([1, 2, 3, 4])
    trainer.step(images, targets, 0.1)
    assert trainer.average is not None
    modules = (trainer.model, trainer.working.module, trainer.average.model)
    before = [[p.detach().clone() for p in module.parameters()] for module in modules]
    slots = {
        (name, slot): value.clone()
        for name, p in trainer.model.named_parameters()
        for slot, value in trainer.optimizer.state[p].items()
    }
    bad = images.clone()
    bad[3, 0, 0, 0] = math.inf  # in the second micro-batch
    loss, _ = trainer.step(bad, targets, 0.1)
    assert not math.isfinite(loss)
    for module, old in zip(modules, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), old, strict=True))
    for name, p in trainer.model.named_parameters():
        for slot, value in trainer.optimizer.state[p].items():
            assert torch.equal(value, slots[name, slot])
    assert all(p.grad is None for module in modules for p in module.parameters())
    trainer.step(images, targets, 0.1)
    assert not torch.equal(next(trainer.model.parameters()), before[0][0])


def test_rolls_back_and_passes_over(tmp_path, train, state_of, poisoned, caplog):
    poisoned(math.nan, 7)
    run = tmp_path / "run"
    train(run, on_nan="rollback")
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["rollbacks"]) == (10, 1)
    assert any("rolling back" in r.getMessage() for r in caplog.records)
    progress = state_of(run)["progress"]
    assert (progress["step"], progress["position"]) == (10, 12)  # batches 6 and 7 passed over
    steps = [line["step"] for line in state_of(run)["metrics.jsonl"]]
    assert steps == [3, 6, 9, 10]


def test_a_run_that_rolled_back_resumes_with_the_same_bits(
    tmp_path, train, state_of, poisoned, stopped_at
):
    poisoned(math.nan, 5, 9)
    train(tmp_path / "whole", on_nan="rollback")
    for step in range(1, 10):
        with pytest.raises(stopped_at(step, KeyboardInterrupt())):
            train(tmp_path / "killed", on_nan="rollback")
    train(tmp_path / "killed", on_nan="rollback")
    assert state_of(tmp_path / "killed") == state_of(tmp_path / "whole")


def test_best_weights_survive_a_rollback(tmp_path, train, monkeypatch, poisoned):
    """Measured at step 8, which comes again with other weights that are worse, then better."""
    from patchword.weights.load import read_weights

    tops = {"first": 0.5, "again": 0.2, "end": 0.3}
    names = iter(["raw4", "average4", "first", "first", "again", "again", "end", "end"])
    real = Inputs.evaluator
    monkeypatch.setattr(
        Inputs,
        "evaluator",
        lambda self, part, _=None: (
            (lambda f: {"top1": tops.get(next(names), 0.1), "loss": 1.0, "n": 10_000})
            if part == "val"
            else real(self, part)
        ),
    )
    poisoned(math.nan, 8)
    result = train(tmp_path / "run", on_nan="rollback", checkpoint_every=6)
    assert (result.summary["best_step"], result.summary["best_val_top1"]) == (8, 0.5)
    first = read_weights(tmp_path / "run")[0]
    tops |= {"again": 0.6}
    names = iter(["raw4", "average4", "first", "first", "again", "again", "end", "end"])
    result = train(tmp_path / "better", on_nan="rollback", checkpoint_every=6)
    assert (result.summary["best_step"], result.summary["best_val_top1"]) == (8, 0.6)
    again = read_weights(tmp_path / "better")[0]
    assert any(not torch.equal(first[name], again[name]) for name in first)


def test_gives_up_in_the_end(tmp_path, train, poisoned):
    poisoned(math.nan, *range(4, 100))
    with pytest.raises(TrainingError, match="that was rollback 10, giving up"):
        train(tmp_path / "run", on_nan="rollback")


def test_the_command_exits_with_1(tmp_path, command, shell):
    done = shell(command(tmp_path / "run", lr=1e30, clip=0.0, optimizer="sgd"))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "update not applied" in last
    assert "try a lower --lr, or --on-nan rollback" in last
