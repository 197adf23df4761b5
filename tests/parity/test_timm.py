"""timm's weights, read and written, against timm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from library_checks import build, check, find, from_timm, rebuilt_by_timm

from patchword.architecture import MixerSpec, ResNetSpec, ViTSpec
from patchword.weights import timm

SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 7,
}
HYBRID = SMALL | {"img_size": 64}
PLAIN = "vit_tiny_patch16_224"
VITS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "class token": (PLAIN, {}, {"pool": "token"}),
    "average": (
        PLAIN,
        {"global_pool": "avg", "class_token": False},
        {"pool": "gap", "pool_norm": True},
    ),
    "average, norm before": (
        "vit_base_patch16_gap_224",
        {},
        {"pool": "gap", "pool_norm": False, "heads": 2},
    ),
    "average beside a class token": (
        PLAIN,
        {"global_pool": "avg"},
        {"pool": "gap", "registers": 1, "pool_norm": True},
    ),
    "registers": (
        "vit_base_patch16_reg4_gap_256",
        {"reg_tokens": 3},
        {"pool": "gap", "registers": 3},
    ),
    "registers with positions": (PLAIN, {"reg_tokens": 2}, {"registers": 2}),
    "registers, average, positions": (
        PLAIN,
        {"reg_tokens": 5, "class_token": False, "global_pool": "avg"},
        {"registers": 5, "pool": "gap"},
    ),
    "map": ("vit_base_patch16_siglip_224", {}, {"pool": "map", "activation": "gelu"}),
    "map, tanh": (
        "vit_so400m_patch16_siglip_256",
        {"mlp_ratio": 3.7362},
        {"pool": "map", "activation": "gelu_tanh", "mlp_width": 89},
    ),
    "map, registers": (
        "test_vit3",
        {"reg_tokens": 2, "pool_include_prefix": True},
        {"pool": "map", "registers": 2},
    ),
    "siglip, average": ("vit_base_patch16_siglip_gap_224", {}, {"pool": "gap", "pool_norm": False}),
    "qk norm": (PLAIN, {"qk_norm": True}, {"qk_norm": True, "heads": 2}),
    "deit": ("deit_tiny_patch16_224", {}, {"distillation": "none"}),
    "deit, distilled": (
        "deit_tiny_distilled_patch16_224",
        {},
        {"distillation": "head", "pool": "token"},
    ),
    "deit3": ("deit3_small_patch16_224", {}, {"layer_scale": 1e-6}),
    "dinov2": ("vit_small_patch14_dinov2", {}, {"layer_scale": 1e-5}),
    "dinov2, registers": ("vit_small_patch14_reg4_dinov2", {}, {"registers": 4}),
    "dinov2, SwiGLU": (
        "vit_giant_patch14_dinov2",
        {},
        {"activation": "swiglu", "mlp_width": 64},
    ),
    "dinov2, SwiGLU, registers": (
        "vit_giant_patch14_reg4_dinov2",
        {"mlp_ratio": 4},
        {"activation": "swiglu", "mlp_width": 48, "registers": 4},
    ),
    "no positions": (PLAIN, {"pos_embed": "none"}, {"position": "none"}),
    "no classes": (PLAIN, {"num_classes": 0}, {"num_classes": 0}),
    "oblong, 1 channel": (
        PLAIN,
        {"img_size": (32, 48), "patch_size": (8, 12), "in_chans": 1},
        {"image_size": (32, 48), "patch_size": (8, 12), "in_channels": 1},
    ),
    "eps 1e-5": ("vit_base_patch16_clip_224", {"pre_norm": False}, {"norm_eps": 1e-5}),
    "norm after the class token": (PLAIN, {"fc_norm": True}, {"pool": "token"}),
}
HYBRIDS = {
    "vit_tiny_r_s16_p8_224": (8, (), 32),
    "vit_small_r26_s32_224": (1, (2, 2, 2, 2), 32),
    "vit_base_r50_s16_224": (2, (3, 4, 9), 32),
    "vit_large_r50_s32_224": (1, (3, 4, 6, 3), 32),
}


def config_of(architecture: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """timm's config.json, as far as the model needs it."""
    return {"architecture": f"{architecture}.some_tag", "model_args": arguments}


@pytest.mark.parametrize("name", VITS)
def test_a_vit_agrees_both_ways(name: str) -> None:
    architecture, changes, expected = VITS[name]
    arguments = SMALL | changes
    theirs = from_timm(architecture, **arguments)
    ours, _ = check(timm, theirs, rebuilt_by_timm, config_of(architecture, arguments))
    assert {key: getattr(ours.spec, key) for key in expected} == expected


@pytest.mark.parametrize("architecture", HYBRIDS)
def test_a_hybrid_agrees_both_ways(architecture: str) -> None:
    kernel, layers, patch = HYBRIDS[architecture]
    arguments = HYBRID | {"patch_size": kernel, "depth": 1}
    theirs = from_timm(architecture, **arguments)
    ours, _ = check(timm, theirs, rebuilt_by_timm, config_of(architecture, arguments))
    assert isinstance(ours.spec, ViTSpec)
    assert ours.spec.stem is not None
    assert (ours.spec.stem.layers, ours.spec.patch_size) == (layers, (patch, patch))


def test_a_bit_resnet_agrees_both_ways() -> None:
    theirs = from_timm("resnetv2_50x1_bit", num_classes=7)
    config = {"architecture": "resnetv2_50x1_bit.goog_in21k", "pretrained_cfg": {}}
    config["pretrained_cfg"] = {"input_size": [3, 48, 40], "interpolation": "bilinear"}
    ours, _ = check(timm, theirs, rebuilt_by_timm, config, tolerance=1e-4)
    assert isinstance(ours.spec, ResNetSpec)
    assert (ours.spec.layers, ours.spec.image_size) == ((3, 4, 6, 3), (48, 40))


def test_a_mixer_agrees_both_ways() -> None:
    arguments = {"img_size": [64, 96], "mlp_ratio": [0.1, 0.2], "num_classes": 7, "in_chans": 2}
    theirs = from_timm("mixer_s32_224", **arguments)
    ours, _ = check(timm, theirs, rebuilt_by_timm, config_of("mixer_s32_224", arguments))
    assert isinstance(ours.spec, MixerSpec)
    assert (ours.spec.tokens_mlp_width, ours.spec.channels_mlp_width) == (51, 102)
    assert (ours.spec.image_size, ours.spec.in_channels) == ((64, 96), 2)
