"""Training on the device: exact resume, equal bits, losses that are not finite, little memory."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from settling import config, settled
from torch import Tensor

import patchword
from patchword.models.model import Model
from patchword.models.zoo import create_model
from patchword.run import trials
from patchword.session.device import make_deterministic
from patchword.spec.parse import Interrupted, PatchwordError, changed
from patchword.spec.train import TrainSpec
from patchword.training.loop import Loop
from patchword.training.trainer import Trainer
from patchword.weights.native import load_tensors

pytestmark = pytest.mark.device

DTYPES = (torch.float32, torch.bfloat16)
SETTINGS: dict[str, Any] = {
    "steps": 5,
    "batch_size": 16,
    "width": 32,
    "depth": 2,
    "average": 0.9,
    "log_every": 2,
    "eval_every": 5,
    "checkpoint_every": 2,
    "workers": 0,
    "deterministic": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "float32": {"dropout": 0.1, "mixup": 0.2, "parts": 2, "precision": "float32"},
    "bfloat16": {"drop_path": 0.1, "cutmix": 1.0, "erasing": 0.5, "precision": "bfloat16"},
    "relative": {"position": "relative", "optimizer": "sgd", "lr": 0.1, "precision": "bfloat16"},
    "mae": {"objective": "mae", "mixup": 0.0, "probe_images": 0},
    "masked-patch": {"objective": "masked-patch", "mixup": 0.0, "probe_images": 0},
}


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch):
    """The report is drawn on the CPU, and takes longer than these runs."""
    monkeypatch.setattr("patchword.run.finish.report_run", lambda *_: None)
    monkeypatch.setattr("patchword.run.pretraining.report", lambda *_: None)


def tensors_of(run: Path) -> dict[str, Tensor]:
    """All that the last checkpoint and the best weights hold."""
    files = [path for part in ("last", "best") for path in (run / part).glob("*.safetensors")]
    return {
        f"{path.parent.name}/{path.name}/{name}": value
        for path in sorted(files)
        for name, value in load_tensors(path)[0].items()
    }


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_ends_with_the_same_bits(
    kind: str, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    """Stopped after step 3, with `--deterministic`."""
    settings: dict[str, Any] = SETTINGS | KINDS[kind] | {"device": device.type}
    patchword.train("digits", out=tmp_path / "whole", **settings)
    show = Loop.show

    def stop(self: Loop, *args: Any) -> None:
        show(self, *args)
        if self.trainer.progress.step == 3:
            self.signals.append(15)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "show", stop)
        with pytest.raises(Interrupted, match="after step 3"):
            patchword.train("digits", out=tmp_path / "stopped", **settings)
    patchword.train("digits", out=tmp_path / "stopped", **settings)
    whole, stopped = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "stopped")
    assert whole.keys() == stopped.keys()
    assert [name for name in whole if not torch.equal(whole[name], stopped[name])] == []


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_steps_have_equal_bits(small_model: Model, dtype: torch.dtype, device: torch.device):
    """Of every family, with only deterministic kernels: none is missing one."""
    make_deterministic()
    spec = changed(TrainSpec(source="digits"), parts=2, warmup=0.0)
    images = torch.randn(4, 3, *small_model.spec.image_size).to(device)
    targets = torch.arange(4).to(device)
    ends: list[list[Tensor]] = []
    start = {name: value.clone() for name, value in small_model.state_dict().items()}
    for _ in range(2):
        small_model.load_state_dict(start)
        trainer = Trainer(small_model, settled(spec, dtype, device.type))
        for _ in range(2):
            loss, norm = trainer.step(images, targets, 1e-3)
            assert math.isfinite(loss + norm)
        ends.append([p.detach().clone() for p in small_model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert not torch.equal(ends[0][0].cpu(), next(iter(start.values())))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_that_is_not_finite_changes_nothing(
    dtype: torch.dtype, value: float, device: torch.device
):
    spec = changed(TrainSpec(source="digits"), average=0.9, parts=2, warmup=0.0)
    trainer = Trainer(create_model("ViT-mu/2", 10, 8), settled(spec, dtype, device.type))
    images, targets = torch.randn(4, 3, 8, 8).to(device), torch.arange(4).to(device)
    trainer.step(images, targets, 0.1)
    assert trainer.average is not None
    modules = (trainer.model, trainer.working.module, trainer.average.model)
    before = [p.detach().clone() for module in modules for p in module.parameters()]
    bad = images.clone()
    bad[3, 0, 0, 0] = value  # in the second micro-batch
    assert not all(map(math.isfinite, trainer.step(bad, targets, 0.1)))
    after = [p for module in modules for p in module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert math.isfinite(trainer.step(images, targets, 0.1)[0])
    assert not torch.equal(next(trainer.model.parameters()), before[0])


# Little memory -----------------------------------------------------------------------------------

LIMIT = 2**29
"""Bytes of a device on which there is little memory."""


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """Weights to start from: with them a run fits its batch to the memory."""
    model = create_model("ViT-mu/2", 10, 16)
    return patchword.save_model(model, tmp_path / "start.safetensors")


@pytest.fixture
def little_memory(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device on which a step of the whole batch fails for want of memory.

    On CUDA it is real: PyTorch's allocator is held to `LIMIT` more bytes than it has. Elsewhere,
    where PyTorch has no such limit, the step raises the allocator's error itself, and the search by
    trying, which is for GPUs, is called as if the device were one.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        share = (torch.cuda.memory_reserved() + LIMIT) / total
        torch.cuda.set_per_process_memory_fraction(share)
        yield
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
        return
    step = Trainer.step

    def limited(self: Trainer, inputs: Tensor, targets: Tensor, lr: float) -> tuple[float, float]:
        if len(inputs) // self.settled.parts > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(self, inputs, targets, lr)

    monkeypatch.setattr(Trainer, "step", limited)
    monkeypatch.setattr(trials, "has_own_memory", lambda device: True)
    yield


@pytest.mark.usefixtures("little_memory")
def test_a_batch_is_divided_until_it_fits(
    start: Path, tmp_path: Path, device: torch.device, capsys: pytest.CaptureFixture[str]
):
    """Each failed try leaves its memory to the next, and the run then trains."""
    gpu = device.type == "cuda"
    settings: dict[str, Any] = {"batch_size": 1024, "image_size": 64} if gpu else {"batch_size": 64}
    settings |= {"init": start, "recipe": "transfer", "steps": 2, "workers": 0, "enlarge": 1.0}
    settings |= {"lr": 1e-3, "average": 0.0}
    run = tmp_path / "run"
    result = patchword.train("digits", out=run, device=device.type, **settings)
    spec = config(run)
    parts = spec.optim.parts
    assert parts > 1 if gpu else parts == 4
    assert f"batch of {spec.batch_size} in {parts} parts" in capsys.readouterr().err
    assert result.summary["steps"] == 2


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_want_of_memory_outside_the_allocator(message: str):
    """cuBLAS, the driver and Triton take memory of their own and say so in their own words."""
    with (
        pytest.raises(PatchwordError, match="out of memory with 8 images at a time"),
        trials.memory_explained(settled(changed(TrainSpec(source="digits"), batch_size=8))),
    ):
        raise RuntimeError(message)


def test_a_failed_try_leaves_no_memory_behind(
    start: Path, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    """Its weights are gone at the next one, though a cycle of references holds them, as with some
    versions of PyTorch the optimiser does."""
    alive: list[weakref.ref[Any]] = []
    counts: list[int] = []

    def fail(self: Trainer, *_: Any) -> None:
        counts.append(sum(ref() is not None for ref in alive))
        alive.extend(weakref.ref(p) for p in self.working.module.parameters())
        vars(self)["cycle"] = self
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Trainer, "step", fail)
    monkeypatch.setattr(trials, "has_own_memory", lambda device: True)
    gc.disable()
    try:
        with pytest.raises(PatchwordError, match="out of memory"):
            patchword.train(
                *("digits", "transfer"),
                **{"init": start, "out": tmp_path / "run", "steps": 2, "batch_size": 16},
                **{"workers": 0, "enlarge": 1.0, "device": device.type},
            )
    finally:
        gc.enable()
    assert counts == [0] * 5
