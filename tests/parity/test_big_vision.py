"""google-research/big_vision npz against the published equations, and against timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax_reference as reference
import numpy as np
import pytest
import torch
from flax_reference import LINEN, Params, Shapes
from google_checks import (
    build,
    check_gradients,
    check_logits,
    check_same,
    find,
    images,
    logits,
    timm_logits,
)

from patchword.spec.model import PreprocessSpec, ViTSpec
from patchword.spec.parse import PatchwordError
from patchword.weights import mapping
from patchword.weights.google import big_vision, bit_npz, google_npz
from peers import define_torchvision_operators

KERNEL = (4, 4, 3, 24)
ATTENTION = LINEN[1]
TABLE = 1e-6
"""The sin-cos table is rounded to float32, in Google's code too."""


def vit(entries: int | None, **options: Any) -> Shapes:
    positions = None if entries is None else ("pos_embedding", entries)
    return reference.vit_shapes(KERNEL, positions, LINEN, **options)


def map_head(heads: int = 2, hidden: int = 40) -> Shapes:
    shapes = {
        "probe": (1, 1, 24),
        **reference.attention_shapes(ATTENTION, 24, heads),
        **reference.norm_shapes("LayerNorm_0", 24),
        **reference.mlp_shapes("MlpBlock_0", 24, hidden),
    }
    return {f"MAPHead_0/{name}": shape for name, shape in shapes.items()}


MODELS: dict[str, tuple[Shapes, dict[str, Any]]] = {
    "gap, sin-cos, pre-logits": (
        vit(None, token=False, pre_logits=16),
        {"pool": "gap", "position": "sincos2d", "head": "mlp", "head_width": 16},
    ),
    "gap, learned": (vit(9, token=False), {"pool": "gap", "position": "learned-1d"}),
    "token": (vit(9, heads=3), {"pool": "token", "heads": 3}),
    "token, sin-cos": (vit(None), {"pool": "token", "position": "sincos2d"}),
    "map": (vit(9, token=False, classes=0) | map_head(), {"pool": "map", "num_classes": 0}),
    "map, merged": (
        vit(9, token=False, depth=3, heads=3, merged=True) | map_head(3),
        {"pool": "map", "depth": 3, "heads": 3},
    ),
    "token, merged, 1 layer": (vit(9, depth=1, merged=True), {"pool": "token", "depth": 1}),
}


def file(name: str, prefix: str = "params/") -> Params:
    shapes = {f"{prefix}{key}": shape for key, shape in MODELS[name][0].items()}
    return reference.draw(shapes)


def forward(params: Params, x: Any) -> Any:
    return reference.big_vision(reference.under(params, "params/"), x)


@pytest.mark.parametrize("prefix", ["params/", ""])
@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_those_of_the_equations(name: str, prefix: str) -> None:
    params = file(name, prefix)
    others = {f"opt/0/mu/{key}": value for key, value in params.items()}
    found = find(big_vision, params | others, image_size=(12, 12))
    assert isinstance(found.spec, ViTSpec)
    expected = MODELS[name][1]
    assert {key: getattr(found.spec, key) for key in expected} == expected
    x = images(3, 12, 12)
    model = build(params | others, found)
    check_same(mapping.write(model.state_dict(), found.rules), params)
    double = TABLE if found.spec.position == "sincos2d" else 1e-9
    check_logits(model, reference.big_vision(reference.under(params, prefix), x), x, double)


@pytest.mark.parametrize(
    ("name", "names"),
    [
        (
            "map, merged",
            [
                "embedding/kernel",
                "pos_embedding",
                f"Transformer/encoderblock/{ATTENTION}/key/kernel",
                f"Transformer/encoderblock/{ATTENTION}/out/kernel",
                "Transformer/encoderblock/MlpBlock_0/Dense_1/bias",
                "MAPHead_0/probe",
                *(f"MAPHead_0/{ATTENTION}/{part}/kernel" for part in ("query", "value", "out")),
                "MAPHead_0/LayerNorm_0/scale",
            ],
        ),
        ("token", ["cls", "pos_embedding", f"Transformer/encoderblock_1/{ATTENTION}/query/bias"]),
        ("gap, sin-cos, pre-logits", ["embedding/bias", "pre_logits/kernel"]),
    ],
)
def test_gradients_are_those_of_the_equations(name: str, names: list[str]) -> None:
    params = file(name)
    found = find(big_vision, params, image_size=(12, 12))
    model = build(params, found).double()
    names = [f"params/{each}" for each in names]
    check_gradients(model, found, forward, params, names, images(2, 12, 12))


