"""Patches taken away: against slow loops, and a model made by hand with exact answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from patchword.inspection import removal
from patchword.inspection.removal import (
    choose_window,
    drops_tokens,
    occlusion,
    patch_grid,
    removal_curves,
    windows,
)
from patchword.models.mixer import Mixer
from patchword.models.model import Model
from patchword.models.resnet import ResNet
from patchword.models.vit import ViT
from patchword.spec.batch import Outputs
from patchword.spec.model import CalibrationSpec, MixerSpec, ResNetSpec, StemSpec
from patchword.spec.parse import PatchwordError

Make = Callable[..., ViT]
CLASSES = torch.tensor([4, 0, 2])
DROPPED: dict[str, dict[str, Any]] = {
    "class token": {},
    "registers": {"registers": 2, "position": "sincos2d"},
    "distillation": {"distillation": "head"},
    "average": {"pool": "gap", "pool_norm": True, "position": "learned-2d"},
    "both": {"pool": "token+gap", "position": "none"},
    "attention pooling": {"pool": "map"},
    "sigmoid": {"probability": "sigmoid"},
}
PAINTED: dict[str, dict[str, Any]] = {
    "rotary": {"position": "rotary"},
    "relative": {"position": "relative"},
    "a table in every layer": {"position_at": "every"},
    "hybrid": {
        "stem": StemSpec(layers=(1,), width=32),
        "patch_size": (8, 4),
        "image_size": (24, 20),
    },
}


def log_odds(model: Model, logits: Tensor, target: int) -> float:
    p = model.probabilities(logits)[0, target].item()
    return math.log(p / (1 - p))


def without_tokens(model: ViT, image: Tensor, gone: set[int]) -> Tensor:
    """Logits of an image whose patches `gone` have no token, from the model's parts."""
    prefix = model.spec.prefix
    tokens = model.embed(image[None])[0]
    kept = [k for k in range(len(tokens)) if k - prefix not in gone]
    x = model.encode(tokens[kept][None], model.spec.grid)
    average = x[:, prefix:].mean(1)
    if model.pool is not None:
        pooled = model.pool(x)
    elif model.spec.pool == "gap":
        pooled = model.norm(average) if model.spec.pool_norm else average
    else:
        pooled = torch.cat([x[:, 0], average], 1) if model.spec.pool == "token+gap" else x[:, 0]
    logits = model.classify(pooled)
    if model.distillation_head is not None:
        logits = (logits + model.distillation_head(x[:, 1])) / 2
    return logits


def painted(model: Model, image: Tensor, gone: set[int]) -> Tensor:
    """Logits of an image whose patches `gone` have the image's mean colour, pixel by pixel."""
    (rows, columns), (height, width) = patch_grid(model, image[None]), image.shape[1:]
    shown = image.clone()
    for y in range(height):
        for x in range(width):
            if y * rows // height * columns + x * columns // width in gone:
                shown[:, y, x] = image.mean((1, 2))
    return model(shown[None])


