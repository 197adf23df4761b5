"""Explanations: the planted patch is found, and rollout is what its equations say."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor, nn

from patchword.inspection.explain import (
    Explanation,
    explain_class,
    gradient_rollout,
    rank_correlation,
)
from patchword.models.attention import SelfAttention
from patchword.models.layers import Block
from patchword.models.mixer import Mixer
from patchword.models.vit import ViT
from patchword.models.zoo import create_model
from patchword.spec.model import MixerSpec, Pool
from patchword.spec.parse import PatchwordError

Make = Callable[..., ViT]

# The planted patch ---------------------------------------------------------------------------

COLOURS = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])
PLAIN = len(COLOURS)
"""The class of images without a coloured patch: with it, no colour can be told by what is missing
"""


def planted(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise of 4 x 4 patches of 4 pixels, one of which is red, green or blue, or none; the classes;
    and the coloured patches' places."""
    draw = torch.Generator().manual_seed(seed)
    images = 0.5 * torch.randn(count, 3, 16, 16, generator=draw)
    classes = torch.randint(PLAIN + 1, (count,), generator=draw)
    places = torch.randint(16, (count,), generator=draw)
    for image, label, place in zip(images, classes.tolist(), places.tolist(), strict=True):
        if label != PLAIN:
            top, left = place // 4 * 4, place % 4 * 4
            image[:, top : top + 4, left : left + 4] += COLOURS[label, :, None, None]
    return images, classes, places


@pytest.fixture(scope="module", params=["token", "gap", "map"])
def found(request: pytest.FixtureRequest) -> tuple[list[Explanation], np.ndarray]:
    """Explanations of images with a coloured patch that a ViT of two layers has learned to name,
    and the places of these patches."""
    pool: Pool = request.param
    torch.manual_seed(0)
    model = create_model("ViT-mu/4", PLAIN + 1, 16, depth=2, pool=pool)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    images, classes, _ = planted(2048, 0)
    for step in range(200):
        at = torch.arange(step * 64, step * 64 + 64) % len(images)
        optimizer.zero_grad()
        F.cross_entropy(model(images[at]), classes[at]).backward()
        optimizer.step()
    images, classes, places = planted(160, 1)
    model.eval()
    with torch.no_grad():
        assert (model(images).argmax(1) == classes).float().mean() > 0.97
    coloured = classes != PLAIN
    images, classes = images[coloured], classes[coloured]
    return explain_class(model, images, classes), places[coloured].numpy()


@pytest.mark.parametrize("name", ["rollout", "occlusion"])
def test_the_planted_patch_ranks_first(
    found: tuple[list[Explanation], np.ndarray], name: str
) -> None:
    explanations, places = found
    first = np.array([explanation.maps[name].argmax() for explanation in explanations])
    assert (first == places).mean() >= 0.95


@pytest.mark.parametrize("name", ["rollout", "occlusion"])
def test_the_scores_tell_a_map_that_finds_the_patch_from_chance(
    found: tuple[list[Explanation], np.ndarray], name: str
) -> None:
    deletion, insertion = np.mean([one.scores[name] for one in found[0]], axis=0)
    chance = np.mean([one.scores["random"] for one in found[0]], axis=0)
    assert deletion < chance[0] - 0.15
    assert insertion > chance[1] + 0.15


# Gradient-weighted rollout -------------------------------------------------------------------


def constant_scale(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + norm.eps).detach()
    return centred / scale * norm.weight + norm.bias


