"""Masked patch prediction: how patches are corrupted, what is predicted from what."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from patchword.models.vit import ViT
from patchword.objectives import create_objective, patches
from patchword.objectives.masked_patch import (
    Corruption,
    MaskedPatch,
    Predictor,
    draw_corruption,
    outputs,
)
from patchword.spec.train import TrainSpec

MakeModel = Callable[..., ViT]
MakeSpec = Callable[..., TrainSpec]
POSITIONS = [
    *({"position": kind} for kind in ("none", "learned-1d", "learned-2d", "sincos2d")),
    *({"position": kind} for kind in ("relative", "rotary")),
    {"position": "learned-1d", "position_at": "every"},
    {"position": "sincos2d", "position_at": "every-shared"},
]


def objective_of(model: ViT, spec: TrainSpec) -> tuple[MaskedPatch, nn.Module]:
    """The objective, its parts perturbed, and the network."""
    objective = create_objective(spec, model)
    assert isinstance(objective, MaskedPatch)
    assert objective.parts is not None
    with torch.no_grad():
        for p in objective.parts.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return objective, objective.network(model)


def test_statistics_of_the_corruption():
    """Within four standard deviations of what section B.1.2 says, over a million patches."""
    images, count = 16_000, 64
    source, corrupted = draw_corruption(images, count, 0.5)
    assert corrupted.shape == (images, 32)
    total = images * 32
    stands = source.gather(1, corrupted)
    masked, kept = stands == count, stands == corrupted
    swapped = ~masked & ~kept
    for found, share in ((masked, 0.8), (swapped, 0.1), (kept, 0.1)):
        spread = (share * (1 - share) / total) ** 0.5
        assert abs(float(found.double().mean()) - share) < 4 * spread
    # what is not corrupted stays where it is
    own = source == torch.arange(count)
    assert int((~own).sum()) == int((masked | swapped).sum())
    # every place is corrupted equally often, every other patch comes in equally often
    often = torch.bincount(corrupted.flatten(), minlength=count) / images
    assert (often - 0.5).abs().max() < 5 * (0.25 / images) ** 0.5
    away = (stands - corrupted)[swapped] % count
    counts = torch.bincount(away, minlength=count).double()
    assert counts[0] == 0
    expected = float(swapped.sum()) / (count - 1)
    assert (counts[1:] - expected).abs().max() < 5 * expected**0.5


@given(count=st.integers(2, 50), rate=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_the_number_of_corrupted_patches(count: int, rate: float, seed: int):
    torch.manual_seed(seed)
    source, corrupted = draw_corruption(3, count, rate)
    assert corrupted.shape == (3, min(max(1, round(rate * count)), count))
    assert (corrupted.diff(dim=1) > 0).all()
    assert int(source.min()) >= 0
    assert int(source.max()) <= count


@pytest.mark.parametrize("options", POSITIONS, ids=str)
@pytest.mark.parametrize("extra", [{}, {"pool": "gap", "registers": 2}], ids=["token", "gap"])
def test_a_masked_patch_is_never_seen(
    make_model: MakeModel, make_spec: MakeSpec, options: dict, extra: dict
):
    """The gradient of all predictions by the pixels of a patch is exactly zero where the patch was
    replaced and stands nowhere else, and not zero where its embedding stands somewhere."""
    model = make_model(**options, **extra).double()
    objective, network = objective_of(model, make_spec(objective="masked-patch"))
    network.double()
    images = torch.randn(6, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    draws = objective.draw(images)
    predictions = network(images, *draws)
    (gradient,) = torch.autograd.grad((predictions * torch.randn_like(predictions)).sum(), images)
    felt = patches.cut(gradient, (4, 4)).flatten(2).abs().amax(2) > 0  # [b, N]
    stands = torch.stack([(draws.source == patch).any(1) for patch in range(16)], dim=1)
    assert torch.equal(felt, stands)
    assert not stands.all()
    assert stands.any()


def test_another_patch_is_seen_where_it_stands_in(make_model: MakeModel, make_spec: MakeSpec):
    """Patch 3, masked itself, stands at place 5 too: predictions depend on it."""
    model = make_model()
    _, network = objective_of(model, make_spec(objective="masked-patch"))
    source = torch.arange(16).repeat(1, 1)
    source[0, 3], source[0, 5] = 16, 3
    images = torch.randn(1, 3, 16, 16, requires_grad=True)
    predictions = network(images, source, torch.tensor([[3, 5]]))
    (gradient,) = torch.autograd.grad(predictions.square().sum(), images)
    felt = patches.cut(gradient, (4, 4)).flatten(2).abs().amax(2)[0] > 0
    assert felt[3]
    assert not felt[5]
    assert felt.sum() == 15


def test_the_corruption_comes_before_the_positions(make_model: MakeModel, make_spec: MakeSpec):
    """By hand: the embeddings exchanged, positions and class token added, encoded."""
    model = make_model(pool="token", registers=1)
    objective, network = objective_of(model, make_spec(objective="masked-patch"))
    images = torch.randn(2, 3, 16, 16)
    source, corrupted = objective.draw(images)
    parts = objective.parts
    assert isinstance(parts, Predictor)
    assert model.class_token is not None
    assert model.registers is not None
    embedded = model.patch_embedding(images)
    rows = [torch.cat([embedded[b], parts.mask_token[0]])[source[b]] for b in range(2)]
    table = model.positions[0]()
    leading, place = table[:, :1], table[:, 1:]
    tokens = torch.cat(
        [
            (model.class_token + leading).expand(2, -1, -1),
            model.registers.expand(2, -1, -1),
            torch.stack(rows) + place,
        ],
        dim=1,
    )
    encoded = model.encode(tokens, model.spec.grid)[:, 2:]
    wanted = torch.stack([parts.head(encoded[b, corrupted[b]]) for b in range(2)])
    torch.testing.assert_close(network(images, source, corrupted), wanted)


@pytest.mark.parametrize("predict", ["mean", "4x4", "pixels"])
def test_the_loss_is_over_corrupted_patches_alone(
    make_model: MakeModel, make_spec: MakeSpec, predict: str
):
    """Against a loop over the corrupted patches; 1e-5 relative."""
    model = make_model()
    objective, network = objective_of(
        model, make_spec(objective="masked-patch", predict=predict, mask_rate=0.3)
    )
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    torch.manual_seed(1)
    found = objective.loss(network, images, torch.zeros(3))
    torch.manual_seed(1)
    draws = objective.draw(images)
    assert draws.corrupted.shape == (3, 5)
    predictions = network(images, *draws)
    assert predictions.shape == (3, 5, outputs(model.spec, objective.spec))
    losses = []
    for b in range(3):
        for k, place in enumerate(draws.corrupted[b].tolist()):
            top, left = place // 4 * 4, place % 4 * 4
            patch = images[b, :, top : top + 4, left : left + 4]
            if predict == "pixels":
                wanted = patch.permute(1, 2, 0).flatten()
                losses.append((predictions[b, k] - wanted).square().mean())
                continue
            colours = (patch + 1) / 2
            colours = colours.mean((1, 2))[:, None] if predict == "mean" else colours.flatten(1)
            levels = (colours * 8).floor().clamp(0, 7).long()
            classes = levels[0] * 64 + levels[1] * 8 + levels[2]
            logs = predictions[b, k].view(len(classes), 512).log_softmax(1)
            losses.append(-logs[torch.arange(len(classes)), classes].mean())
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("predict", ["mean", "4x4"])
def test_before_training_every_colour_is_as_probable(
    make_model: MakeModel, make_spec: MakeSpec, predict: str
):
    objective = create_objective(
        make_spec(objective="masked-patch", predict=predict), model := make_model()
    )
    loss = objective.loss(objective.network(model), torch.randn(2, 3, 16, 16), torch.zeros(2))
    assert loss.item() == pytest.approx(6.2383246, abs=1e-5)  # log 512


@pytest.mark.parametrize("predict", ["mean", "4x4", "pixels"])
def test_pictures_show_what_was_seen_and_predicted(
    make_model: MakeModel, make_spec: MakeSpec, predict: str
):
    """Uncorrupted patches are as they were, [mask] is grey, swapped ones are other patches."""
    objective, network = objective_of(
        make_model(), make_spec(objective="masked-patch", predict=predict)
    )
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    torch.manual_seed(2)
    shown = objective.pictures(network, images)
    torch.manual_seed(2)
    source, corrupted = objective.draw(images)

    def tiles(pictures: Tensor) -> Tensor:
        return patches.cut(pictures, (4, 4)).flatten(2)

    original, seen, predicted = map(tiles, shown)
    torch.testing.assert_close(original, tiles((images + 1) / 2))
    grey = torch.cat([original, torch.full_like(original[:, :1], 0.5)], dim=1)
    assert torch.equal(seen, torch.stack([grey[b, source[b]] for b in range(4)]))
    untouched = torch.ones(4, 16, dtype=torch.bool).scatter(1, corrupted, False)
    torch.testing.assert_close(predicted[untouched], original[untouched])
    assert predicted.min() >= 0
    assert predicted.max() <= 1
    if predict == "mean":
        colours = predicted[~untouched].view(-1, 16, 3)
        assert torch.equal(colours, colours[:, :1].expand_as(colours))
        torch.testing.assert_close(colours * 8 % 1, torch.full_like(colours, 0.5))


def test_grey_images_have_eight_colours(make_model: MakeModel, make_spec: MakeSpec):
    model = make_model(in_channels=1)
    objective, network = objective_of(model, make_spec(objective="masked-patch"))
    images = torch.rand(2, 1, 16, 16)
    draws = objective.draw(images)
    assert isinstance(draws, Corruption)
    assert network(images, *draws).shape == (2, 8, 8)
    assert objective.loss(network, images, torch.zeros(2)).isfinite()
