"""The model that a run starts from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from settling import settled

from patchword.data.registry import open_source
from patchword.models.model import Model
from patchword.run.inputs import build_model
from patchword.spec.parse import changed
from patchword.spec.train import TrainSpec


def started(photos: Path, **changes: Any) -> Model:
    settings: dict[str, Any] = {"model": "ViT-mu/8", "image_size": 16} | changes
    asked = changed(TrainSpec(source=str(photos)), **settings)
    return build_model(settled(asked), open_source(str(photos)))


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_with_the_sigmoid_loss_every_class_begins_at_one_in_k(photos: Path, head: str):
    """The fresh head's bias is -log K, three classes here: -6.9 for a thousand (big_vision,
    vit_i1k)."""
    model = started(photos, loss="sigmoid", head=head)
    assert model.head is not None
    torch.testing.assert_close(model.head.bias, torch.full((3,), -math.log(3)))
    logits = model.eval()(torch.randn(4, 3, 16, 16))
    assert model.spec.probability == "sigmoid"
    odds = logits.exp()
    torch.testing.assert_close(odds, torch.full_like(odds, 1 / 3))


def test_the_head_for_softmax_begins_at_zero(photos: Path):
    model = started(photos)
    assert model.head is not None
    assert model.spec.probability == "softmax"
    assert not model.head.bias.any()


def test_a_transferred_head_begins_at_zero_with_either_loss(photos: Path, finished: Path):
    """Section 3.2."""
    for loss in ("softmax", "sigmoid"):
        model = started(photos, model=None, init=str(finished), loss=loss)
        assert model.head is not None
        assert not model.head.bias.any()
