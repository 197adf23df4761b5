"""Images of any size in one process: the grid is a matter of the call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from patchword.models.mixer import Mixer
from patchword.models.position import resample_positions
from patchword.models.vit import ViT
from patchword.spec.model import MixerSpec, Position, PositionAt, StemSpec, ViTSpec
from patchword.spec.parse import PatchwordError

Perturb = Callable[[nn.Module], None]
SIZES = ((24, 12), (16, 24), (4, 4), (32, 48), (16, 24))
"""The second and the last are the model's own."""


def spec_of(**options: Any) -> ViTSpec:
    values: dict[str, Any] = {
        "depth": 2,
        "width": 16,
        "mlp_width": 16,
        "heads": 2,
        "patch_size": (4, 4),
        "image_size": (16, 24),
        "num_classes": 3,
        "registers": 1,
    }
    return ViTSpec(**(values | options))


def moved(model: ViT, size: tuple[int, int]) -> ViT:
    """The model as `load_model(..., image_size=size)` makes it of the same weights."""
    spec = dataclasses.replace(model.spec, image_size=size)
    tensors = dict(model.state_dict())
    resample_positions(tensors, model.spec, spec)
    other = ViT(spec)
    other.load_state_dict(tensors)
    return other.eval()


@pytest.mark.parametrize("position_at", ["stem", "every", "every-shared"])
@pytest.mark.parametrize(
    "position", ["none", "learned-1d", "learned-2d", "relative", "rotary", "sincos2d"]
)
def test_any_size_is_what_a_model_of_that_size_answers(
    position: Position, position_at: PositionAt, perturb: Perturb
):
    model = ViT(spec_of(position=position, position_at=position_at)).eval()
    perturb(model)
    for size in SIZES:
        other, images = moved(model, size), torch.randn(2, 3, *size)
        outputs = model.features(images)
        assert outputs.grid == (size[0] // 4, size[1] // 4) == other.spec.grid
        assert torch.equal(model(images), other(images))
        assert torch.equal(model.pooled_features(images), other.pooled_features(images))
        for ours, theirs in zip(outputs[:2], other.features(images)[:2], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("pool", ["gap", "map", "token+gap"])
def test_any_size_of_every_pool(pool: Any, perturb: Perturb):
    model = ViT(spec_of(pool=pool, position_at="every", position="relative")).eval()
    perturb(model)
    images = torch.randn(2, 3, 8, 32)
    assert torch.equal(model(images), moved(model, (8, 32))(images))


def test_any_size_of_a_hybrid(perturb: Perturb):
    stem = StemSpec(layers=(1,), width=32)
    model = ViT(spec_of(stem=stem, patch_size=(8, 8), image_size=(16, 24))).eval()
    perturb(model)
    images = torch.randn(2, 3, 32, 16)
    assert model.features(images).grid == (4, 2)
    assert torch.equal(model(images), moved(model, (32, 16))(images))


@pytest.mark.parametrize("position", ["learned-1d", "learned-2d", "relative"])
def test_gradients_reach_the_table_at_every_size(position: Position, perturb: Perturb):
    """The resampled table is made anew at each call: after a step it is another."""
    model = ViT(spec_of(position=position))
    perturb(model)
    images = torch.randn(2, 3, 24, 12)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torch.inference_mode():  # what is kept between calls knows nothing of this mode
        model(images)
    for _ in range(2):
        optimizer.zero_grad()
        model(images).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.positions.parameters())
        optimizer.step()
    assert torch.equal(model.eval()(images), moved(model, (24, 12))(images))


@pytest.mark.parametrize("position", ["learned-1d", "learned-2d", "sincos2d", "rotary", "relative"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_keep_theirs(position: Position, dtype: torch.dtype, perturb: Perturb):
    model = ViT(spec_of(position=position)).to(dtype)
    perturb(model)
    assert model(torch.randn(2, 3, 8, 32, dtype=dtype)).dtype is dtype


def test_training_drops_patches_of_the_images_own_grid(perturb: Perturb):
    model = ViT(spec_of(patch_dropout=0.5, position="learned-2d"))
    seen: list[int] = []
    model.blocks[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    model.train()(torch.randn(2, 3, 8, 32))
    assert seen == [2 + 8]


def test_a_mixer_has_one_size():
    spec = MixerSpec(
        depth=1,
        width=8,
        tokens_mlp_width=8,
        channels_mlp_width=8,
        patch_size=(4, 4),
        image_size=(8, 12),
    )
    assert Mixer(spec).features(torch.zeros(1, 3, 8, 12)).grid == (2, 3)
    for shape in ((1, 3, 16, 12), (1, 1, 8, 12), (3, 8, 12)):
        with pytest.raises(PatchwordError, match=r"the model takes \[B, 3, 8, 12\], a Mixer no"):
            Mixer(spec)(torch.zeros(shape))
