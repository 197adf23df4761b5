"""Distance, entropy, maps and rollout: hand-made attention with exact answers, slow loops, laws."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patchword.inspection import attention, recorder
from patchword.inspection.attention import (
    attention_distance,
    attention_entropy,
    attention_maps,
    distance_of,
    entropy_of,
    measure_attention,
    rollout,
    rollout_of,
    uniform_distance,
)
from patchword.inspection.recorder import attention_layers
from patchword.models.attention import SelfAttention
from patchword.models.vit import ViT
from patchword.spec.model import StemSpec, ViTSpec
from patchword.spec.parse import PatchwordError, UsageError

Make = Callable[..., ViT]
GRID, PATCH = (3, 5), (4, 2)
DIAGONAL = math.hypot(2 * 4, 4 * 2)


def slow_distances(grid: tuple[int, int], patch: tuple[int, int]) -> np.ndarray:
    """Pixels between patch centres, one pair after the other."""
    centres = [
        ((row + 0.5) * patch[0], (col + 0.5) * patch[1])
        for row, col in product(range(grid[0]), range(grid[1]))
    ]
    return np.array([[math.dist(a, b) for b in centres] for a in centres])


def random_weights(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(2).softmax(-1)


def shift(grid: tuple[int, int], down: int, across: int) -> torch.Tensor:
    """Each patch looks so far down and to the right, the last ones at the edge."""
    rows, cols = grid
    weights = torch.zeros(rows * cols, rows * cols, dtype=torch.float64)
    for row, col in product(range(rows), range(cols)):
        to = min(row + down, rows - 1) * cols + min(col + across, cols - 1)
        weights[row * cols + col, to] = 1
    return weights


# Distance ----------------------------------------------------------------------------------------


def test_distance_of_attention_to_oneself_is_zero() -> None:
    assert float(distance_of(torch.eye(15), 0, GRID, PATCH)) == 0


def test_distance_of_uniform_attention_is_the_mean_distance() -> None:
    uniform = torch.full((15, 15), 1 / 15, dtype=torch.float64)
    expected = slow_distances(GRID, PATCH).mean()
    assert float(distance_of(uniform, 0, GRID, PATCH)) == pytest.approx(expected, rel=1e-14)
    spec = ViTSpec(depth=1, width=8, mlp_width=8, heads=1, patch_size=PATCH, image_size=(12, 10))
    assert uniform_distance(spec) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("down", "across", "expected"),
    [
        (0, 1, 2 * 4 / 5),  # 2 pixels, but for the last of five columns
        (1, 0, 4 * 2 / 3),  # 4 pixels, but for the last of three rows
        (0, 2, (3 * 4 + 2) / 5),
        (1, 1, (8 * math.hypot(4, 2) + 2 * 4 + 4 * 2) / 15),
    ],
)
def test_distance_of_a_shift_is_its_length(down: int, across: int, expected: float) -> None:
    weights = shift(GRID, down, across)
    assert float(distance_of(weights, 0, GRID, PATCH)) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("prefix", [1, 4])
def test_tokens_before_the_patches_are_left_out_and_the_rest_renormalised(prefix: int) -> None:
    patches = random_weights(2, 3, 15, 15)
    taken = torch.rand(2, 3, 15, 1, dtype=torch.float64) * 0.98  # what registers take of each row
    whole = torch.zeros(2, 3, 15 + prefix, 15 + prefix, dtype=torch.float64)
    whole[..., prefix:, prefix:] = patches * (1 - taken)
    whole[..., prefix:, :prefix] = taken / prefix
    whole[..., :prefix, :] = random_weights(2, 3, prefix, 15 + prefix)  # no query that counts
    torch.testing.assert_close(whole.sum(-1), torch.ones_like(whole[..., 0]))
    expected = (patches.numpy() * slow_distances(GRID, PATCH)).sum(-1).mean(-1)
    distance = distance_of(whole, prefix, GRID, PATCH)
    np.testing.assert_allclose(distance.numpy(), expected, rtol=1e-12)


def test_a_query_that_looks_at_no_patch_does_not_count() -> None:
    weights = torch.zeros(16, 16)
    weights[:, 0] = 1
    assert distance_of(weights, 1, GRID, PATCH).isnan()
    weights[1] = 0
    weights[1, 15] = 1  # the first patch looks at the last
    assert float(distance_of(weights, 1, GRID, PATCH)) == pytest.approx(DIAGONAL)


@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    patch=st.tuples(st.integers(1, 32), st.integers(1, 32)),
    seed=st.integers(0, 1000),
)
def test_laws_of_distance(grid: tuple[int, int], patch: tuple[int, int], seed: int) -> None:
    number = grid[0] * grid[1]
    weights = random_weights(3, number, number, seed=seed)
    distance = distance_of(weights, 0, grid, patch)
    assert (distance >= 0).all()
    assert (distance <= slow_distances(grid, patch).max() * (1 + 1e-12)).all()
    double = distance_of(weights, 0, grid, (2 * patch[0], 2 * patch[1]))
    torch.testing.assert_close(double, 2 * distance)
    turned = weights.unflatten(1, grid).transpose(1, 2).flatten(1, 2)
    turned = turned.unflatten(2, grid).transpose(2, 3).flatten(2, 3)
    torch.testing.assert_close(
        distance_of(turned, 0, (grid[1], grid[0]), (patch[1], patch[0])), distance
    )


# Entropy -----------------------------------------------------------------------------------------


def test_entropy_of_hand_made_attention() -> None:
    assert float(entropy_of(torch.eye(9))) == 0
    uniform = torch.full((9, 9), 1 / 9, dtype=torch.float64)
    assert float(entropy_of(uniform)) == pytest.approx(math.log(9), rel=1e-14)
    half = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    assert float(entropy_of(half)) == pytest.approx(math.log(2) / 2, rel=1e-14)


# Rollout -----------------------------------------------------------------------------------------


def test_rollout_of_attention_to_oneself_is_the_identity() -> None:
    identity = torch.eye(7).expand(2, 3, 7, 7)
    assert torch.equal(rollout_of([identity] * 4), torch.eye(7).expand(2, 7, 7))


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_rollout_of_uniform_attention(layers: int) -> None:
    uniform = torch.full((2, 3, 16, 16), 1 / 16, dtype=torch.float64)
    product = rollout_of([uniform] * layers)
    # each layer keeps half and spreads half: U U = U
    kept = 0.5**layers
    expected = kept * torch.eye(16, dtype=torch.float64) + (1 - kept) / 16
    torch.testing.assert_close(product, expected.expand(2, 16, 16), rtol=1e-14, atol=0)
    to_patches = product[:, 0, 1:]
    assert torch.equal(to_patches, to_patches[:, :1].expand(2, 15))  # uniform, exactly


def test_rollout_of_a_shift_is_binomial() -> None:
    ring = torch.eye(8, dtype=torch.float64).roll(1, dims=1)  # token i looks at token i + 1
    product = rollout_of([ring.expand(1, 2, 8, 8)] * 5)
    binomial = [math.comb(5, k) / 2**5 for k in range(6)]
    torch.testing.assert_close(product[0, 0], torch.tensor([*binomial, 0, 0], dtype=torch.float64))
    torch.testing.assert_close(product[0, 3].roll(-3), product[0, 0])


def test_rollout_is_the_product_with_the_last_layer_on_the_left() -> None:
    layers = [random_weights(2, 3, 6, 6, seed=seed) for seed in range(3)]
    for image in range(2):
        expected = np.eye(6)
        for weights in layers:
            mean = weights[image].numpy().mean(0) + np.eye(6)
            expected = (mean / mean.sum(1, keepdims=True)) @ expected
        found = rollout_of(iter(layers))[image].numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)


@given(order=st.permutations(range(4)), seed=st.integers(0, 1000))
def test_permuting_heads_changes_nothing_in_rollout(order: list[int], seed: int) -> None:
    layers = [random_weights(1, 4, 5, 5, seed=seed + layer) for layer in range(3)]
    permuted = [layers[0][:, order], layers[1], layers[2][:, order]]
    torch.testing.assert_close(rollout_of(permuted), rollout_of(layers), rtol=1e-12, atol=0)


def test_rollout_leaves_the_attention_it_is_given() -> None:
    weights = random_weights(1, 1, 5, 5)
    before = weights.clone()
    rollout_of([weights, weights])
    assert torch.equal(weights, before)
    with pytest.raises(PatchwordError, match="rollout of no layers"):
        rollout_of([])


# Of a model --------------------------------------------------------------------------------------


def images_for(model: ViT, count: int = 3) -> torch.Tensor:
    return torch.randn(count, model.spec.in_channels, *model.spec.image_size)


def indifferent(model: ViT) -> ViT:
    """The model with queries of zero: every token attends to all alike."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SelfAttention):
                module.qkv.weight[: model.spec.width] = 0
                module.qkv.bias[: model.spec.width] = 0
    return model


