"""The parts of the loop; whole runs are in tests/faults."""

import math
import signal
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from settling import settled

from patchword.models.zoo import create_model
from patchword.spec.batch import Batch
from patchword.spec.parse import Interrupted, changed
from patchword.spec.train import TrainSpec
from patchword.training.clock import Clock
from patchword.training.loop import due
from patchword.training.signals import watch_signals
from patchword.training.trainer import Progress, Trainer


@given(total=st.integers(1, 200), every=st.integers(1, 250))
def test_due_at_every_multiple_and_once_at_the_end(total, every):
    found = [step for step in range(total + 1) if due(step, every, total)]
    assert found == sorted({*range(every, total + 1, every), total})


def trainer_of(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    spec = changed(TrainSpec(source="digits"), **changes)
    return Trainer(create_model("ViT-mu/2", 10, 8, dropout=0.1), settled(spec, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_batch_is_learned(dtype):
    trainer = trainer_of(dtype, lr=1e-3)
    images, targets = torch.randn(8, 3, 8, 8), torch.arange(8)
    losses = [trainer.step(images, targets, 3e-3)[0] for _ in range(60)]
    assert losses[0] == pytest.approx(2.30, abs=0.1)
    assert losses[-1] < 0.3


def test_micro_batches_add_up_to_the_step():
    """Without dropout, accumulation changes rounding only."""
    images, targets = torch.randn(12, 3, 8, 8), torch.arange(12) % 10
    weights, norms = [], []
    for parts in (1, 3):
        trainer = trainer_of(parts=parts, batch_size=12, optimizer="sgd", clip=0.5)
        trainer.model.eval()
        trainer.working.train = lambda mode=True: None
        norms.append([trainer.step(images, targets, 0.1)[1] for _ in range(3)])
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


def test_draws_depend_on_the_position_alone():
    """Dropout after a resume is that of the undisturbed run, whatever was drawn before."""
    images, targets = torch.randn(8, 3, 8, 8), torch.arange(8)
    losses = []
    for draws in (0, 7):
        trainer = trainer_of()
        torch.rand(draws)
        trainer.progress.position = 5
        losses.append(trainer.step(images, targets, 0.0))
    trainer.progress.position = 6
    assert losses[0] == losses[1] != trainer.step(images, targets, 0.0)


def test_micro_batches_drop_different_units():
    """Equal images in two of them."""
    trainer = trainer_of(parts=2, lr=1e-3)
    assert trainer.model.head is not None
    torch.nn.init.normal_(trainer.model.head.weight)
    logits = []
    trainer.model.register_forward_hook(lambda *given: logits.append(given[-1].detach()))
    image = torch.randn(1, 3, 8, 8)
    trainer.step(torch.cat([image, image]), torch.tensor([1, 1]), 0.0)
    first, second = logits
    assert not torch.equal(first, second)


def test_an_infinite_gradient_of_a_finite_loss_changes_nothing():
    trainer = trainer_of(lr=1e-3)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    assert trainer.model.head is not None
    trainer.model.head.bias.register_hook(lambda gradient: gradient * math.inf)
    loss, norm = trainer.step(torch.randn(4, 3, 8, 8), torch.arange(4), 0.1)
    assert math.isfinite(loss)
    assert not math.isfinite(norm)
    assert all(torch.equal(*pair) for pair in zip(trainer.model.parameters(), before, strict=True))


def test_state_is_restored_bit_for_bit(tmp_path):
    images, targets = torch.randn(8, 3, 8, 8), torch.arange(8)
    kept, restored = trainer_of(average=0.9), trainer_of(average=0.9)
    for _ in range(3):
        kept.step(images, targets, 0.01)
        kept.progress.step += 1
    kept.write(tmp_path)
    restored.read(tmp_path, vars(kept.progress))
    for trainer in (kept, restored):
        trainer.step(images, targets, 0.01)
    assert kept.average is not None
    assert restored.average is not None
    for a, b in ((kept.model, restored.model), (kept.average.model, restored.average.model)):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_the_clock_leaves_pauses_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress()
    clock = Clock(progress)
    for step in range(4):
        now[0] += 2.0
        clock.count(16)
        if step == 1:
            with clock.paused():
                now[0] += 1000.0
    assert progress.seconds == 8.0
    assert clock.images_per_second() == 8.0
    assert clock.seconds_per_step() == 2.0
    assert clock.wait_share() == 0.0


def test_the_clock_notes_waiting(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    empty = torch.zeros(0, dtype=torch.int64)
    batch = Batch(images=empty, labels=empty, mask=empty.bool(), indices=empty)

    def slow():
        for _ in range(3):
            now[0] += 1.0
            yield batch

    clock = Clock(Progress())
    for _ in clock.waiting(slow()):
        now[0] += 3.0
        clock.count(1)
    assert clock.wait_share() == 0.25
    clock.restart_window()
    assert clock.wait_share() == clock.images_per_second() == 0.0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_noted_and_the_second_stops(signum, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    before = signal.getsignal(signum)
    received = []
    with watch_signals(received):
        signal.raise_signal(signum)
        assert received == [signum]
        now[0] = 0.5
        signal.raise_signal(signum)  # timeout(1) sends it twice
        now[0] = 1.5
        with pytest.raises(Interrupted):
            signal.raise_signal(signum)
    assert received == [signum]
    assert signal.getsignal(signum) is before


def updated_by(clip, lr=0.5):
    """Length of a plain step, and the norm of its gradient."""
    trainer = trainer_of(optimizer="sgd", momentum=0.0, weight_decay=0.0, clip=clip)
    before = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    torch.manual_seed(2)
    _, norm = trainer.step(torch.randn(8, 3, 8, 8), torch.arange(8), lr)
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return float((after - before).norm()) / lr, norm


def test_a_gradient_above_the_norm_is_scaled_down_to_it():
    length, norm = updated_by(clip=0.05)
    assert norm > 0.5
    assert length == pytest.approx(0.05, rel=1e-4)


@pytest.mark.parametrize("clip", [0.0, 1e3])
def test_a_gradient_is_never_scaled_up(clip):
    """Nor is it touched without clipping."""
    length, norm = updated_by(clip)
    assert norm < 10
    assert length == pytest.approx(norm, rel=1e-4)