def check_occlusion(
    model: Model, slow: Callable[[Any, Tensor, set[int]], Tensor], window: int
) -> None:
    images = torch.randn(3, 3, *model.spec.image_size)
    with torch.no_grad():
        found = occlusion(model, images, CLASSES, window=window, batch_size=7)
        rows, columns = patch_grid(model, images)
        high, wide = min(window, rows), min(window, columns)
        step = max(1, window // 2)
        tops = sorted({min(k, rows - high) for k in range(0, rows, step)})
        lefts = sorted({min(k, columns - wide) for k in range(0, columns, step)})
        for image, target, values in zip(images, CLASSES.tolist(), found, strict=True):
            falls = [[[] for _ in range(columns)] for _ in range(rows)]
            whole = log_odds(model, model(image[None]), target)
            for top in tops:
                for left in lefts:
                    square = [
                        (y, x) for y in range(top, top + high) for x in range(left, left + wide)
                    ]
                    gone = {y * columns + x for y, x in square}
                    fall = whole - log_odds(model, slow(model, image, gone), target)
                    for y, x in square:
                        falls[y][x].append(fall)
            expected = [[np.mean(cell) for cell in row] for row in falls]
            np.testing.assert_allclose(values, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", DROPPED)
@pytest.mark.parametrize("window", [1, 2])
def test_occlusion_leaves_out_tokens(kind: str, window: int, random_vit: Make) -> None:
    model = random_vit(**DROPPED[kind])
    assert drops_tokens(model)
    check_occlusion(model, without_tokens, window)


@pytest.mark.parametrize("kind", PAINTED)
def test_occlusion_paints_where_tokens_cannot_be_left_out(kind: str, random_vit: Make) -> None:
    model = random_vit(**PAINTED[kind])
    assert not drops_tokens(model)
    check_occlusion(model, painted, 2)


def random_mixer() -> Mixer:
    spec = MixerSpec(
        depth=1,
        width=16,
        tokens_mlp_width=8,
        channels_mlp_width=8,
        patch_size=(4, 6),
        image_size=(12, 12),
        num_classes=5,
    )
    return perturbed(Mixer(spec))


def perturbed(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def test_occlusion_of_a_mixer() -> None:
    check_occlusion(random_mixer(), painted, 1)


def test_occlusion_of_a_resnet_has_cells_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal, "CELLS", 3)
    model = perturbed(ResNet(ResNetSpec(layers=(1, 1, 1, 1), image_size=(32, 2), num_classes=5)))
    assert patch_grid(model, torch.zeros(1, 3, *model.spec.image_size)) == (
        3,
        2,
    )  # 32 rows of pixels in 3, no more columns than pixels
    check_occlusion(model, painted, 1)


def test_the_temperature_scales_the_log_odds_of_two_classes(random_vit: Make) -> None:
    model = random_vit(num_classes=2)
    images, classes = torch.randn(1, 3, *model.spec.image_size), torch.tensor([1])
    cold = occlusion(model, images, classes)
    model.calibration = CalibrationSpec(
        temperature=4.0, measured_on="test", images=1, thresholds=(0.0,), kept=(1,), right=(1,)
    )
    np.testing.assert_allclose(occlusion(model, images, classes), cold / 4, rtol=1e-6, atol=1e-9)


@given(grid=st.tuples(st.integers(1, 9), st.integers(1, 9)), size=st.integers(1, 12))
def test_windows_cover_the_grid_and_are_alike(grid: tuple[int, int], size: int) -> None:
    found = windows(grid, size)
    assert found.any(0).all()
    assert set(found.sum((1, 2)).tolist()) == {min(size, grid[0]) * min(size, grid[1])}
    assert len(found.flatten(1).unique(dim=0)) == len(found)
    assert size > 1 or len(found) == grid[0] * grid[1]


@pytest.mark.parametrize(
    ("grid", "size"), [((14, 14), 1), ((16, 16), 1), ((24, 24), 4), ((37, 37), 6)]
)
def test_fine_grids_get_windows(grid: tuple[int, int], size: int) -> None:
    assert choose_window(grid) == size
    assert len(windows(grid, size)) <= 256


class Seen(Model[MixerSpec]):
    """Sure of class 0 while the upper left patch of 2 x 2 is there, else of class 1. Images have
    the mean 0."""

    def __init__(self) -> None:
        spec = MixerSpec(
            depth=1,
            width=1,
            tokens_mlp_width=1,
            channels_mlp_width=1,
            patch_size=(2, 2),
            image_size=(4, 4),
            in_channels=1,
            num_classes=2,
        )
        super().__init__(spec, None, ())
        self.weight = torch.nn.Parameter(torch.tensor(100.0))

    def forward(self, images: Tensor) -> Tensor:
        there = images[:, 0, :2, :2].abs().mean((1, 2)) > 0.5
        return self.weight * torch.stack([there, ~there], 1)

    def features(self, images: Tensor) -> Outputs:
        raise NotImplementedError


def balanced(count: int) -> Tensor:
    """Images `[count, 1, 4, 4]` of +1 and -1 that add up to 0 in every patch."""
    cell = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    return cell.repeat(count, 1, 2, 2)


def test_curves_of_a_model_made_by_hand() -> None:
    orders = torch.tensor([[[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 2, 3]]]).repeat(2, 1, 1)
    found = removal_curves(Seen(), balanced(2), torch.tensor([0, 1]), orders)
    np.testing.assert_allclose(found.shares, [0, 0.25, 0.5, 0.75, 1])
    gone = np.array([[1, 0, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    come = np.array([[0, 1, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 1, 1, 1]])
    np.testing.assert_allclose(found.deletion, [gone, 1 - gone], atol=1e-12)
    np.testing.assert_allclose(found.insertion, [come, 1 - come], atol=1e-12)
    areas = np.array([1, 7, 3]) / 8
    np.testing.assert_allclose(found.deletion_score, [areas, 1 - areas], atol=1e-12)
    np.testing.assert_allclose(found.insertion_score, [1 - areas, areas], atol=1e-12)


def test_occlusion_of_a_model_made_by_hand() -> None:
    found = occlusion(Seen(), balanced(1), torch.tensor([0]))
    np.testing.assert_allclose(found, [[[200, 0], [0, 0]]])


def test_fewer_steps_than_patches_start_and_end_the_same(random_vit: Make) -> None:
    model = random_vit()
    images, order = torch.randn(1, 3, *model.spec.image_size), torch.randperm(15)[None, None]
    fine = removal_curves(model, images, CLASSES[:1], order)
    coarse = removal_curves(model, images, CLASSES[:1], order, steps=3)
    np.testing.assert_allclose(coarse.shares, [0, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(coarse.deletion, fine.deletion[..., ::5], rtol=1e-5)
    np.testing.assert_allclose(coarse.insertion, fine.insertion[..., ::5], rtol=1e-5)


@pytest.mark.parametrize("kind", ["class token", "average", "attention pooling", "both"])
def test_curves_against_a_slow_loop(kind: str, random_vit: Make) -> None:
    model = random_vit(**DROPPED[kind])
    image, order = torch.randn(3, *model.spec.image_size), torch.randperm(15)
    found = removal_curves(model, image[None], CLASSES[:1], order[None, None], batch_size=2)
    places = order.tolist()
    with torch.no_grad():
        for k in range(16):
            for values, gone in (
                (found.deletion, set(places[:k])),
                (found.insertion, set(places[k:])),
            ):
                # no tokens have no average: then the image is one colour
                slow = painted if len(gone) == 15 and kind != "class token" else without_tokens
                p = model.probabilities(slow(model, image, gone))[0, 4]
                assert values[0, 0, k] == pytest.approx(p.item(), rel=1e-4, abs=1e-7)


def test_the_model_is_left_as_it_was(random_vit: Make) -> None:
    model = random_vit(dropout=0.5)
    model.train()
    model.blocks[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(2, 3, *model.spec.image_size)
    first, again = (occlusion(model, images, CLASSES[:2]) for _ in range(2))
    np.testing.assert_array_equal(first, again)  # dropout was off
    assert model.training
    assert not model.blocks[1].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.blocks[0]._forward_pre_hooks


def test_what_cannot_be_explained_is_said(random_vit: Make) -> None:
    model = random_vit()
    images = torch.randn(1, 3, *model.spec.image_size)
    with pytest.raises(PatchwordError, match="classes from 0 to 4"):
        occlusion(model, images, torch.tensor([5]))
    with pytest.raises(PatchwordError, match="1 classes"):
        occlusion(model, images, torch.tensor([0, 1]))
    with pytest.raises(PatchwordError, match="one class or none"):
        occlusion(random_vit(num_classes=1), images, torch.tensor([0]))
    with pytest.raises(PatchwordError, match="the model takes"):
        occlusion(model, images[..., :-1], torch.tensor([0]))
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    with pytest.raises(PatchwordError, match="NaN"):
        occlusion(model, images, torch.tensor([0]))
