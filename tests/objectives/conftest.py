"""A small model with all its parameters perturbed, and runs of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from patchword.models.vit import ViT
from patchword.models.zoo import create_model
from patchword.spec.parse import changed
from patchword.spec.train import TrainSpec


@pytest.fixture(scope="session")
def make_model() -> Callable[..., ViT]:
    """`make_model(**options)`: of 16 patches, nothing at zero."""

    def make(**options: Any) -> ViT:
        settings: dict[str, Any] = {"depth": 2, "width": 16, "mlp_width": 32, "heads": 2}
        model = create_model("ViT-mu/4", 0, 16, **settings | options)
        assert isinstance(model, ViT)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p))
        return model

    return make


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., TrainSpec]:
    """`make_spec(**settings)`: with an objective, of a small decoder."""
    small = {"decoder_depth": 2, "decoder_width": 16, "decoder_heads": 2}

    def make(**settings: Any) -> TrainSpec:
        return changed(
            TrainSpec(source="x"), **(small if "objective" in settings else {}), **settings
        )

    return make
