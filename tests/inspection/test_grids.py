"""What is seen in images of another size is what a model made for that size shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from patchword.inspection.attention import (
    attention_distance,
    attention_maps,
    measure_attention,
    rollout,
)
from patchword.inspection.embedding import induced_bias
from patchword.inspection.explain import gradient_rollout
from patchword.inspection.of_model import model_positions
from patchword.inspection.recorder import attention_layers
from patchword.inspection.removal import occlusion, removal_curves
from patchword.models.position import resample_positions
from patchword.models.vit import ViT
from patchword.spec.parse import UsageError

Make = Callable[..., ViT]
CLASSES = torch.tensor([4, 0])
SIZE = (16, 6)
"""4 x 3 patches; the model's own are 3 x 5."""
LOOKS: dict[str, Callable[[ViT, Tensor], Any]] = {
    "layers": lambda model, images: torch.stack(list(attention_layers(model, images))).numpy(),
    "distance": attention_distance,
    "maps": attention_maps,
    "a query": lambda model, images: attention_maps(model, images, (3, 2)),
    "rollout": rollout,
    "gradients": lambda model, images: gradient_rollout(model, images, CLASSES),
    "occlusion": lambda model, images: occlusion(model, images, CLASSES),
    "curves": lambda model, images: (
        removal_curves(model, images, CLASSES, torch.arange(12).expand(2, 1, -1)).deletion
    ),
}
KINDS: dict[str, dict[str, Any]] = {
    "learned-1d": {"registers": 1},
    "a table in every layer": {"position": "learned-2d", "position_at": "every"},
    "sin-cos": {"position": "sincos2d", "pool": "gap"},
    "relative": {"position": "relative", "position_at": "every-shared", "pool": "map"},
    "rotary": {"position": "rotary", "registers": 2},
}


def moved(model: ViT) -> ViT:
    spec = dataclasses.replace(model.spec, image_size=SIZE)
    tensors = dict(model.state_dict())
    resample_positions(tensors, model.spec, spec)
    other = ViT(spec).eval()
    other.load_state_dict(tensors)
    return other


@pytest.mark.parametrize("kind", KINDS)
def test_every_look_has_the_grid_of_the_images(kind: str, random_vit: Make) -> None:
    model = random_vit(**KINDS[kind])
    other, images = moved(model), torch.randn(2, 3, *SIZE)
    for name, look in LOOKS.items():
        np.testing.assert_array_equal(look(model, images), look(other, images), err_msg=name)
    ours, theirs = model_positions(model, images), model_positions(other, images)
    assert ours.values.shape == (4, 3, 4, 3)
    np.testing.assert_array_equal(ours.values, theirs.values)
    if model.spec.position in ("relative", "rotary"):
        np.testing.assert_array_equal(
            induced_bias(model, 1, images), induced_bias(other, 1, images)
        )


def test_a_query_is_on_the_grid_of_the_images(random_vit: Make) -> None:
    with pytest.raises(UsageError, match="the grid of 4 x 3 patches; use 0,0 to 3,2"):
        attention_maps(random_vit(), torch.zeros(1, 3, *SIZE), (0, 4))


def test_batches_of_several_sizes_are_measured_together(random_vit: Make) -> None:
    model = random_vit()
    parts = [torch.randn(2, 3, *SIZE), torch.randn(1, 3, *model.spec.image_size)]
    measured = measure_attention(model, parts)
    means = [attention_distance(model, part) for part in parts]
    np.testing.assert_allclose(measured.distance, (2 * means[0] + means[1]) / 3, 1e-6)
    assert measured.images == 3