@pytest.mark.parametrize("options", [{}, {"registers": 2, "distillation": "head"}, {"pool": "gap"}])
def test_a_model_of_uniform_attention(options: dict[str, object], random_vit: Make) -> None:
    model = indifferent(random_vit(depth=3, **options))
    images, tokens = images_for(model), 15 + model.spec.prefix
    distance = slow_distances(GRID, PATCH).mean()
    np.testing.assert_allclose(attention_distance(model, images), np.full((3, 2), distance), 1e-6)
    entropy = np.full((3, 2), math.log(tokens))
    np.testing.assert_allclose(attention_entropy(model, images), entropy, 1e-6)
    maps = attention_maps(model, images)
    np.testing.assert_allclose(maps, np.full((3, 3, 2, 3, 5), 1 / tokens), 1e-6)
    masks = rollout(model, images)
    share = (1 - 0.5**3) / tokens
    if options.get("pool") == "gap":  # what the patches keep of themselves
        share += 0.5**3 / 15
    np.testing.assert_allclose(masks, np.full((3, 3, 5), share), 1e-6)


def test_measures_are_those_of_the_recorded_attention(random_vit: Make) -> None:
    model = random_vit(registers=2, position="rotary")
    images = images_for(model, 4)
    layers = [weights.double() for weights in attention_layers(model, images)]
    assert attention_distance(model, images).dtype == np.float64
    for layer, weights in enumerate(layers):
        patches = weights[..., 3:, 3:].numpy()
        patches = patches / patches.sum(-1, keepdims=True)
        distance = (patches * slow_distances(GRID, PATCH)).sum(-1).mean((0, 2))
        np.testing.assert_allclose(attention_distance(model, images)[layer], distance, 1e-5)
        entropy = -(weights * weights.log()).sum(-1).mean((0, 2)).numpy()
        np.testing.assert_allclose(attention_entropy(model, images)[layer], entropy, 1e-5)


