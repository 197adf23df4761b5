"""The moving average of the weights against a plain loop."""

from __future__ import annotations

import pytest
import torch

from patchword.models.zoo import create_model
from patchword.training.average import Average


def draw(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9999])
def test_average_equals_a_plain_loop(decay: float):
    """1e-5 absolute in float32, over 30 updates, the early ones with less decay."""
    model = create_model("ViT-mu/8", 3, 16, head="mlp")
    average = Average(model, decay)
    plain = {name: p.detach().double() for name, p in model.named_parameters()}
    for step in range(30):
        draw(model)
        average.update(model, step)
        share = min(decay, (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            plain[name] = share * plain[name] + (1 - share) * p.detach().double()
    for name, p in average.model.named_parameters():
        torch.testing.assert_close(p.double(), plain[name], rtol=0, atol=1e-5)


def test_average_is_a_copy_that_does_not_train():
    model = create_model("ViT-mu/8", 3, 16, dropout=0.5).train()
    average = Average(model, 0.9)
    assert not average.model.training
    assert not any(p.requires_grad for p in average.model.parameters())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    before = {name: p.clone() for name, p in average.model.named_parameters()}
    draw(model)
    assert all(torch.equal(p, before[name]) for name, p in average.model.named_parameters())
    still = {name: p.clone() for name, p in model.named_parameters()}
    average.update(model, 0)
    assert all(torch.equal(p, still[name]) for name, p in model.named_parameters())


def test_constant_weights_stay():
    model = create_model("ViT-mu/8", 3, 16)
    average = Average(model, 0.99)
    for step in range(5):
        average.update(model, step)
    for p, q in zip(model.parameters(), average.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("updates", [100, 500])
def test_short_runs_average_over_their_last_tenth(updates: int):
    """With the paper's 0.9999: weights that grow by one an update are a tenth of the run behind
    (1 % relative), of which the start has no part."""
    model = create_model("ViT-mu/8", 3, 16, depth=1)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1e9)  # the start
    average = Average(model, 0.9999)
    for step in range(updates):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(step + 1)
        average.update(model, step)
    for p in average.model.parameters():
        behind = updates - p.flatten()[0].item()
        assert behind == pytest.approx(updates / 10, rel=0.01)


def test_frozen_weights_are_left_alone():
    model = create_model("ViT-mu/8", 3, 16, head="mlp")
    model.patch_embedding.requires_grad_(False)
    average = Average(model, 0.5)
    before = {name: p.clone() for name, p in average.model.named_parameters()}
    draw(model)
    average.update(model, 0)
    changed = {n for n, p in average.model.named_parameters() if not torch.equal(p, before[n])}
    frozen = {"patch_embedding.weight", "patch_embedding.bias"}
    assert changed == set(before) - frozen
