"""Device, precision, and the working copy of a model."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from patchword.models.zoo import create_model
from patchword.session import device as parallel
from patchword.session.device import (
    Working,
    make_deterministic,
    resolve_device,
    resolve_precision,
)
from patchword.spec.parse import PatchwordError


def trained(images: int = 8) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A model whose logits depend on all weights, with a batch."""
    model = create_model("ViT-mu/8", 5, 16)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, torch.randn(images, 3, 16, 16), torch.randint(5, (images,))


def gradients(model: nn.Module) -> torch.Tensor:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == len(list(model.parameters()))
    assert all(g.dtype is torch.float32 for g in found)
    return torch.cat([g.flatten() for g in found])


def test_float32_is_the_model_itself():
    model, images, labels = trained()
    working = Working(model, torch.float32)
    assert working.module is model
    assert torch.equal(working(images), model(images))
    nn.functional.cross_entropy(working(images), labels).backward()
    before = gradients(model).clone()
    working.collect()
    working.refresh()
    assert torch.equal(gradients(model), before)


def test_bfloat16_gradients_are_collected_in_float32():
    """Within 3 % of float32's in norm: bfloat16 keeps 8 bits."""
    model, images, labels = trained()
    nn.functional.cross_entropy(model(images), labels).backward()
    wanted = gradients(model).clone()
    model.zero_grad()
    working = Working(model, torch.bfloat16)
    logits = working(images)
    assert logits.dtype is torch.float32
    assert all(p.dtype is torch.bfloat16 for p in working.module.parameters())
    assert all(p.dtype is torch.float32 for p in model.parameters())
    nn.functional.cross_entropy(logits, labels).backward()
    assert all(p.grad is None for p in model.parameters())
    working.collect()
    assert all(p.grad is None for p in working.module.parameters())
    assert (gradients(model) - wanted).norm() < 0.03 * wanted.norm()


def test_bfloat16_accumulates_exactly():
    """Two micro-batches add up to the sum of each alone, in float32: no rounding to bfloat16."""
    model, images, labels = trained()
    working = Working(model, torch.bfloat16)
    alone: list[torch.Tensor] = []
    for half in (slice(0, 4), slice(4, 8)):
        nn.functional.cross_entropy(working(images[half]), labels[half]).backward()
        working.collect()
        alone.append(gradients(model).clone())
        model.zero_grad()
    for half in (slice(0, 4), slice(4, 8)):
        nn.functional.cross_entropy(working(images[half]), labels[half]).backward()
        working.collect()
    assert torch.equal(gradients(model), alone[0] + alone[1])


def test_refresh_takes_over_the_masters_weights():
    model, images, _ = trained()
    working = Working(model, torch.bfloat16)
    before = working(images)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    assert torch.equal(working(images), before)
    working.refresh()
    assert not torch.equal(working(images), before)
    for mine, master in zip(working.module.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, master.bfloat16())


def test_weights_that_do_not_train_are_taken_over_when_asked():
    """As when a checkpoint is read; after an update they are what they were."""
    model, _, _ = trained()
    frozen = "patch_embedding.weight"
    model.get_parameter(frozen).requires_grad_(False)
    working = Working(model, torch.bfloat16)
    before = working.module.get_parameter(frozen).clone()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    working.refresh()
    for name, mine in working.module.named_parameters():
        wanted = before if name == frozen else model.get_parameter(name).bfloat16()
        assert torch.equal(mine, wanted)
    working.refresh(frozen=True)
    for mine, master in zip(working.module.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, master.bfloat16())


def test_small_updates_are_not_lost():
    """A change below bfloat16's resolution stays in the master and shows once it has grown."""
    model, _, _ = trained()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    working = Working(model, torch.bfloat16)
    mine = next(working.module.parameters())
    for _ in range(10):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1e-3)
        working.refresh()
    assert mine.flatten()[0].item() == pytest.approx(1.01, abs=4e-3)
    assert mine.flatten()[0].item() > 1


def test_training_mode_reaches_the_copy():
    model = create_model("ViT-mu/8", 5, 16, dropout=0.5)
    for dtype in (torch.float32, torch.bfloat16):
        working = Working(model, dtype)
        working.train()
        assert working.module.training
        working.train(False)
        assert not working.module.training


def test_precision_by_device(monkeypatch: pytest.MonkeyPatch):
    cpu = torch.device("cpu")
    assert resolve_precision("float32", cpu) is torch.float32
    assert resolve_precision("bfloat16", cpu) is torch.bfloat16
    for has, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(parallel, "cpu_has_bfloat16", lambda has=has: has)
        assert resolve_precision("auto", cpu) is wanted
        assert resolve_precision("auto", torch.device("mps")) is torch.float32


def test_device(monkeypatch: pytest.MonkeyPatch):
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.mps, "is_available", lambda: False)
    assert resolve_device() == torch.device("cpu")
    with pytest.raises(PatchwordError, match="no cuda device; use --device cpu"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.mps, "is_available", lambda: True)
    assert resolve_device() == torch.device("mps")


def test_precision_of_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """Only a bfloat16 that the GPU computes with itself counts."""
    for native in (True, False):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, native=native: including_emulation or native,
        )
        wanted = torch.bfloat16 if native else torch.float32
        assert resolve_precision("auto", torch.device("cuda")) is wanted


def test_deterministic(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # put back as it was afterwards
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # as torch asks of CUDA
    finally:
        torch.use_deterministic_algorithms(False)
