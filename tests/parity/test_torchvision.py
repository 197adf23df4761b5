"""torchvision's weights, read and written, against torchvision."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from library_checks import build, check, find, perturbed
from torch import nn

from patchword.models.zoo import build_model
from patchword.spec.model import MixerSpec, StemSpec, ViTSpec
from patchword.spec.parse import PatchwordError
from patchword.weights import torchvision
from patchword.weights.mapping import Written

SMALL: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 24,
    "mlp_dim": 40,
    "num_classes": 7,
}
OURS = ViTSpec(depth=1, width=24, mlp_width=40, heads=2, patch_size=(8, 8), image_size=(16, 16))


def create(**arguments: Any) -> nn.Module:
    module = importlib.import_module("torchvision.models.vision_transformer")
    return module.VisionTransformer(**arguments).eval()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"head": "linear", "mlp_width": 40, "depth": 2}),
        ({"representation_size": 24}, {"head": "mlp", "head_width": None}),
        ({"representation_size": 10}, {"head": "mlp", "head_width": 10}),
        ({"num_layers": 11, "patch_size": 16, "num_heads": 4}, {"depth": 11, "heads": 4}),
    ],
    ids=str,
)
def test_a_vit_agrees_both_ways(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    arguments = SMALL | changes

    def rebuilt(_: Written) -> nn.Module:
        return create(**arguments)

    theirs = perturbed(create(**arguments))
    ours, found = check(torchvision, theirs, rebuilt, heads=arguments["num_heads"])
    assert {key: getattr(ours.spec, key) for key in expected} == expected
    assert ours.spec.image_size == (32, 32)
    assert len(found.notes) == 1
    assert "preprocessing assumed" in found.notes[0]


def test_the_published_size_needs_no_hint() -> None:
    with torch.device("meta"):
        theirs = importlib.import_module("torchvision").models.vit_b_16()
    found = find(torchvision, theirs.state_dict())
    assert isinstance(found.spec, ViTSpec)
    assert (found.spec.heads, found.spec.depth, found.spec.image_size) == (12, 12, (224, 224))
    assert any("12 heads" in note for note in found.notes)


PUBLISHED = {
    "vit_b_16": {"IMAGENET1K_V1": 224, "IMAGENET1K_SWAG_E2E_V1": 384},
    "vit_b_32": {"IMAGENET1K_V1": 224},
    "vit_l_16": {"IMAGENET1K_V1": 224, "IMAGENET1K_SWAG_E2E_V1": 512},
    "vit_l_32": {"IMAGENET1K_V1": 224},
    "vit_h_14": {"IMAGENET1K_SWAG_E2E_V1": 518, "IMAGENET1K_SWAG_LINEAR_V1": 224},
}


@pytest.mark.parametrize(
    ("name", "weights", "side"),
    [(name, *row) for name, rows in PUBLISHED.items() for row in rows.items()],
)
def test_preprocessing_of_published_weights_follows_from_model_and_size(
    name: str, weights: str, side: int
) -> None:
    models = importlib.import_module("torchvision").models
    transform = models.get_model_weights(name)[weights].transforms()
    with torch.device("meta"):
        theirs = models.get_model(name, image_size=side)
    found = find(torchvision, theirs.state_dict())
    ours = found.preprocess
    assert found.spec.image_size == (side, side) == (transform.crop_size[0],) * 2
    assert (list(ours.mean), list(ours.std)) == (transform.mean, transform.std)
    assert ours.interpolation == transform.interpolation.value
    assert side / ours.crop_fraction == pytest.approx(transform.resize_size[0])
    (note,) = [note for note in found.notes if note.startswith("preprocessing assumed")]
    assert f"{weights}: {ours.interpolation}, resized to {transform.resize_size[0]} px" in note
    twins = name in ("vit_b_16", "vit_l_16") and side == 224
    assert ("IMAGENET1K_SWAG_LINEAR_V1, of the same shapes" in note) == twins


def test_preprocessing_is_that_of_torchvisions_weights() -> None:
    weights = importlib.import_module("torchvision").models.ViT_B_16_Weights.IMAGENET1K_V1
    transform = weights.transforms()
    found = find(torchvision, create(**SMALL).state_dict())
    ours = found.preprocess
    assert any("assumed: bilinear, the middle 0.875" in note for note in found.notes)
    assert list(ours.mean) == transform.mean
    assert list(ours.std) == transform.std
    assert ours.interpolation == transform.interpolation.value
    assert ours.resize == "short"
    assert transform.crop_size[0] / ours.crop_fraction == transform.resize_size[0]


def test_missing_unexpected_and_misshapen_tensors_are_named() -> None:
    tensors = create(**SMALL).state_dict()
    without = {name: value for name, value in tensors.items() if "in_proj" not in name}
    for wrong, message in (
        (without, "in_proj_bias is missing.* and 1 more"),
        (tensors | {"extra": torch.zeros(1)}, "extra is unexpected"),
        (tensors | {"conv_proj.weight": torch.zeros(24, 192)}, "not of 4 axes"),
        (tensors | {"encoder.pos_embedding": torch.zeros(1, 8, 24)}, "7 patches"),
    ):
        with pytest.raises(PatchwordError, match=message):
            build(wrong, find(torchvision, wrong, heads=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": "gap"}, "pool gap"),
        ({"position": "none"}, "position none"),
        ({"position_at": "every"}, "position_at every"),
        ({"activation": "gelu_tanh"}, "activation gelu_tanh"),
        ({"layer_scale": 0.1}, "layer_scale 0.1"),
        ({"registers": 1}, "registers 1"),
        ({"distillation": "head"}, "distillation head"),
        ({"qk_norm": True}, "qk_norm"),
        ({"image_size": (16, 32)}, "image_size that is not square"),
        ({"stem": StemSpec(layers=())}, "stem;"),
    ],
    ids=str,
)
def test_what_torchvision_cannot_hold_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PatchwordError, match=f"torchvision has no .*{message}"):
        torchvision.write(build_model(dataclasses.replace(OURS, **changes)))


def test_other_families_are_refused() -> None:
    spec = MixerSpec(
        depth=1,
        width=8,
        tokens_mlp_width=4,
        channels_mlp_width=4,
        patch_size=(8, 8),
        image_size=(16, 16),
    )
    with pytest.raises(PatchwordError, match="no place for a Mixer"):
        torchvision.write(build_model(spec))
