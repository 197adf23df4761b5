"""What a run directory holds, and the model that a run starts from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from settling import settled

from patchword.data.registry import open_source
from patchword.models.model import Model
from patchword.run.folder import check_same, resumed
from patchword.run.inputs import build_model
from patchword.spec.parse import UsageError, changed
from patchword.spec.settled import flatten, read_config
from patchword.spec.train import TrainSpec
from patchword.training.recipes import recipe_spec


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


def test_an_earlier_version_left_out_options_of_the_recipe_that_the_model_lacks():
    """So they are no other settings; those that it has are."""
    asked = changed(recipe_spec("photos", "digits"), model="Mixer-S/16", image_size=32)
    stored = read_config(flatten(settled(asked).to_dict()))
    assert asked.options.pool is not None
    assert stored.request.options.pool is None
    check_same(Path("run"), asked, stored)
    with pytest.raises(UsageError, match=r"other settings of options\.depth;"):
        check_same(Path("run"), changed(asked, depth=2), stored)


def test_a_mask_rate_that_was_found_holds():
    """The objectives read it from the request, which may leave it open."""
    asked = changed(TrainSpec(source="digits"), objective="masked-patch", image_size=32)
    stored = read_config(flatten(settled(changed(asked, mask_rate=0.6)).to_dict()))
    assert resumed(Path("run"), asked, stored).request.pretrain.mask_rate == 0.6
