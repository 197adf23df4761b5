"""Inspection writes nothing to the model that it is given: others may use it meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from patchword.inspection.attention import (
    attention_distance,
    attention_entropy,
    attention_maps,
    measure_attention,
    rollout,
)
from patchword.inspection.embedding import position_vectors
from patchword.inspection.explain import explain_class, gradient_rollout
from patchword.inspection.of_model import model_filters, model_positions
from patchword.inspection.recorder import attention_layers, twin
from patchword.inspection.removal import occlusion, removal_curves
from patchword.models.vit import ViT

Make = Callable[..., ViT]
CLASSES = torch.tensor([4, 0])
LOOKS: dict[str, Callable[[ViT, Tensor], Any]] = {
    "layers": lambda model, images: list(attention_layers(model, images)),
    "distance": attention_distance,
    "entropy": attention_entropy,
    "measures": lambda model, images: measure_attention(model, [images]),
    "maps": attention_maps,
    "rollout": rollout,
    "filters": lambda model, images: model_filters(model),
    "positions": model_positions,
    "vectors": lambda model, images: position_vectors(model),
    "occlusion": lambda model, images: occlusion(model, images, CLASSES),
    "curves": lambda model, images: removal_curves(
        model, images, CLASSES, torch.randperm(15).expand(2, 1, -1)
    ),
    "gradients": lambda model, images: gradient_rollout(model, images, CLASSES),
    "explanations": lambda model, images: explain_class(model, images, CLASSES),
}


def state(model: nn.Module) -> list[Any]:
    """Modes, hooks and gradients of all modules."""
    return [
        (
            *(module.training, len(module._forward_hooks), len(module._forward_pre_hooks)),
            [parameter.grad is None for parameter in module.parameters(recurse=False)],
        )
        for module in model.modules()
    ]


@pytest.mark.parametrize("pool", ["token", "map"])
@pytest.mark.parametrize("look", LOOKS)
def test_plain_passes_beside_it_are_right(look: str, pool: Any, random_vit: Make) -> None:
    model = random_vit(pool=pool, dropout=0.5)
    model.norm.train()  # a mode to be kept that changes no answer
    images = torch.randn(2, 3, *model.spec.image_size)
    before = state(model)
    with torch.no_grad():
        wanted = model(images)
    begun, stop, failed = threading.Event(), threading.Event(), []

    def inspect() -> None:
        try:
            while not stop.is_set():
                LOOKS[look](model, images)
                begun.set()
        except Exception as error:
            failed.append(error)
            begun.set()

    thread = threading.Thread(target=inspect)
    thread.start()
    try:
        with torch.no_grad():
            passes = [model(images) for _ in range(10)]
            begun.wait(60)
            passes += [model(images) for _ in range(10)]
        seen = state(model)
    finally:
        stop.set()
        thread.join(60)
    assert not failed
    assert all(torch.equal(logits, wanted) for logits in passes)
    assert seen == before == state(model)


def test_two_inspections_at_once_are_as_one(random_vit: Make) -> None:
    model = random_vit(pool="map")
    images = torch.randn(2, 3, *model.spec.image_size)
    wanted = gradient_rollout(model, images, CLASSES)
    found: list[Any] = []

    def inspect() -> None:
        found.extend(gradient_rollout(model, images, CLASSES) for _ in range(4))

    threads = [threading.Thread(target=inspect) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 8
    assert all((values == wanted).all() for values in found)


def test_a_twin_shares_every_tensor_and_nothing_else(random_vit: Make) -> None:
    model = random_vit(position="rotary", registers=1).train()
    other = twin(model)
    assert not any(module.training for module in other.modules())
    assert all(module.training for module in model.modules())
    ours = dict([*model.named_parameters(), *model.named_buffers()])
    theirs = dict([*other.named_parameters(), *other.named_buffers()])
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
    other.norm.register_forward_hook(lambda *_: None)
    assert not model.norm._forward_hooks
