"""The benchmarks' models of other libraries are the same model."""

from __future__ import annotations

import pytest
import torch
from library_checks import perturbed

from patchword.models.vit import ViT
from patchword.models.zoo import create_model
from patchword.spec.parse import PatchwordError
from peers import SAME_WEIGHTS, build, difference


@pytest.mark.parametrize("library", SAME_WEIGHTS)
def test_a_library_has_the_same_weights(library: str) -> None:
    model = perturbed(create_model("ViT-mu/8", 7, 24, depth=2))
    assert isinstance(model, ViT)
    with torch.no_grad():
        scale = float(model(torch.randn(2, 3, 24, 24)).abs().max())
    assert difference(library, model) < 1e-5 * scale


def test_models_that_peers_have_not_are_refused() -> None:
    model = create_model("ViT-mu/8", 7, 24, pool="gap")
    assert isinstance(model, ViT)
    with pytest.raises(PatchwordError, match="plain ViT only"):
        build("timm", model)