def slow_rollout(model: ViT, image: Tensor, target: int) -> np.ndarray:
    """The whole network in one graph, all matrices at once."""
    spec, kept = model.spec, []
    x = model.embed(image[None])
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        table, rule = model.positions_of(layer, spec.grid)
        x = x if table is None else x + table
        y = constant_scale(block.norm1, x)
        kept.append(block.attention.weights(y, rule))
        y = block.attention.applied(kept[-1], y)
        x = x + (y if block.scale1 is None else y * block.scale1)
        y = block.mlp(constant_scale(block.norm2, x))
        x = x + (y if block.scale2 is None else y * block.scale2)
    x = constant_scale(model.norm, x)
    if spec.pool == "gap":
        logits = model.classify(x[:, spec.prefix :].mean(1))
    else:
        logits = model.classify(x[:, 0])
        if model.distillation_head is not None:
            logits = (logits + model.distillation_head(x[:, 1])) / 2
    probability = logits.double().softmax(1)[0, target]
    gradients = torch.autograd.grad((probability / (1 - probability)).log(), kept)
    total = torch.eye(x.shape[1])
    for weights, gradient in zip(kept, gradients, strict=True):
        matrix = (weights * gradient)[0].detach().clamp(min=0).mean(0)
        total = (torch.eye(len(total)) + matrix) @ total
    rows = total[spec.prefix :] if spec.pool == "gap" else total[:1]
    if spec.distillation == "head":
        rows = total[:2]
    return rows.mean(0)[spec.prefix :].view(spec.grid).numpy()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pool": "gap", "position": "learned-2d"},
        {"distillation": "head", "registers": 1, "layer_scale": 0.5},
        {"distillation": "token", "position_at": "every"},
        {"position": "relative", "position_at": "every", "pool": "gap"},
        {"position": "rotary", "registers": 2, "activation": "swiglu", "depth": 3},
    ],
)
def test_rollout_layer_by_layer_is_that_of_the_whole_graph(
    options: dict[str, Any], random_vit: Make
) -> None:
    model = random_vit(**options)
    images, classes = torch.randn(3, 3, *model.spec.image_size), torch.tensor([4, 0, 2])
    found = gradient_rollout(model, images, classes)
    slow = [slow_rollout(model, *one) for one in zip(images, classes.tolist(), strict=True)]
    np.testing.assert_allclose(found, slow, rtol=2e-3, atol=1e-5)


def test_rollout_knows_neither_what_is_common_to_all_logits_nor_the_order_of_heads(
    random_vit: Make,
) -> None:
    model = random_vit()
    images, classes = torch.randn(2, 3, *model.spec.image_size), torch.tensor([3, 1])
    before = gradient_rollout(model, images, classes)
    with torch.no_grad():
        assert model.head is not None
        model.head.weight += torch.randn(64)
        for block in model.blocks:
            assert isinstance(block, Block)
            attention = block.attention
            width = 64 // attention.heads
            order = torch.arange(64).roll(width)
            for tensor in (attention.qkv.weight, attention.qkv.bias):
                parts = tensor.view(3, 64, -1)[:, order]
                tensor.copy_(parts.reshape(tensor.shape))
            attention.projection.weight.copy_(attention.projection.weight[:, order])
    np.testing.assert_allclose(gradient_rollout(model, images, classes), before, rtol=1e-3)


@pytest.mark.parametrize("pool", ["token", "map"])
def test_the_model_is_left_as_it_was(pool: Pool, random_vit: Make) -> None:
    model = random_vit(pool=pool, dropout=0.5, drop_path=0.5)
    model.train()
    model.blocks[0].eval()
    model.norm.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, classes = torch.randn(2, 3, *model.spec.image_size), torch.tensor([3, 1])
    with torch.no_grad():
        first, again = (gradient_rollout(model, images, classes) for _ in range(2))
    np.testing.assert_array_equal(first, again)  # dropout was off
    assert model.training
    assert not model.blocks[0].training
    assert not model.norm.weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for parameter in model.parameters():
        assert parameter.grad is None or (parameter.grad == 1).all()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_frozen_model_has_a_rollout_too(random_vit: Make) -> None:
    model = random_vit()
    images, classes = torch.randn(1, 3, *model.spec.image_size), torch.tensor([3])
    expected = gradient_rollout(model, images, classes)
    model.requires_grad_(False)
    np.testing.assert_array_equal(gradient_rollout(model, images, classes), expected)


def test_one_layers_attention_is_in_memory_at_a_time(
    random_vit: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Tensor]] = []

    def watched(*arguments: Any) -> Tensor:
        gc.collect()
        assert not any(weights() is not None for weights in made)
        weights = plain(*arguments)
        made.append(weakref.ref(weights))
        return weights

    plain = SelfAttention.weights
    monkeypatch.setattr(SelfAttention, "weights", watched)
    model = random_vit(depth=4)
    gradient_rollout(model, torch.randn(1, 3, *model.spec.image_size), torch.tensor([3]))
    assert len(made) == 4