def test_without_positions_the_image_size_is_assumed_and_said() -> None:
    params = file("gap, sin-cos, pre-logits")
    found = find(big_vision, params)
    assert found.spec.image_size == (224, 224)
    assert "image_size" in found.notes[0]
    found = find(big_vision, params, image_size=(8, 20))
    assert not found.notes
    x = images(2, 8, 20)
    check_logits(build(params, found), forward(params, x), x, TABLE)


def test_the_image_tower_of_two_is_read() -> None:
    tower = file("map", "params/img/")
    params = tower | {
        "params/txt/Encoder_0/encoderblock_0/LayerNorm_0/bias": np.zeros(4),
        f"params/txt/Encoder_0/encoderblock_0/{ATTENTION}/query/kernel": np.zeros((4, 2, 2)),
        "params/t": np.zeros(1),
        "params/b": np.zeros(1),
    }
    x = images(2, 12, 12)
    found = find(big_vision, params)
    assert found.preprocess.resize == "stretch"
    expected = reference.big_vision(reference.under(tower, "params/img/"), x)
    check_logits(build(params, found), expected, x)


def test_images_are_cropped_at_the_centre() -> None:
    assert find(big_vision, file("token")).preprocess == PreprocessSpec(
        mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", resize="short"
    )


@pytest.mark.parametrize("name", ["gap, learned", "map"])
def test_timm_reads_it_alike(tmp_path: Path, name: str) -> None:
    define_torchvision_operators()
    from timm.models import VisionTransformer

    params, pooled = file(name), name == "map"
    peer = VisionTransformer(
        img_size=12,
        patch_size=4,
        num_classes=0 if pooled else 5,
        embed_dim=24,
        depth=2,
        num_heads=2,
        mlp_ratio=40 / 24,
        act_layer=lambda: torch.nn.GELU(approximate="tanh"),
        global_pool="map" if pooled else "avg",
        class_token=False,
        fc_norm=False,
    )
    x = images(2, 12, 12)
    expected = timm_logits(peer, params, tmp_path / "vit.npz", x)
    ours = logits(build(params, find(big_vision, params)), x)
    assert reference.relative(ours, expected) < 1e-5


def test_only_this_format_recognises_its_files() -> None:
    for name in MODELS:
        for prefix in ("", "params/"):
            shapes = {key: value.shape for key, value in file(name, prefix).items()}
            assert big_vision.recognises(shapes, {})
            assert not google_npz.recognises(shapes, {})
            assert not bit_npz.recognises(shapes, {})


def test_missing_unexpected_and_misshapen_tensors_are_named() -> None:
    whole = file("map, merged")
    name = f"params/Transformer/encoderblock/{ATTENTION}/query/bias"
    missing = {key: value for key, value in whole.items() if key != name}
    with pytest.raises(PatchwordError, match=f"{name} is missing"):
        build(missing, find(big_vision, missing))
    more = whole | {"params/Transformer/encoderblock_0/x": np.zeros(3)}
    with pytest.raises(PatchwordError, match="encoderblock_0/x is unexpected"):
        build(more, find(big_vision, more))
    for shape in ((2, 3, 8), (4, 3, 8), (3, 4, 6), (3,)):
        bent = whole | {name: np.zeros(shape)}
        with pytest.raises(PatchwordError, match=f"{name} is "):
            build(bent, find(big_vision, bent))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("token", {"embedding/kernel": None}, "embedding/kernel is missing"),
        ("token", {"pos_embedding": (1, 8, 24)}, "no square image"),
        ("gap, sin-cos, pre-logits", {"pre_logits/kernel": (7, 24)}, "pre_logits/kernel is"),
        (
            "map, merged",
            {f"Transformer/encoderblock/{ATTENTION}/query/kernel": (10**6, 24, 3, 8)},
            "1000000 encoder blocks",
        ),
        (
            "map, merged",
            {f"Transformer/encoderblock/{ATTENTION}/query/kernel": (0, 24, 3, 8)},
            "0 encoder blocks",
        ),
    ],
)
def test_a_file_that_tells_no_architecture_is_refused(name: str, change: Any, message: str) -> None:
    shapes = MODELS[name][0] | change
    shapes = {key: shape for key, shape in shapes.items() if shape is not None}
    with pytest.raises(PatchwordError, match=message):
        big_vision.find(shapes, {}, {})
