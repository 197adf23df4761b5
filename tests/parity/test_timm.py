"""timm's weights, read and written, against timm."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from library_checks import (
    build,
    check,
    create,
    find,
    from_timm,
    images,
    perturbed,
    rebuilt_by_timm,
    relative,
)
from safetensors.torch import save_file

from patchword.models.model import Model
from patchword.models.resnet import standardized
from patchword.models.zoo import build_model
from patchword.spec.model import (
    MixerSpec,
    ModelSpec,
    PreprocessSpec,
    ResNetSpec,
    StemSpec,
    ViTSpec,
)
from patchword.spec.parse import PatchwordError
from patchword.weights import timm
from patchword.weights.timm.config import VIT_NAMES, vit_arguments
from patchword.weights.timm.names import same_filters

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


@pytest.mark.parametrize(
    ("name", "hints"),
    [
        ("class token", {"heads": 2}),
        ("average beside a class token", {"heads": 2}),
        ("registers", {"heads": 2}),
        ("dinov2, registers", {"heads": 2}),
        ("deit3", {"heads": 2}),
        ("deit, distilled", {"heads": 2}),
        ("qk norm", {}),
        ("map, tanh", {"heads": 2, "activation": "gelu_tanh"}),
        ("eps 1e-5", {"heads": 2, "norm_eps": 1e-5}),
        ("oblong, 1 channel", {"heads": 2, "image_size": (32, 48)}),
    ],
)
def test_a_lone_state_dict_tells_the_same(name: str, hints: dict[str, Any]) -> None:
    architecture, changes, expected = VITS[name]
    arguments = SMALL | changes
    if "img_size" not in changes:
        arguments["img_size"] = 56  # 7 x 7 patches, which no other number of tokens is mistaken for
    theirs = from_timm(architecture, **arguments)
    ours, found = check(timm, theirs, rebuilt_by_timm, **hints)
    expected = {key: value for key, value in expected.items() if key != "layer_scale"}
    assert {key: getattr(ours.spec, key) for key in expected} == expected
    assert any("assumed" in note for note in found.notes)


def test_a_mixer_alone_tells_the_same() -> None:
    theirs = from_timm("mixer_s32_224", img_size=64, mlp_ratio=(0.1, 0.2), num_classes=0)
    ours, found = check(timm, theirs, rebuilt_by_timm)
    assert (ours.spec.image_size, ours.spec.num_classes) == ((64, 64), 0)
    assert any("assumed" in note for note in found.notes)


NAMES = (
    *("vit_tiny_patch16_384", "vit_base_patch16_siglip_gap_224", "vit_large_patch16_siglip_512"),
    *(
        "vit_so400m_patch14_siglip_384",
        "vit_giantopt_patch16_siglip_256",
        "vit_base_patch16_gap_224",
    ),
    *("vit_giant_patch14_reg4_dinov2", "vit_gigantic_patch14_224", "deit3_huge_patch14_224"),
    *("deit_base_distilled_patch16_384", "vit_large_r50_s32_384", "vit_tiny_r_s16_p8_224"),
    *("vit_so150m_patch16_reg4_gap_256", "eva_large_patch14_196", "test_vit3"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_says_what_tensors_do_not(name: str) -> None:
    with torch.device("meta"):
        theirs = create(name)
    found = find(timm, theirs.state_dict(), {"architecture": f"{name}.tag", "pretrained_cfg": {}})
    expected = {name for rule in found.rules for name in rule.theirs}
    assert expected == theirs.state_dict().keys()
    spec, block = found.spec, theirs.blocks[0]
    assert isinstance(spec, ViTSpec)
    assert spec.heads == block.attn.num_heads
    assert spec.norm_eps == block.norm1.eps
    assert spec.prefix == theirs.num_prefix_tokens
    assert {"token": "token", "gap": "avg", "map": "map"}[spec.pool] == theirs.global_pool
    activations = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "SiLU": "swiglu"}
    assert spec.activation == activations[type(block.mlp.act).__name__]
    sizes = zip(spec.image_size, theirs.patch_embed.img_size, spec.patch_size, strict=True)
    assert all(ours == theirs // patch * patch for ours, theirs, patch in sizes)


@pytest.mark.parametrize("name", VIT_NAMES[::3])
def test_a_name_stands_for_the_arguments_that_we_think(name: str) -> None:
    with torch.device("meta"):
        theirs = create(name)
    arguments = vit_arguments(name)
    embed, block = theirs.patch_embed, theirs.blocks[0]
    expected = {
        "img_size": embed.img_size[0],
        "patch_size": embed.patch_size[0],
        "embed_dim": theirs.embed_dim,
        "depth": len(theirs.blocks),
        "num_heads": block.attn.num_heads,
        "class_token": theirs.has_class_token,
        "global_pool": theirs.global_pool,
        "no_embed_class": theirs.no_embed_class,
        "reg_tokens": theirs.num_reg_tokens,
        "norm_eps": block.norm1.eps,
        "distilled": hasattr(theirs, "dist_token"),
        "pre_norm": hasattr(theirs.norm_pre, "weight"),
        "init_values": block.ls1.gamma.numel() and arguments["init_values"]
        if hasattr(block.ls1, "gamma")
        else None,
    }
    assert {key: arguments[key] for key in expected} == expected
    assert int(arguments["embed_dim"] * arguments["mlp_ratio"]) == block.mlp.fc1.out_features
    stem = getattr(embed, "backbone", None)
    stages = () if stem is None else tuple(len(s.blocks) for s in getattr(stem, "stages", ()))
    assert arguments["stem"] == (None if stem is None else stages)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("vit_base_patch16_clip_224", {}, "norm before its blocks"),
        ("vit_base_patch16_clip_quickgelu_224", {"pre_norm": False}, "another activation"),
        ("vit_base_patch16_rpn_224", {}, "another order of norms"),
        (PLAIN, {"act_layer": "relu"}, "activation 'relu'"),
        (PLAIN, {"global_pool": "max"}, "pooling 'max'"),
        (PLAIN, {"global_pool": "avg", "pool_include_prefix": True}, "pool_include_prefix=True"),
        ("vit_base_patch16_siglip_224", {"reg_tokens": 1}, "pool_include_prefix=False"),
        ("vit_base_patch16_siglip_224", {"fc_norm": True}, "fc_norm after"),
    ],
)
def test_what_only_looks_like_ours_is_refused(
    architecture: str, changes: dict[str, Any], message: str
) -> None:
    arguments = SMALL | changes
    theirs = create(architecture, **arguments)
    with pytest.raises(PatchwordError, match=message):
        find(timm, theirs.state_dict(), config_of(architecture, arguments))


def test_other_architectures_of_timm_are_named() -> None:
    theirs = create("resnet10t")
    config = {"architecture": "resnet10t.c3_in1k", "pretrained_cfg": {}}
    with pytest.raises(PatchwordError, match="timm's resnet10t is none that patchword has"):
        find(timm, theirs.state_dict(), config)


def test_missing_unexpected_and_misshapen_tensors_are_named() -> None:
    tensors = create(PLAIN, **SMALL).state_dict()
    more = tensors | {f"extra.{i}": torch.zeros(1) for i in range(5)}
    for wrong, message in (
        ({k: v for k, v in tensors.items() if "norm2" not in k}, "blocks.0.norm2.bias is missing"),
        (more, "extra.0 is unexpected, extra.1 is unexpected, extra.2 is unexpected and 2 more"),
        (tensors | {"pos_embed": torch.zeros(1, 12, 24)}, "11 patches"),
        (tensors | {"patch_embed.proj.weight": torch.zeros(24, 192)}, "not of 4 axes"),
    ):
        with pytest.raises(PatchwordError, match=message):
            build(wrong, find(timm, wrong, heads=2))


def test_leftovers_of_pre_training_are_ignored() -> None:
    tensors = create(PLAIN, **SMALL).state_dict()
    more = {"mask_token": torch.zeros(1, 1, 24), "decoder_blocks.0.norm1.weight": torch.zeros(8)}
    model = build(tensors | more, find(timm, tensors | more, heads=2))
    assert model.spec == build(tensors, find(timm, tensors, heads=2)).spec


def drawn(spec: ModelSpec, **options: Any) -> Model:
    """A model of ours whose parameters are all drawn."""
    model = build_model(spec, **options)
    perturbed(model)
    return model


OURS = ViTSpec(
    depth=2,
    width=24,
    mlp_width=50,
    heads=3,
    patch_size=(8, 8),
    image_size=(24, 32),
    num_classes=5,
)


@pytest.mark.parametrize(
    "changes",
    [
        {"position": "sincos2d"},
        {"position": "learned-2d"},
        {"position": "learned-2d", "registers": 2, "pool": "gap"},
        {"distillation": "token"},
        {"distillation": "token", "registers": 2},
        {"distillation": "head", "num_classes": 0},
    ],
    ids=str,
)
def test_what_timm_has_in_another_form_is_written_in_that(changes: dict[str, Any]) -> None:
    ours = drawn(dataclasses.replace(OURS, **changes))
    written = timm.write(ours)
    theirs = rebuilt_by_timm(written)
    theirs.load_state_dict(written.tensors)
    again = build(written.tensors, find(timm, written.tensors, written.config))
    x = images(ours)
    with torch.no_grad():
        assert relative(theirs.eval()(x), ours(x)) < 1e-5
        assert relative(again(x), ours(x)) < 1e-5


def test_positions_that_are_zero_are_left_out() -> None:
    ours = drawn(OURS)
    assert timm.write(ours).tensors["pos_embed"].shape == (1, 13, 24)
    with torch.no_grad():
        ours.get_parameter("positions.0.table")[:, 0] = 0
    written = timm.write(ours)
    assert written.tensors["pos_embed"].shape == (1, 12, 24)
    assert written.config["model_args"]["no_embed_class"] is True
    again = build(written.tensors, find(timm, written.tensors, written.config))
    assert again.spec == ours.spec
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": "relative"}, "position relative"),
        ({"position": "rotary"}, "position rotary"),
        ({"position_at": "every"}, "position_at every"),
        ({"pool": "token+gap"}, "pool token.gap"),
        ({"head": "mlp"}, "head mlp"),
        ({"activation": "swiglu", "pool": "map"}, "map with activation swiglu"),
        ({"distillation": "head", "registers": 1}, "distillation head and registers"),
        ({"activation": "swiglu", "distillation": "head"}, "timm names no model"),
        ({"stem": StemSpec(layers=(1, 1)), "image_size": (32, 32)}, "timm names no model"),
        ({"stem": StemSpec(layers=(), width=32)}, "stem.width 32"),
    ],
    ids=str,
)
def test_what_timm_cannot_hold_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PatchwordError, match=message):
        timm.write(build_model(dataclasses.replace(OURS, **({"width": 48} | changes))))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ResNetSpec(layers=(1, 1, 1, 1), num_classes=3), "timm has no BiT of layers"),
        (
            MixerSpec(
                depth=1,
                width=8,
                tokens_mlp_width=4,
                channels_mlp_width=4,
                patch_size=(8, 8),
                image_size=(16, 16),
            ),
            "timm has no Mixer of depth 1",
        ),
    ],
    ids=["bit", "mixer"],
)
def test_what_timm_has_no_name_for_is_refused(spec: ModelSpec, message: str) -> None:
    with pytest.raises(PatchwordError, match=message):
        timm.write(build_model(spec))


def test_another_eps_of_the_norms_is_said(caplog: pytest.LogCaptureFixture) -> None:
    timm.write(build_model(dataclasses.replace(OURS, norm_eps=1e-12)))
    assert "timm's LayerNorm has eps 1e-06, the model 1e-12" in caplog.text


@pytest.mark.parametrize(("eps", "eps_in"), [(1e-5, "std"), (1e-10, "variance")])
def test_another_eps_of_the_filters_gives_the_same_standardised(eps: float, eps_in: Any) -> None:
    scales = torch.logspace(-6, 1, 8, dtype=torch.float64).view(-1, 1, 1, 1)
    weight = (torch.randn(8, 3, 7, 7) + 0.1) * scales
    (written,) = same_filters(eps, eps_in).write([weight])
    expected = standardized(weight, eps, eps_in)
    assert relative(standardized(written, 1e-8, "variance"), expected) < 1e-12


def test_timm_loads_the_directory(tmp_path: Path) -> None:
    preprocess = PreprocessSpec(
        mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear", crop_fraction=0.9
    )
    classes = ("ant", "bee", "cat", "dog", "eel")
    ours = drawn(OURS, preprocess=preprocess, classes=classes).eval()
    written = timm.write(ours)
    (tmp_path / "config.json").write_text(json.dumps(written.config))
    save_file(written.tensors, tmp_path / "model.safetensors")
    theirs = create(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images(ours)
    with torch.no_grad():
        assert relative(theirs(x), ours(x)) < 1e-5
    data = importlib.import_module("timm.data").resolve_model_data_config(theirs)
    assert data["input_size"] == (3, 24, 32)
    assert (*data["mean"], *data["std"]) == (*preprocess.mean, *preprocess.std)
    assert (data["interpolation"], data["crop_pct"]) == ("bilinear", 0.9)
    assert theirs.pretrained_cfg["label_names"] == list(classes)
    found = find(timm, written.tensors, written.config)
    assert (found.spec, found.preprocess, found.classes) == (ours.spec, preprocess, classes)
    assert found.notes == ()


def test_preprocessing_is_that_of_the_configuration() -> None:
    tensors = create(PLAIN, **SMALL).state_dict()
    values = {"crop_mode": "squash", "crop_pct": 0.9, "mean": [0, 0, 0], "std": [1, 1, 1]}
    config = config_of(PLAIN, SMALL) | {"pretrained_cfg": values | {"interpolation": "lanczos"}}
    found = find(timm, tensors, config)
    assert found.preprocess == PreprocessSpec(
        mean=(0, 0, 0), std=(1, 1, 1), resize="stretch", crop_fraction=1.0
    )
    assert any("lanczos" in note for note in found.notes)
    assert any("the middle 0.9 of it" in note for note in found.notes)


def test_without_a_share_the_centre_is_cropped_as_timm_crops_it() -> None:
    values = {"mean": [0, 0, 0], "std": [1, 1, 1]}
    config = config_of(PLAIN, SMALL) | {"pretrained_cfg": values}
    theirs = importlib.import_module("timm.data").resolve_data_config(pretrained_cfg=values)
    found = find(timm, create(PLAIN, **SMALL).state_dict(), config)
    assert found.preprocess.crop_fraction == theirs["crop_pct"] == 0.875


def test_one_channel_has_one_mean() -> None:
    arguments = SMALL | {"in_chans": 1}
    config = config_of(PLAIN, arguments) | {
        "pretrained_cfg": {"mean": [0.2, 0.4, 0.6], "std": [0.5, 0.5, 0.5], "crop_pct": 1.0}
    }
    found = find(timm, create(PLAIN, **arguments).state_dict(), config)
    assert found.preprocess.mean == pytest.approx((0.4,))
    assert found.preprocess.crop_fraction == 1.0


def test_an_image_that_patches_do_not_divide_is_cut_as_timm_cuts_it() -> None:
    arguments = SMALL | {"img_size": 37}
    tensors = create(PLAIN, **arguments).state_dict()
    assert find(timm, tensors, config_of(PLAIN, arguments)).spec.image_size == (32, 32)


def test_features_of_two_tokens_are_said_to_be_one() -> None:
    arguments = SMALL | {"num_classes": 0}
    name = "deit_tiny_distilled_patch16_224"
    found = find(timm, create(name, **arguments).state_dict(), config_of(name, arguments))
    assert found.notes == (
        "features are the class token's, timm's the mean of both tokens'",
        "preprocessing assumed: mean and std 0.5, bicubic, as in most of timm's ViTs",
    )
