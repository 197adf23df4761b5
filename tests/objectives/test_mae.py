"""The masked autoencoder: what its encoder sees, what is predicted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from patchword.models.vit import ViT
from patchword.models.zoo import model_spec
from patchword.objectives import create_objective, patches, training_macs
from patchword.objectives.mae import Decoder, MaskedAutoencoder, draw_hidden
from patchword.spec.model import ViTSpec
from patchword.spec.parse import UsageError
from patchword.spec.train import PretrainSpec, TrainSpec

MakeModel = Callable[..., ViT]
MakeSpec = Callable[..., TrainSpec]
KINDS: list[dict[str, Any]] = [
    {"pool": "token", "registers": 2},
    {"pool": "gap", "position": "sincos2d"},
    {"pool": "gap", "pool_norm": True, "position": "learned-2d"},
    {"pool": "token", "distillation": "token", "position": "none"},
    {"pool": "map", "position": "learned-2d", "activation": "swiglu"},
]


def objective_of(model: ViT, spec: TrainSpec) -> tuple[MaskedAutoencoder, nn.Module]:
    """The objective, its parts perturbed, and the network."""
    objective = create_objective(spec, model)
    assert isinstance(objective, MaskedAutoencoder)
    assert objective.parts is not None
    with torch.no_grad():
        for p in objective.parts.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return objective, objective.network(model)


@given(count=st.integers(2, 50), rate=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_every_patch_is_either_visible_or_masked(count: int, rate: float, seed: int):
    torch.manual_seed(seed)
    visible, masked = draw_hidden(4, count, rate)
    assert masked.shape == (4, min(max(1, round(rate * count)), count - 1))
    both = torch.cat([visible, masked], dim=1).sort(1).values
    assert torch.equal(both, torch.arange(count).expand(4, -1))


def test_every_patch_is_masked_equally_often():
    """Within five standard deviations over 20,000 images."""
    _, masked = draw_hidden(20_000, 64, 0.75)
    often = torch.bincount(masked.flatten(), minlength=64) / 20_000
    assert (often - 0.75).abs().max() < 5 * (0.75 * 0.25 / 20_000) ** 0.5


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_the_encoder_sees_visible_patches_alone(
    make_model: MakeModel, make_spec: MakeSpec, options: dict[str, Any]
):
    """Gradients by the pixels of masked patches are exactly zero, of visible ones not; and the
    blocks get no more tokens than that."""
    model = make_model(**options)
    objective, network = objective_of(model, make_spec(objective="mae"))
    lengths: list[int] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    images = torch.randn(5, 3, 16, 16, requires_grad=True)
    draws = objective.draw(images)
    predictions = network(images, *draws)
    assert lengths == [model.spec.prefix + 4] * 2
    (gradient,) = torch.autograd.grad((predictions * torch.randn_like(predictions)).sum(), images)
    felt = patches.cut(gradient, (4, 4)).flatten(2).abs().amax(2) > 0
    seen = torch.zeros(5, 16, dtype=torch.bool).scatter(1, draws.visible, True)
    assert torch.equal(felt, seen)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_the_network_by_hand(make_model: MakeModel, make_spec: MakeSpec, options: dict[str, Any]):
    """One image at a time, the tokens of the decoder in the order of the image; 1e-4."""
    model = make_model(**options)
    objective, network = objective_of(model, make_spec(objective="mae"))
    images = torch.randn(3, 3, 16, 16)
    visible, masked = objective.draw(images)
    decoder = objective.parts
    assert isinstance(decoder, Decoder)
    prefix = model.spec.prefix
    found = network(images, visible, masked)
    for b in range(3):
        tokens = model.embed(images[b : b + 1])[0]
        seen = [tokens[:prefix], *(tokens[prefix + i][None] for i in visible[b].tolist())]
        encoded = decoder.embedding(model.encode(torch.cat(seen)[None], (4, 4)))[0]
        line = [decoder.mask_token[0, 0]] * 16
        for k, place in enumerate(visible[b].tolist()):
            line[place] = encoded[prefix + k]
        full = torch.stack(line) + decoder.position()[0]
        y = torch.cat([encoded[:prefix], full])[None]
        for block in decoder.blocks:
            y = block(y)
        wanted = decoder.head(decoder.norm(y))[0, prefix:][masked[b]]
        torch.testing.assert_close(found[b], wanted, rtol=1e-4, atol=1e-4)


def test_the_loss_is_over_masked_patches_alone(make_model: MakeModel, make_spec: MakeSpec):
    """Against a loop that normalises each masked patch; 1e-5 relative."""
    objective, network = objective_of(make_model(), make_spec(objective="mae", mask_rate=0.6))
    images = torch.randn(3, 3, 16, 16)
    torch.manual_seed(1)
    found = objective.loss(network, images, torch.zeros(3))
    torch.manual_seed(1)
    draws = objective.draw(images)
    predictions = network(images, *draws)
    losses = []
    for b in range(3):
        for k, place in enumerate(draws.masked[b].tolist()):
            top, left = place // 4 * 4, place % 4 * 4
            patch = images[b, :, top : top + 4, left : left + 4].permute(1, 2, 0).flatten()
            wanted = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            losses.append((predictions[b, k] - wanted).square().mean())
    assert len(losses) == 30
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=1e-5, atol=0)


def test_a_plain_patch_is_no_division_by_zero(make_model: MakeModel, make_spec: MakeSpec):
    objective, network = objective_of(make_model(), make_spec(objective="mae"))
    loss = objective.loss(network, torch.full((2, 3, 16, 16), 0.3), torch.zeros(2))
    assert loss.isfinite()


def test_pictures_of_a_perfect_prediction_are_the_images(
    make_model: MakeModel, make_spec: MakeSpec
):
    """Predictions that equal the targets give the images back; what was not seen is grey."""
    objective, _ = objective_of(make_model(), make_spec(objective="mae"))
    images = torch.rand(3, 3, 16, 16) * 2 - 1

    def perfect(images: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        return patches.taken(objective.targets(images), masked)

    torch.manual_seed(3)
    original, seen, predicted = objective.pictures(perfect, images)
    torch.manual_seed(3)
    masked = objective.draw(images).masked
    torch.testing.assert_close(original, (images + 1) / 2)
    torch.testing.assert_close(predicted, original, rtol=0, atol=1e-5)
    grey = (patches.cut(seen, (4, 4)).flatten(2) == 0.5).all(2)
    assert torch.equal(grey, torch.zeros(3, 16, dtype=torch.bool).scatter(1, masked, True))


def test_the_decoder_starts_as_that_of_the_authors():
    """Standard deviations and bounds of a decoder of width 256: q, k and v as one matrix of 768
    rows, not each on its own; within 1 %, the [mask] token's 256 numbers within 15 %."""
    torch.manual_seed(0)
    vit = model_spec("ViT-Ti/16", image_size=32)
    assert isinstance(vit, ViTSpec)
    decoder = Decoder(vit, PretrainSpec(decoder_width=256, decoder_depth=2, decoder_heads=4))
    layers = {n: m for n, m in decoder.named_modules() if isinstance(m, nn.Linear)}
    assert len(layers) == 2 + 2 * 4
    for name, layer in layers.items():
        weight = layer.weight.detach()
        rows, columns = weight.shape
        wanted = (2 / (rows + columns)) ** 0.5
        assert float(weight.std()) == pytest.approx(wanted, rel=0.01), name
        assert 0.98 < float(weight.abs().max()) / (wanted * 3**0.5) <= 1, name
        for part in weight.chunk(3) if name.endswith("qkv") else ():
            assert float(part.std()) == pytest.approx((1 / (2 * 256)) ** 0.5, rel=0.01), name
        assert not layer.bias.any()
    assert float(decoder.mask_token.detach().std()) == pytest.approx(0.02, rel=0.15)