def test_images_on_which_a_head_looks_at_no_patch_do_not_count(
    random_vit: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a head that does so on all of them have a distance."""
    weights = torch.full((2, 2, 16, 16), 1 / 16)
    weights[0, 0] = weights[:, 1] = torch.eye(16)[0]  # all to the class token
    monkeypatch.setattr(attention, "attention_layers", lambda model, images: [weights])
    model = random_vit()
    found = attention_distance(model, images_for(model, 2))
    np.testing.assert_allclose(found, [[slow_distances(GRID, PATCH).mean(), math.nan]], 1e-6)


def test_a_hybrids_patches_are_as_wide_as_in_the_image(random_vit: Make) -> None:
    stem = StemSpec(layers=(1,), width=32)
    model = indifferent(random_vit(stem=stem, patch_size=(8, 4), image_size=(24, 20)))
    distance = slow_distances((3, 5), (8, 4)).mean()
    found = attention_distance(model, images_for(model))
    np.testing.assert_allclose(found, np.full((2, 2), distance), 1e-6)


def test_many_batches_are_one(monkeypatch: pytest.MonkeyPatch, random_vit: Make) -> None:
    model = random_vit()
    images = images_for(model, 7)
    distance, entropy = attention_distance(model, images), attention_entropy(model, images)
    maps, masks = attention_maps(model, images), rollout(model, images)
    measured = measure_attention(model, (part for part in images.split([4, 1, 2])))
    assert measured.images == 7
    np.testing.assert_allclose(measured.distance, distance, 1e-5)
    np.testing.assert_allclose(measured.entropy, entropy, 1e-5)
    monkeypatch.setattr(recorder, "BUDGET", 1)  # one image at a time
    np.testing.assert_allclose(attention_distance(model, images), distance, 1e-5)
    np.testing.assert_allclose(attention_maps(model, images), maps, 1e-4)
    np.testing.assert_allclose(rollout(model, images), masks, 1e-4)
    with pytest.raises(PatchwordError, match="no images"):
        measure_attention(model, [])


@pytest.mark.parametrize("options", [{"registers": 2}, {"pool": "map", "registers": 2}])
def test_maps_are_rows_of_the_attention(options: dict[str, object], random_vit: Make) -> None:
    model = random_vit(**options)
    prefix = model.spec.prefix
    images = images_for(model)
    for layer, weights in enumerate(attention_layers(model, images)):
        asked = attention_maps(model, images, query=(1, 3))[:, layer]
        row = weights[:, :, prefix + 1 * 5 + 3, prefix:].reshape(3, 2, 3, 5)
        np.testing.assert_allclose(asked, row.numpy(), 1e-5)
        default = attention_maps(model, images)[:, layer].reshape(3, 2, 15)
        token = options.get("pool") is None
        rows = weights[:, :, 0] if token else weights[:, :, prefix:].mean(2)
        np.testing.assert_allclose(default, rows[..., prefix:].numpy(), 1e-5)


@pytest.mark.parametrize("pool", ["token", "gap"])
def test_masks_are_rows_of_the_rollout(pool: str, random_vit: Make) -> None:
    model = random_vit(pool=pool, registers=1, depth=4)
    images, prefix = images_for(model), model.spec.prefix
    whole = rollout_of(attention_layers(model, images))
    row = whole[:, 0] if pool == "token" else whole[:, prefix:].mean(1)
    masks = rollout(model, images)
    np.testing.assert_allclose(masks, row[:, prefix:].reshape(3, 3, 5).numpy(), 1e-5)
    assert (masks.sum((1, 2)) < 1).all()


@pytest.mark.parametrize("query", [(3, 0), (0, 5), (-1, 0)])
def test_a_query_off_the_grid(query: tuple[int, int], random_vit: Make) -> None:
    model = random_vit()
    with pytest.raises(UsageError, match=r"is not on the grid of 3 x 5 patches; use 0,0 to 2,4"):
        attention_maps(model, images_for(model), query)
