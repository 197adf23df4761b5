"""What applies to which model: filters, and how positions relate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from patchword import create_model
from patchword.inspection.embedding import embedding_filters, position_similarity
from patchword.inspection.of_model import NotApplicable, model_filters, model_positions
from patchword.models.model import Model


def small(name: str = "ViT-mu/4", size: tuple[int, int] = (8, 12), **options: Any) -> Model:
    model = create_model(name, 3, size, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("name", ["ViT-mu/4", "Mixer-S/4"])
def test_filters_are_those_of_the_patch_embedding(name: str) -> None:
    model: Any = small(name, depth=1)
    components, explained = model_filters(model, count=5)
    wanted = embedding_filters(model.patch_embedding.weight, (4, 4), 3, 5)
    np.testing.assert_array_equal(components, wanted[0])
    np.testing.assert_array_equal(explained, wanted[1])


def test_models_that_do_not_cut_the_image_have_no_filters() -> None:
    hybrid = create_model("R50+ViT-B/16", 0, 32, depth=1, width=32, heads=2, mlp_width=32)
    with pytest.raises(NotApplicable, match="cut from a feature map"):
        model_filters(hybrid)
    with pytest.raises(NotApplicable, match="ResNet does not cut"):
        model_filters(create_model("BiT-R50x1", 0, 32, layers=(1, 1, 1, 1)))


@pytest.mark.parametrize("position", ["learned-1d", "learned-2d", "sincos2d"])
def test_tables_are_compared_by_cosine(position: str) -> None:
    model: Any = small(position=position, registers=2)
    found = model_positions(model, torch.zeros(1, 3, 8, 12))
    table = model.positions[0]()[0, -6:]
    np.testing.assert_allclose(found.values, position_similarity(table, (2, 3)))
    assert (found.kind, found.unit) == (position, "cosine similarity")
    assert found.structure.neighbour == pytest.approx(
        np.mean(
            [found.values[0, 0, 0, 1], found.values[0, 1, 0, 2], found.values[1, 0, 1, 1]]
            + [found.values[1, 1, 1, 2]]
            + [found.values[0, j, 1, j] for j in range(3)]
        )
    )


def test_rules_show_the_bias_they_induce() -> None:
    images = torch.randn(2, 3, 8, 12)
    rotary = model_positions(small(position="rotary"), images)
    np.testing.assert_allclose(
        [rotary.values[i, j, i, j] for i in range(2) for j in range(3)], 1, atol=1e-6
    )
    assert rotary.structure.neighbour is not None
    assert rotary.structure.neighbour < 1
    relative = model_positions(small(position="relative"), images)
    assert relative.unit == "added to the logits"
    assert relative.values.std() > 0
    for found in (rotary, relative):
        assert found.values.shape == (2, 3, 2, 3)
        assert found.kind in found.title


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ViT-mu/4", {"position": "none"}),
        ("Mixer-S/4", {"depth": 1}),
        ("BiT-R50x1", {"layers": (1, 1, 1, 1)}),
    ],
)
def test_models_without_positions(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(NotApplicable, match="no position embedding"):
        model_positions(create_model(name, 3, (8, 12), **options), torch.zeros(1, 3, 8, 12))
