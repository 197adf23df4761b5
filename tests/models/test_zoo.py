"""The named variants: exact sizes, names, options, errors."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from patchword import UsageError, create_model, list_models
from patchword.models.vit import ViT
from patchword.models.zoo import (
    SHAPES,
    enlarged,
    macs,
    model_cost,
    model_spec,
    spec_from_dict,
    spec_to_dict,
    variant_name,
)
from patchword.spec.model import ViTSpec

# Parameters at 224 px, 1000 classes, linear head. Those of Ti/16, S/16, B/16, B/32, L/16 and H/14
# are the ones that other libraries have too.
PARAMETERS = {
    "ViT-mu/8": 77_096,
    "ViT-mu/14": 72_872,
    "ViT-mu/16": 76_712,
    "ViT-mu/32": 145_736,
    "ViT-Ti/8": 5_719_720,
    "ViT-Ti/14": 5_694_376,
    "ViT-Ti/16": 5_717_416,
    "ViT-Ti/32": 6_131_560,
    "ViT-S/8": 22_055_272,
    "ViT-S/14": 22_004_584,
    "ViT-S/16": 22_050_664,
    "ViT-S/32": 22_878_952,
    "ViT-b/8": 22_055_272,
    "ViT-b/14": 22_004_584,
    "ViT-b/16": 22_050_664,
    "ViT-b/32": 22_878_952,
    "ViT-B/8": 86_576_872,
    "ViT-B/14": 86_475_496,
    "ViT-B/16": 86_567_656,
    "ViT-B/32": 88_224_232,
    "ViT-L/8": 304_338_920,
    "ViT-L/14": 304_203_752,
    "ViT-L/16": 304_326_632,
    "ViT-L/32": 306_535_400,
    "ViT-H/8": 632_214_760,
    "ViT-H/14": 632_045_800,
    "ViT-H/16": 632_199_400,
    "ViT-H/32": 634_960_360,
    "ViT-So400m/8": 413_749_720,
    "ViT-So400m/14": 413_597_656,
    "ViT-So400m/16": 413_735_896,
    "ViT-So400m/32": 416_220_760,
    "ViT-g/8": 1_012_797_288,
    "ViT-g/14": 1_012_611_432,
    "ViT-g/16": 1_012_780_392,
    "ViT-g/32": 1_015_817_448,
    "ViT-G/8": 1_844_660_328,
    "ViT-G/14": 1_844_440_680,
    "ViT-G/16": 1_844_640_360,
    "ViT-G/32": 1_848_229_608,
}


def vit(name: str, *sizes: Any, **options: Any) -> ViT:
    """`create_model`, known to be a ViT."""
    model = create_model(name, *sizes, **options)
    assert isinstance(model, ViT)
    return model


def closed_formula(name: str) -> int:
    """The same count from table 1 alone."""
    variant, patch = name.removeprefix("ViT-").split("/")
    shape, p = SHAPES[variant], int(patch)
    d, m = shape.width, shape.mlp_width
    tokens = (224 // p) ** 2 + 1
    embedding = 3 * p * p * d + d + d + tokens * d  # E and its bias, class token, positions
    attention = d * 3 * d + 3 * d + d * d + d
    block = attention + (d * m + m) + (m * d + d) + 2 * 2 * d
    return embedding + shape.depth * block + 2 * d + d * 1000 + 1000


def test_no_variant_is_missing():
    assert list(PARAMETERS) == [name for name in list_models() if name.startswith("ViT-")]
    assert {name.split("/")[0] for name in PARAMETERS} == {f"ViT-{name}" for name in SHAPES}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_exact(name: str):
    parameters, _ = model_cost(model_spec(name))
    assert parameters == PARAMETERS[name] == closed_formula(name)


def test_table_1():
    rows = {name: (s.depth, s.width, s.mlp_width, s.heads) for name, s in SHAPES.items()}
    assert rows == {
        "mu": (1, 32, 128, 2),
        "Ti": (12, 192, 768, 3),
        "S": (12, 384, 1536, 6),
        "b": (12, 384, 1536, 12),
        "B": (12, 768, 3072, 12),
        "L": (24, 1024, 4096, 16),
        "H": (32, 1280, 5120, 16),
        "So400m": (27, 1152, 4304, 16),
        "g": (40, 1408, 6144, 16),
        "G": (48, 1664, 8192, 16),
    }


def test_signature_is_the_documented_one():
    parameters = inspect.signature(create_model).parameters
    assert list(parameters)[:4] == ["name", "num_classes", "image_size", "in_channels"]
    defaults = {name: p.default for name, p in parameters.items()}
    assert defaults["num_classes"] == 1000
    assert defaults["image_size"] == 224
    assert defaults["in_channels"] == 3
    assert list(parameters.values())[-1].kind is inspect.Parameter.VAR_KEYWORD


def test_positional_use():
    model = create_model("ViT-mu/8", 10, 32, 1)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("ViT-B16", "ViT-B/16"),
        ("vit-b/16", "ViT-B/16"),
        ("ViT-X/16", "ViT-"),
        ("ViT-T/16", "ViT-Ti/16"),
        ("ViT-ti/16", "ViT-Ti/16"),
        ("ViT-B/0", "ViT-B/"),
        ("ViT-B/16x", "ViT-B/16"),
        ("", "ViT-"),
    ],
)
def test_unknown_names_suggest_the_nearest(name: str, suggestion: str):
    with pytest.raises(UsageError) as raised:
        create_model(name)
    assert suggestion in str(raised.value)
    assert "\n" not in str(raised.value)


def test_names_are_case_sensitive():
    for name, width in (("b/32", 384), ("B/32", 768), ("g/14", 1408), ("G/14", 1664)):
        spec = model_spec(f"ViT-{name}")
        assert isinstance(spec, ViTSpec)
        assert spec.width == width
    for name in ("ViT-s/16", "ViT-TI/16", "VIT-B/16", "ViT-h/14", "ViT-MU/16"):
        with pytest.raises(UsageError, match="unknown model"):
            create_model(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clases": 10}, "did you mean num_classes"),
        ({"drop_pth": 0.1}, "did you mean drop_path"),
        ({"pool": "gpa"}, "did you mean gap"),
        ({"pool": "GAP"}, "did you mean gap"),
        ({"position": "sincos"}, "did you mean sincos2d"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": "0.1"}, "dropout must be float"),
        ({"depth": 0}, "depth is 0"),
        ({"depth": 2.0}, "depth must be int"),
        ({"heads": 5}, "width 32 is not a multiple of heads 5"),
        ({"qk_norm": 1}, "qk_norm must be bool"),
        ({"image_size": 30}, "image height 30 is not a multiple of the patch height 8; use 32"),
        ({"image_size": (32, 33)}, "image width 33 is not a multiple of the patch width 8; use 32"),
        ({"image_size": (32, 32, 32)}, "image_size"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"patch_size": 5}, "patch height 5"),
        ({"registers": -2}, "registers is -2"),
        ({"width": 30, "position": "sincos2d"}, "sincos2d"),
        ({"norm_eps": -1.0}, "norm_eps"),
        ({"layer_scale": float("nan")}, "layer_scale"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str):
    values: dict[str, Any] = {"image_size": 32} | options
    with pytest.raises(UsageError) as raised:
        create_model("ViT-mu/8", **values)
    assert message in str(raised.value)


def test_rectangles_and_patch_sizes():
    model = vit("ViT-mu/8", 5, (16, 40), 2)
    assert model.spec.grid == (2, 5)
    assert model(torch.zeros(1, 2, 16, 40)).shape == (1, 5)
    assert vit("ViT-mu/8", 5, 24, patch_size=4).spec.patch_size == (4, 4)
    flat = vit("ViT-mu/8", 5, (12, 20), patch_size=(3, 10))
    assert flat.spec.grid == (4, 2)
    assert flat(torch.zeros(1, 3, 12, 20)).shape == (1, 5)
    assert vit("ViT-mu/5", 5, 20).spec.grid == (4, 4)  # not a listed patch size


def test_no_classes_gives_features():
    model = create_model("ViT-mu/8", 0, 16, head="mlp")
    assert model.head is None
    assert model.pre_logits is None
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model.eval()(images), model.features(images).pooled)


def test_options_reach_the_spec():
    options: dict[str, Any] = {
        "pool": "gap",
        "head": "mlp",
        "position": "sincos2d",
        "dropout": 0.1,
        "drop_path": 0.2,
        "layer_scale": 1e-4,
        "registers": 4,
        "qk_norm": True,
        "depth": 3,
        "width": 48,
        "mlp_width": 60,
        "heads": 4,
        "norm_eps": 1e-5,
        "probability": "sigmoid",
    }
    spec = create_model("ViT-mu/8", 5, 16, **options).spec
    assert {name: getattr(spec, name) for name in options} == options
    assert vit("ViT-mu/8", image_size=16, dropout=0).spec.dropout == 0


def test_cost_allocates_nothing():
    """G/14 would take 7 GB."""
    parameters, macs = model_cost(model_spec("ViT-G/14"))
    assert parameters > 1.8e9
    assert macs > 4e11


def test_variant_names_come_back():
    for name in list_models():
        assert variant_name(model_spec(name, image_size=224 if "/14" in name else 32)) == name
    assert variant_name(model_spec("ViT-Ti/4", depth=6, image_size=32)) == "ViT-6x192/4"
    assert variant_name(model_spec("ViT-S/4", patch_size=(4, 8), image_size=32)) == "ViT-S/4x8"


@pytest.mark.parametrize(
    ("name", "size", "times", "larger"),
    [
        ("ViT-B/16", 224, 1.29, (288, 288)),
        ("ViT-H/14", 224, 1.29, (294, 294)),
        ("ViT-B/32", 224, 1.29, (288, 288)),
        ("ViT-B/16", (160, 320), 1.5, (240, 480)),
        ("ViT-B/16", 224, 1.03, (224, 224)),
        ("ViT-B/32", 32, 1.29, (32, 32)),
        ("R26+ViT-S/32", 224, 1.29, (288, 288)),
        ("BiT-R50x1", 224, 1.29, (288, 288)),
        ("Mixer-B/16", 224, 1.29, (224, 224)),
    ],
)
def test_enlarged_sizes_hold_whole_patches(
    name: str, size: int | tuple[int, int], times: float, larger: tuple[int, int]
):
    assert enlarged(model_spec(name, image_size=size), times) == larger


def test_a_hidden_layer_of_the_head_has_any_width() -> None:
    spec = model_spec("ViT-mu/8", head="mlp", head_width=7, num_classes=3)
    model = create_model("ViT-mu/8", 3, head="mlp", head_width=7)
    assert model.state_dict()["pre_logits.weight"].shape[0] == 7
    assert model.state_dict()["head.weight"].shape == (3, 7)
    assert spec_from_dict(spec_to_dict(spec)) == spec
    assert macs(spec) < macs(model_spec("ViT-mu/8", head="mlp", num_classes=3))
    for options in ({"head_width": 7}, {"head": "mlp", "head_width": 0}):
        with pytest.raises(UsageError, match="head_width"):
            model_spec("ViT-mu/8", **options)


@pytest.mark.parametrize("options", [{}, {"head": "mlp"}])
def test_what_is_stored_of_other_specs_is_what_it_was(options: dict[str, Any]) -> None:
    """Old versions read it, and caches and checksums stay valid."""
    stored = spec_to_dict(model_spec("ViT-mu/8", **options))
    assert "head_width" not in stored
    assert spec_from_dict(stored) == model_spec("ViT-mu/8", **options)
