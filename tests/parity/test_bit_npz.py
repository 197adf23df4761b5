"""google-research/big_transfer npz against the published equations, and against timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax_reference as reference
import numpy as np
import pytest
from flax_reference import Params
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

from patchword.spec.model import PreprocessSpec, ResNetSpec
from patchword.spec.parse import PatchwordError
from patchword.weights import mapping
from patchword.weights.google import big_vision, bit_npz, google_npz
from peers import define_torchvision_operators

CONV = "standardized_conv2d/kernel"


@pytest.fixture(scope="module")
def params() -> Params:
    return reference.draw(reference.bit_shapes((1, 2, 1, 1)))


@pytest.mark.parametrize("size", [(64, 64), (47, 33)])
def test_the_logits_are_those_of_the_equations(params: Params, size: tuple[int, int]) -> None:
    found = find(bit_npz, params)
    x = images(2, *size)
    check_logits(build(params, found), reference.bit(params, x), x)


def test_what_the_tensors_tell(params: Params) -> None:
    found = find(bit_npz, params, image_size=(480, 384))
    assert found.spec == ResNetSpec(image_size=(480, 384), num_classes=5, layers=(1, 2, 1, 1))
    assert not found.notes
    assert found.preprocess == PreprocessSpec(
        mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", resize="stretch"
    )
    assert find(bit_npz, params).spec.image_size == (224, 224)
    assert "image_size" in find(bit_npz, params).notes[0]


@pytest.mark.parametrize(
    ("layers", "factor"),
    [((3, 4, 6, 3), 1), ((3, 4, 23, 3), 3), ((3, 8, 36, 3), 2), ((3, 8, 36, 3), 4)],
)
def test_the_published_variants_are_found(layers: tuple[int, int, int, int], factor: int) -> None:
    found = bit_npz.find(reference.bit_shapes(layers, factor, 21843), {}, {})
    assert found.spec == ResNetSpec(layers=layers, width_factor=factor, num_classes=21843)
    theirs = {name for r in found.rules for name in r.theirs}
    assert theirs == reference.bit_shapes(layers, factor, 21843).keys()


def test_gradients_are_those_of_the_equations(params: Params) -> None:
    found = find(bit_npz, params)
    names = [
        f"resnet/root_block/{CONV}",
        "resnet/block1/unit01/a/group_norm/gamma",
        f"resnet/block2/unit01/a/proj/{CONV}",
        f"resnet/block2/unit02/b/{CONV}",
        "resnet/group_norm/beta",
        "resnet/head/conv2d/kernel",
    ]
    model = build(params, found).double()
    check_gradients(model, found, reference.bit, params, names, images(1, 33, 32))


def test_the_rules_lead_back_to_the_file(params: Params) -> None:
    found = find(bit_npz, params)
    check_same(mapping.write(build(params, found).state_dict(), found.rules), params)


def test_numbered_layers_and_a_missing_head_are_read(params: Params) -> None:
    plain = {name: value for name, value in params.items() if "head" not in name}
    numbered = {
        name.replace("b/standardized_conv2d/", "b/standardized_conv2d_13/"): value
        for name, value in plain.items()
    }
    assert numbered.keys() != plain.keys()
    x = images(2, 32, 32)
    found = find(bit_npz, numbered | {"global_step": np.zeros(())})
    assert found.spec.num_classes == 0
    check_logits(build(numbered, found), reference.bit(plain, x), x)


def test_timm_reads_it_alike(params: Params, tmp_path: Path) -> None:
    define_torchvision_operators()
    from timm.layers import StdConv2d
    from timm.models import ResNetV2

    peer = ResNetV2(
        layers=[1, 2, 1, 1],
        num_classes=5,
        stem_type="fixed",
        conv_layer=lambda *sizes, **options: StdConv2d(*sizes, **{"eps": 1e-10, **options}),
    )
    x = images(2, 64, 64)
    expected = timm_logits(peer, params, tmp_path / "bit.npz", x)
    assert reference.relative(logits(build(params, find(bit_npz, params)), x), expected) < 1e-5


def test_only_this_format_recognises_its_files(params: Params) -> None:
    shapes = {name: value.shape for name, value in params.items()}
    assert bit_npz.recognises(shapes, {})
    assert not google_npz.recognises(shapes, {})
    assert not big_vision.recognises(shapes, {})


def test_missing_unexpected_and_misshapen_tensors_are_named(params: Params) -> None:
    missing = {n: v for n, v in params.items() if n != f"resnet/block2/unit02/c/{CONV}"}
    with pytest.raises(PatchwordError, match=rf"block2/unit02/c/{CONV} is missing"):
        build(missing, find(bit_npz, missing))
    more = params | {"resnet/block2/other": np.zeros(3)}
    with pytest.raises(PatchwordError, match="resnet/block2/other is unexpected"):
        build(more, find(bit_npz, more))
    bent = params | {f"resnet/block2/unit02/c/{CONV}": np.zeros((3, 3))}
    with pytest.raises(PatchwordError, match=rf"unit02/c/{CONV} is \[3, 3\]"):
        build(bent, find(bit_npz, bent))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"resnet/root_block/{CONV}": (7, 7, 3, 65)}, "65 channels"),
        ({f"resnet/root_block/{CONV}": (7, 7, 64)}, "not of 4 axes"),
        ({"resnet/head/conv2d/kernel": (2048, 5)}, "not of 4 axes"),
        ({"resnet/block3/unit99999999999/a/x": (1,)}, "larger than there are tensors"),
    ],
)
def test_a_file_that_tells_no_architecture_is_refused(change: Any, message: str) -> None:
    with pytest.raises(PatchwordError, match=message):
        bit_npz.find(reference.bit_shapes((1, 2, 1, 1)) | change, {}, {})


def test_a_resnet_of_three_stages_is_refused() -> None:
    with pytest.raises(PatchwordError, match="layers"):
        bit_npz.find(reference.bit_shapes((1, 2, 1)), {}, {})
