"""The hybrid, a Vision Transformer on the feature map of a ResNet."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from patchword.models.vit import ViT
from patchword.models.zoo import (
    HYBRIDS,
    create_model,
    macs,
    model_cost,
    model_spec,
    resized,
    spec_from_dict,
    spec_to_dict,
    variant_name,
)
from patchword.spec.model import StemSpec, ViTSpec
from patchword.spec.parse import PatchwordError, UsageError

PARAMETERS = {  # at 224 px and 1000 classes, as timm counts them
    "R+ViT-Ti/16": 6_337_704,
    "R26+ViT-S/32": 36_431_912,
    "R50+ViT-B/32": 110_945_832,
    "R50+ViT-B/16": 98_659_112,
    "R50+ViT-L/32": 328_994_856,
    "R50+ViT-L/16": 316_483_624,
}
STEMS = {  # blocks per stage, total stride, channels, patches at 224 px
    "R+ViT-Ti/16": ((), 4, 64, (7, 7)),
    "R26+ViT-S/32": ((2, 2, 2, 2), 32, 2048, (7, 7)),
    "R50+ViT-B/32": ((3, 4, 6, 3), 32, 2048, (7, 7)),
    "R50+ViT-B/16": ((3, 4, 9), 16, 1024, (14, 14)),
    "R50+ViT-L/32": ((3, 4, 6, 3), 32, 2048, (7, 7)),
    "R50+ViT-L/16": ((3, 4, 9), 16, 1024, (14, 14)),
}


def spec_of(name: str, **options: Any) -> ViTSpec:
    spec = model_spec(name, **options)
    assert isinstance(spec, ViTSpec)
    return spec


def tiny(**changes: Any) -> ViTSpec:
    fields: dict[str, Any] = {
        "depth": 2,
        "width": 32,
        "mlp_width": 64,
        "heads": 2,
        "stem": StemSpec(layers=(1, 1), width=32),
        "patch_size": (8, 16),  # 1 x 2 pixels of the map
        "image_size": (24, 32),
        "num_classes": 5,
    }
    return ViTSpec(**(fields | changes))


def test_no_variant_is_missing():
    assert tuple(PARAMETERS) == tuple(STEMS) == HYBRIDS


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_exact(name: str):
    assert model_cost(model_spec(name))[0] == PARAMETERS[name]


@pytest.mark.parametrize("name", STEMS)
def test_stems(name: str):
    spec = spec_of(name)
    assert spec.stem is not None
    found = (spec.stem.layers, spec.stem.stride, spec.stem.channels, spec.grid)
    assert found == STEMS[name]
    assert variant_name(spec) == name
    assert spec_from_dict(spec_to_dict(spec)) == spec


def test_names_of_other_stems():
    """No stem but its own takes a known name: the root alone with patches of 16 pixels has none."""
    assert variant_name(spec_of("R+ViT-Ti/16", patch_size=16)) == "R0+ViT-Ti/16"
    assert variant_name(spec_of("R+ViT-Ti/16", patch_size=(32, 16))) == "R0+ViT-Ti/32x16"
    assert variant_name(tiny(patch_size=(8, 8))) == "R1.1+ViT-2x32/8"


@pytest.mark.parametrize(
    "spec",
    [
        *(model_spec(name) for name in PARAMETERS),
        model_spec("R50+ViT-B/16", image_size=(96, 160), pool="gap"),
        tiny(in_channels=1),
    ],
    ids=[*PARAMETERS, "rectangle", "tiny"],
)
def test_macs_by_formula_are_those_counted(spec: ViTSpec, counted_macs: Callable[[ViTSpec], int]):
    assert macs(spec) == counted_macs(spec)


def test_a_hybrid_is_a_vit_on_the_map_of_its_stem(perturb: Callable[[nn.Module], None]):
    """The same weights in a ViT whose images are the maps."""
    hybrid = ViT(tiny()).eval()
    perturb(hybrid)
    stem = tiny().stem
    assert stem is not None
    plain = ViT(
        tiny(stem=None, in_channels=stem.channels, image_size=(3, 4), patch_size=(1, 2))
    ).eval()
    plain.load_state_dict(
        {name: w for name, w in hybrid.state_dict().items() if not name.startswith("stem.")}
    )
    images = torch.randn(2, 3, 24, 32)
    assert hybrid.stem is not None
    maps = hybrid.stem(images)
    assert maps.shape == (2, stem.channels, 3, 4)
    torch.testing.assert_close(hybrid(images), plain(maps))
    pooled, tokens, grid = hybrid.features(images)
    assert grid == (3, 2)
    assert tokens.shape == (2, math.prod(grid), 32)
    torch.testing.assert_close(pooled, plain.features(maps).pooled)


def test_a_patch_s_pixels_are_all_used(perturb: Callable[[nn.Module], None]):
    """Of a whole image, so that no row or column is cut off by stem or patches."""
    model = ViT(tiny()).eval()
    perturb(model)
    images = torch.randn(1, 3, 24, 32, requires_grad=True)
    model(images).square().sum().backward()
    assert images.grad is not None
    assert (images.grad.abs().sum((0, 1)) > 0).all()


def test_every_parameter_gets_a_gradient(perturb: Callable[[nn.Module], None]):
    model = ViT(tiny())
    perturb(model)
    model(torch.randn(2, 3, 24, 32)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_initial_blocks_are_their_shortcuts():
    """The stem's own initialisation stays: only the last norm of each block is zero."""
    model = create_model("R26+ViT-S/32", 10, 32, depth=1)
    zero = [
        name
        for name, w in model.named_parameters()
        if name.startswith("stem.") and name.endswith("weight") and not w.any()
    ]
    assert zero == [f"stem.stages.{i}.{j}.norm3.weight" for i in range(4) for j in range(2)]


def test_patches_must_fit_the_stem():
    with pytest.raises(UsageError, match="not a multiple of the stem's stride 8"):
        tiny(patch_size=(4, 8))
    with pytest.raises(UsageError, match="multiple of the patch"):
        resized(tiny(), (25, 32))
    with pytest.raises(PatchwordError, match="the model takes"):
        ViT(tiny())(torch.zeros(1, 3, 33, 32))


def test_a_tiny_one_learns_digits(learn_digits: Callable[[ViT, int, float], float]):
    spec = dataclasses.replace(
        tiny(), image_size=(16, 16), patch_size=(8, 8), in_channels=1, num_classes=10
    )
    assert learn_digits(ViT(spec), 60, 3e-3) > 0.75