def test_the_decoder_draws_each_matrix_once(monkeypatch: pytest.MonkeyPatch):
    drawn: list[Tensor] = []
    real = nn.init.xavier_uniform_

    def note(tensor: Tensor) -> Tensor:
        drawn.append(tensor)
        return real(tensor)

    monkeypatch.setattr(nn.init, "xavier_uniform_", note)
    vit = model_spec("ViT-Ti/16", image_size=32)
    assert isinstance(vit, ViTSpec)
    Decoder(vit, PretrainSpec(decoder_width=32, decoder_depth=2, decoder_heads=4))
    places = [tensor.data_ptr() for tensor in drawn]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("rate", [0.25, 0.75])
def test_the_cost_counts_what_is_multiplied(
    make_model: MakeModel, make_spec: MakeSpec, rate: float
):
    """All matrix products of a forward pass of two images."""
    model, spec = make_model(registers=1), make_spec(objective="mae", mask_rate=rate)
    objective, network = objective_of(model, spec)
    images = torch.randn(2, 3, 16, 16)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(images, *objective.draw(images))
    assert counter.get_total_flops() == 2 * 2 * training_macs(spec, model.spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position": "relative"}, "positions that are added at the stem"),
        ({"position": "rotary"}, "positions that are added at the stem"),
        ({"position_at": "every"}, "positions that are added at the stem"),
    ],
)
def test_what_it_cannot_train_is_refused(
    make_model: MakeModel, make_spec: MakeSpec, options: dict[str, Any], message: str
):
    with pytest.raises(UsageError, match=message):
        create_objective(make_spec(objective="mae"), make_model(**options))
