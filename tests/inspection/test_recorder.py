"""The recorder: its attention is the model's own, and the model does not notice."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from patchword.inspection import recorder
from patchword.inspection.attention import (
    attention_distance,
    attention_entropy,
    attention_maps,
    rollout,
)
from patchword.inspection.recorder import (
    attention_inputs,
    attention_layers,
    batched,
    require_vit,
)
from patchword.models.attention import SelfAttention
from patchword.models.mixer import Mixer
from patchword.models.resnet import ResNet
from patchword.models.vit import ViT
from patchword.spec.model import MixerSpec, ResNetSpec, StemSpec
from patchword.spec.parse import PatchwordError

Make = Callable[..., ViT]
STEM = StemSpec(layers=(1,), width=32)
KINDS: dict[str, dict[str, Any]] = {
    "learned-1d": {},
    "no class token": {"pool": "gap", "position": "learned-2d"},
    "attention pooling": {"pool": "map", "position": "none"},
    "token and average": {"pool": "token+gap", "registers": 1},
    "sin-cos, registers": {"position": "sincos2d", "registers": 3, "layer_scale": 0.5},
    "a table in every layer": {"position_at": "every", "distillation": "token"},
    "relative": {"position": "relative"},
    "relative everywhere": {"position": "relative", "position_at": "every", "registers": 2},
    "relative, shared": {"position": "relative", "position_at": "every-shared", "pool": "gap"},
    "rotary": {"position": "rotary", "registers": 2, "qk_norm": True},
    "qk norm": {"qk_norm": True, "activation": "swiglu"},
    "distillation": {"distillation": "head", "registers": 2},
    "hybrid": {"stem": STEM, "patch_size": (8, 4), "image_size": (24, 20)},
}


def images_for(model: ViT, count: int = 3) -> torch.Tensor:
    return torch.randn(count, model.spec.in_channels, *model.spec.image_size)


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_attention_times_values_is_the_fused_output(kind: str, random_vit: Make) -> None:
    # 32 values a head, more than there are tokens: no other weights give the same output
    model = random_vit(**KINDS[kind])
    tokens = model.spec.prefix + 15
    layers = 0
    for attention, x, rule in attention_inputs(model, images_for(model)):
        with torch.no_grad():
            weights = attention.weights(x, rule)
            fused = attention(x, rule)
            plain = attention.applied(weights, x)
            torch.testing.assert_close(plain, fused, atol=2e-5, rtol=1e-4)
        assert weights.shape == (3, 2, tokens, tokens)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, tokens))
        assert weights.std() > 1e-3
        layers += 1
    assert layers == 2


@pytest.mark.parametrize("kind", KINDS)
def test_what_goes_into_each_layer_is_what_the_model_puts_there(
    kind: str, random_vit: Make
) -> None:
    model = random_vit(depth=3, **KINDS[kind])
    images = images_for(model)
    seen: list[torch.Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        for module in model.modules()
        if isinstance(module, SelfAttention)
    ]
    with torch.no_grad():
        model.features(images)
    for hook in hooks:
        hook.remove()
    recorded = [x for _, x, _ in attention_inputs(model, images)]
    assert len(recorded) == len(seen) == 3
    for ours, theirs in zip(recorded, seen, strict=True):
        assert torch.equal(ours, theirs)


def test_layers_are_the_weights_of_the_inputs(random_vit: Make) -> None:
    model = random_vit(position="relative", registers=1)
    images = images_for(model)
    inputs = list(attention_inputs(model, images))
    layers = attention_layers(model, images)
    for weights, (attention, x, rule) in zip(layers, inputs, strict=True):
        assert torch.equal(weights, attention.weights(x, rule))
        assert not weights.requires_grad


@pytest.mark.parametrize("read", [attention_distance, attention_entropy, attention_maps, rollout])
def test_one_layer_is_in_memory_at_a_time(
    read: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, random_vit: Make
) -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def watched(*arguments: Any) -> torch.Tensor:
        assert not any(earlier() is not None for earlier in made)
        weights = plain(*arguments)
        made.append(weakref.ref(weights))
        return weights

    plain = SelfAttention.weights
    monkeypatch.setattr(SelfAttention, "weights", watched)
    model = random_vit(depth=4)
    read(model, images_for(model))
    assert len(made) == 4


def test_the_model_is_as_it_was(random_vit: Make) -> None:
    model = random_vit(dropout=0.5, drop_path=0.5, patch_dropout=0.5)
    images = images_for(model)
    evaluated = list(attention_layers(model, images))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    model.blocks[1].eval()  # frozen blocks may be in evaluation mode
    modes = [module.training for module in model.modules()]
    for ours, theirs in zip(attention_layers(model, images), evaluated, strict=True):
        assert torch.equal(ours, theirs)  # nothing was dropped
    assert [module.training for module in model.modules()] == modes
    next(layers := attention_layers(model, images))
    del layers  # a reader that stops early
    gc.collect()
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_flow_through_weights_and_values(random_vit: Make) -> None:
    model = random_vit(width=8, image_size=(8, 4), position="relative", qk_norm=True).double()
    attention, x, rule = next(iter(attention_inputs(model, images_for(model, 1).double())))

    def output(x: torch.Tensor) -> torch.Tensor:
        return attention.applied(attention.weights(x, rule), x)

    assert torch.autograd.gradcheck(output, x.clone().requires_grad_())


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_weights_are_exact_whatever_the_model_is_in(
    dtype: torch.dtype, expected: torch.dtype, random_vit: Make
) -> None:
    model = random_vit(position="relative").to(dtype)
    images = images_for(model)  # float32: moved to what the model is in
    for weights in attention_layers(model, images):
        assert weights.dtype is expected
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 16, dtype=expected))


def test_batches_fit_the_budget(monkeypatch: pytest.MonkeyPatch, random_vit: Make) -> None:
    model = random_vit()  # 2 heads x 16 x 16 x 4 bytes = 2,048 an image
    images = images_for(model, 7)
    for budget, sizes in {6143: [2, 2, 2, 1], 6144: [3, 3, 1], 1: [1] * 7, 2**20: [7]}.items():
        monkeypatch.setattr(recorder, "BUDGET", budget)
        parts = list(batched(model, images))
        assert [len(part) for part in parts] == sizes
        assert torch.equal(torch.cat(parts), images)


def test_models_without_attention_are_told_so(random_vit: Make) -> None:
    mixer = Mixer(
        MixerSpec(
            depth=1,
            width=8,
            tokens_mlp_width=8,
            channels_mlp_width=8,
            patch_size=(4, 4),
            image_size=(8, 8),
        )
    )
    resnet = ResNet(ResNetSpec(layers=(1, 1, 1, 1), image_size=(32, 32)))
    for model in (mixer, resnet):
        name = type(model).__name__
        with pytest.raises(PatchwordError, match=f"a {name} has no attention .* choose a ViT"):
            require_vit(model)
        with pytest.raises(PatchwordError, match="no attention"):
            next(attention_layers(model, torch.zeros(1, 3, *model.spec.image_size)))
    with pytest.raises(PatchwordError, match=r"the model takes \[B, 3, H, W\]"):
        next(attention_layers(random_vit(), torch.zeros(1, 3, 10, 12)))