def test_a_model_in_bfloat16_has_a_rollout_too(random_vit: Make) -> None:
    model = random_vit(pool="map")
    images, classes = torch.randn(1, 3, *model.spec.image_size), torch.tensor([3])
    expected = gradient_rollout(model, images, classes)
    found = gradient_rollout(model.bfloat16(), images, classes)
    assert rank_correlation(found, expected) > 0.9
    np.testing.assert_allclose(found.sum(), expected.sum(), rtol=0.2)


# Agreement and the whole ---------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=3, max_size=20), st.integers(0, 100))
def test_rank_correlation_is_scipys(values: list[int], seed: int) -> None:
    first = np.array(values, dtype=float)
    second = np.random.default_rng(seed).integers(0, 4, len(first)).astype(float)
    if len(set(values)) == 1 or len(set(second)) == 1:
        assert math.isnan(rank_correlation(first, second))
    else:
        wanted, _ = spearmanr(first, second)
        assert rank_correlation(first, second) == pytest.approx(wanted, abs=1e-12)
        assert rank_correlation(first, np.exp(first)) == pytest.approx(1)
        assert rank_correlation(first, -first) == pytest.approx(-1)


def test_explanations_do_not_depend_on_the_company(random_vit: Make) -> None:
    model = random_vit()
    images, classes = torch.randn(3, 3, *model.spec.image_size), torch.tensor([3, 1, 1])
    together = explain_class(model, images, classes)
    for at, one in enumerate(together):
        (alone,) = explain_class(model, images[at : at + 1], classes[at : at + 1], batch_size=3)
        assert alone.target == one.target == classes[at]
        assert alone.agreement == pytest.approx(one.agreement)
        for name, curves in one.curves.items():
            np.testing.assert_allclose(alone.curves[name].deletion, curves.deletion, rtol=1e-4)
            np.testing.assert_allclose(alone.curves[name].insertion, curves.insertion, rtol=1e-4)
        with torch.no_grad():
            p = model.probabilities(model(images[at : at + 1]))[0, one.target].item()
        assert one.probability == pytest.approx(p, rel=1e-5)
        assert one.agreement == rank_correlation(one.maps["rollout"], one.maps["occlusion"])


def test_the_yardstick_is_the_same_for_deletion_and_insertion(random_vit: Make) -> None:
    model = random_vit()
    images, classes = torch.randn(1, 3, *model.spec.image_size), torch.tensor([3])
    (one,) = explain_class(model, images, classes)
    chance = one.curves["random"]
    np.testing.assert_allclose(chance.deletion, chance.insertion[::-1])
    whole, blank = (one.curves["rollout"].deletion[at] for at in (0, -1))
    assert chance.insertion[[0, -1]] == pytest.approx([blank, whole])
    assert one.scores["random"][0] == pytest.approx(one.scores["random"][1])
    (other,) = explain_class(model, images, classes, seed=1)
    assert other.scores["random"] != one.scores["random"]
    assert other.scores["rollout"] == one.scores["rollout"]


def test_a_model_without_attention_is_explained_by_occlusion_alone() -> None:
    spec = MixerSpec(
        depth=1,
        width=16,
        tokens_mlp_width=8,
        channels_mlp_width=8,
        patch_size=(4, 4),
        image_size=(12, 8),
        num_classes=5,
    )
    model = Mixer(spec)
    images, classes = torch.randn(1, 3, 12, 8), torch.tensor([2])
    (one,) = explain_class(
        model, images, classes
    )  # the head is still 0: nothing speaks for anything
    assert list(one.maps) == ["occlusion"]
    assert list(one.curves) == ["occlusion", "random"]
    assert one.agreement is None
    assert not one.maps["occlusion"].any()
    assert one.scores["occlusion"] == pytest.approx((0.2, 0.2))
    with pytest.raises(PatchwordError, match="Mixer has no attention"):
        gradient_rollout(model, images, classes)
