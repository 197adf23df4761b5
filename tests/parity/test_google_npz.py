"""google-research/vision_transformer npz against the published equations, and against timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax_reference as reference
import numpy as np
import pytest
import torch
from flax_reference import GOOGLE, LINEN, Params, Shapes
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

from patchword.models.zoo import build_model
from patchword.spec.model import MixerSpec, PreprocessSpec, ResNetSpec, StemSpec, ViTSpec
from patchword.spec.parse import PatchwordError
from patchword.weights import mapping
from patchword.weights.google import big_vision, bit_npz, google_npz
from peers import define_torchvision_operators

POSITIONS = "Transformer/posembed_input/pos_embedding"


def vit(kernel: tuple[int, int, int, int], entries: int, **options: Any) -> Shapes:
    return reference.vit_shapes(kernel, (POSITIONS, entries), GOOGLE, **options)


VITS: dict[str, tuple[Shapes, tuple[int, int], dict[str, Any]]] = {
    "token": (vit((4, 4, 3, 24), 10), (12, 12), {"heads": 2, "pool": "token"}),
    "pre-logits, 3 heads": (
        vit((4, 4, 3, 24), 5, heads=3, pre_logits=24, depth=3),
        (8, 8),
        {"heads": 3, "head": "mlp", "depth": 3},
    ),
    "narrow pre-logits": (
        vit((4, 4, 3, 24), 5, pre_logits=10),
        (8, 8),
        {"head": "mlp", "head_width": 10},
    ),
    "gap, 1 channel": (
        vit((4, 4, 1, 16), 4, token=False, hidden=24),
        (8, 8),
        {"pool": "gap", "in_channels": 1, "mlp_width": 24},
    ),
    "no head": (vit((4, 4, 3, 24), 5, classes=0), (8, 8), {"num_classes": 0}),
    "oblong patch": (vit((2, 6, 3, 24), 5), (4, 12), {"patch_size": (2, 6)}),
}
HYBRIDS: dict[str, tuple[Shapes, tuple[int, int], int]] = {
    "root alone": (vit((2, 2, 32, 16), 17) | reference.stem_shapes(()), (32, 32), 8),
    "three stages": (
        vit((1, 1, 512, 16), 5) | reference.stem_shapes((1, 2, 1)),
        (32, 32),
        16,
    ),
    "four stages": (
        vit((1, 1, 1024, 16), 2) | reference.stem_shapes((1, 1, 1, 1)),
        (32, 32),
        32,
    ),
}
MIXER = reference.mixer_shapes((4, 4, 3, 24), 9, 10, 20)


@pytest.mark.parametrize("name", VITS)
def test_a_vit_gives_the_logits_of_the_equations(name: str) -> None:
    shapes, size, expected = VITS[name]
    params = reference.draw(shapes)
    found = find(google_npz, params)
    assert isinstance(found.spec, ViTSpec)
    assert found.spec.image_size == size
    assert {key: getattr(found.spec, key) for key in expected} == expected
    x = images(3, *size, found.spec.in_channels)
    model = build(params, found)
    check_same(google_npz.write(model).tensors, params)
    check_logits(model, reference.vision_transformer(params, x), x)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_gives_the_logits_of_the_equations(name: str) -> None:
    shapes, size, patch = HYBRIDS[name]
    params = reference.draw(shapes)
    found = find(google_npz, params)
    assert isinstance(found.spec, ViTSpec)
    assert found.spec.patch_size == (patch, patch)
    assert found.spec.image_size == size
    x = images(2, *size)
    model = build(params, found)
    check_same(google_npz.write(model).tensors, params)
    check_logits(model, reference.vision_transformer(params, x), x)


LINEN_FILES: dict[str, tuple[Shapes, int]] = {
    "vit": (reference.vit_shapes((4, 4, 3, 24), (POSITIONS, 10), LINEN), 12),
    "gap, wide pre-logits": (
        reference.vit_shapes((4, 4, 3, 24), (POSITIONS, 9), LINEN, token=False, pre_logits=30),
        12,
    ),
    "hybrid": (
        reference.vit_shapes((1, 1, 512, 16), (POSITIONS, 5), LINEN)
        | {n: s[-1:] if "gn" in n else s for n, s in reference.stem_shapes((1, 2, 1)).items()},
        32,
    ),
}


@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/"])
@pytest.mark.parametrize("name", LINEN_FILES)
def test_the_names_of_the_current_code_give_the_logits_of_the_equations(
    name: str, prefix: str
) -> None:
    """Flax's linen numbers each kind of layer; the published files number all of them together."""
    shapes, side = LINEN_FILES[name]
    params = reference.draw(shapes)
    file = {prefix + key: value for key, value in params.items()}
    assert not big_vision.recognises({key: value.shape for key, value in file.items()}, {})
    model = build(file, find(google_npz, file))
    written = google_npz.write(model).tensors
    for ours, theirs in zip(GOOGLE[1:], LINEN[1:], strict=True):
        written = {key.replace(f"/{ours}/", f"/{theirs}/"): v for key, v in written.items()}
    check_same({key: v.reshape(params[key].shape) for key, v in written.items()}, params)
    x = images(2, side, side)
    check_logits(model, reference.vision_transformer(params, x), x)


def test_a_mixer_gives_the_logits_of_the_equations() -> None:
    params = reference.draw(MIXER)
    found = find(google_npz, params)
    assert isinstance(found.spec, MixerSpec)
    x = images(3, 12, 12)
    model = build(params, found)
    check_same(google_npz.write(model).tensors, params)
    check_logits(model, reference.mixer(params, x), x)


@pytest.mark.parametrize(
    ("shapes", "size", "names"),
    [
        (
            VITS["pre-logits, 3 heads"][0],
            8,
            [
                "embedding/kernel",
                "cls",
                POSITIONS,
                *(
                    f"Transformer/encoderblock_0/{GOOGLE[1]}/{part}/kernel"
                    for part in ("query", "out")
                ),
                f"Transformer/encoderblock_1/{GOOGLE[1]}/value/bias",
                "Transformer/encoderblock_2/MlpBlock_3/Dense_0/kernel",
                "pre_logits/kernel",
                "head/bias",
            ],
        ),
        (
            HYBRIDS["three stages"][0],
            32,
            [
                "conv_root/kernel",
                "gn_root/bias",
                "block2/unit1/conv_proj/kernel",
                "block2/unit2/conv2/kernel",
                "block3/unit1/gn3/scale",
            ],
        ),
        (
            MIXER,
            12,
            [
                "stem/kernel",
                "MixerBlock_0/token_mixing/Dense_0/kernel",
                "MixerBlock_1/channel_mixing/Dense_1/kernel",
                "pre_head_layer_norm/scale",
            ],
        ),
    ],
    ids=["vit", "hybrid", "mixer"],
)
def test_gradients_are_those_of_the_equations(shapes: Shapes, size: int, names: list[str]) -> None:
    params = reference.draw(shapes)
    found = find(google_npz, params)
    forward = reference.mixer if "stem/kernel" in params else reference.vision_transformer
    model = build(params, found).double()
    check_gradients(model, found, forward, params, names, images(2, size, size))


def test_images_are_stretched_to_the_size_and_scaled_from_minus_one_to_one() -> None:
    found = find(google_npz, reference.draw(VITS["token"][0]))
    assert found.preprocess == PreprocessSpec(
        mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", resize="stretch"
    )


def test_a_user_says_what_no_tensor_tells() -> None:
    params = reference.draw(vit((4, 4, 3, 24), 7))
    with pytest.raises(PatchwordError, match="image_size"):
        find(google_npz, params)
    found = find(google_npz, params, image_size=(8, 12), activation="gelu")
    assert isinstance(found.spec, ViTSpec)
    assert (found.spec.image_size, found.spec.activation) == ((8, 12), "gelu")
    build(params, found)


def test_a_size_that_does_not_fit_the_table_is_left_to_resampling() -> None:
    params = reference.draw(VITS["token"][0])
    assert find(google_npz, params, image_size=(24, 24)).spec.image_size == (12, 12)


def test_a_training_state_is_read_without_the_optimizer() -> None:
    plain = reference.draw(VITS["token"][0])
    params = {f"opt/target/{name}": value for name, value in plain.items()}
    params |= {f"opt/state/param_states/{name}/momentum": value for name, value in plain.items()}
    model = build(params, find(google_npz, params))
    check_same(google_npz.write(model).tensors, plain)


def test_pre_logits_without_a_head_are_left_out() -> None:
    plain = reference.draw(VITS["no head"][0])
    params = plain | reference.draw(reference.dense_shapes("pre_logits", 24, 24))
    check_same(google_npz.write(build(params, find(google_npz, params))).tensors, plain)


def test_group_norms_of_newer_flax_are_read() -> None:
    published = reference.draw(HYBRIDS["three stages"][0])
    params = {n: v.reshape(-1) if "gn" in n else v for n, v in published.items()}
    check_same(google_npz.write(build(params, find(google_npz, params))).tensors, published)


def test_only_this_format_recognises_its_files() -> None:
    for shapes in (VITS["token"][0], HYBRIDS["root alone"][0], MIXER):
        assert google_npz.recognises(shapes, {})
        assert not big_vision.recognises(shapes, {})
        assert not bit_npz.recognises(shapes, {})


# Against timm -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timm_models() -> Any:
    define_torchvision_operators()
    import timm.models

    return timm.models


@pytest.mark.parametrize("name", ["token", "gap"])
def test_timm_reads_a_vit_alike(timm_models: Any, tmp_path: Path, name: str) -> None:
    token = name == "token"
    params = reference.draw(vit((4, 4, 3, 24), 9 + token, token=token))
    peer = timm_models.VisionTransformer(
        img_size=12,
        patch_size=4,
        num_classes=5,
        embed_dim=24,
        depth=2,
        num_heads=2,
        mlp_ratio=40 / 24,
        act_layer=lambda: torch.nn.GELU(approximate="tanh"),
        global_pool="token" if token else "avg",
        class_token=token,
        fc_norm=False,
    )
    x = images(3, 12, 12)
    model = build(params, find(google_npz, params))
    expected = timm_logits(peer, google_written(model), tmp_path / "vit.npz", x)
    assert reference.relative(logits(model, x), expected) < 1e-5


def google_written(model: Any) -> Params:
    return {n: t.double().numpy() for n, t in google_npz.write(model).tensors.items()}


@pytest.mark.parametrize("layers", [(), (1, 2, 1)])
def test_timm_reads_a_hybrid_alike(
    timm_models: Any, tmp_path: Path, layers: tuple[int, ...]
) -> None:
    from timm.layers import HybridEmbed
    from timm.models.vision_transformer_hybrid import _resnetv2

    channels, patch, entries = (1024, 1, 5) if layers else (64, 4, 5)
    params = reference.draw(
        vit((patch, patch, channels, 24), entries) | reference.stem_shapes(layers, 64)
    )
    backbone = _resnetv2(layers)
    for module in backbone.modules():  # timm's own values, 1e-5 and 1e-8, are not Google's
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = 1e-6
    peer = timm_models.VisionTransformer(
        img_size=32,
        patch_size=patch,
        num_classes=5,
        embed_dim=24,
        depth=2,
        num_heads=2,
        mlp_ratio=40 / 24,
        act_layer=lambda: torch.nn.GELU(approximate="tanh"),
        embed_layer=lambda **options: HybridEmbed(backbone, **options),
    )
    x = images(2, 32, 32)
    model = build(params, find(google_npz, params))
    expected = timm_logits(peer, google_written(model), tmp_path / "hybrid.npz", x)
    # Google's code adds 1e-5 to the standard deviation, timm 1e-8 to the variance.
    assert reference.relative(logits(model, x), expected) < 1e-4


# Errors -------------------------------------------------------------------------------------------


def test_missing_unexpected_and_misshapen_tensors_are_named() -> None:
    whole = reference.draw(VITS["token"][0])
    attention = f"Transformer/encoderblock_1/{GOOGLE[1]}"
    missing = {n: v for n, v in whole.items() if n != f"{attention}/key/bias"}
    with pytest.raises(PatchwordError, match=rf"{attention}/key/bias is missing"):
        build(missing, find(google_npz, missing))
    more = whole | {"Transformer/other": np.zeros(3)}
    with pytest.raises(PatchwordError, match="Transformer/other is unexpected"):
        build(more, find(google_npz, more))
    bent = whole | {f"{attention}/query/kernel": np.zeros((24, 3, 8))}
    with pytest.raises(PatchwordError, match=rf"{attention}/query/kernel is \[24, 3, 8\]"):
        build(bent, find(google_npz, bent))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding/kernel": None}, "embedding/kernel is missing"),
        ({"embedding/kernel": (24, 48)}, r"embedding/kernel is \[24, 48\]"),
        ({POSITIONS: None}, "pos_embedding is missing"),
        ({POSITIONS: (1, 8, 24)}, "no square image"),
        ({f"Transformer/encoderblock_0/{GOOGLE[1]}/query/kernel": None}, "query/kernel is missing"),
        ({"Transformer/encoderblock_99999999999/x": (1,)}, "larger than there are tensors"),
        ({"pre_logits/kernel": (7, 24)}, "pre_logits/kernel is"),
        ({"head/kernel": (24,)}, "head/kernel is"),
        ({f"Transformer/encoderblock_0/{GOOGLE[1]}/query/kernel": (24, 0, 12)}, "heads"),
    ],
)
def test_a_file_that_tells_no_architecture_is_refused(change: Any, message: str) -> None:
    shapes = VITS["token"][0] | change
    shapes = {name: shape for name, shape in shapes.items() if shape is not None}
    with pytest.raises(PatchwordError, match=message):
        google_npz.find(shapes, {}, {})


SMALL = {"image_size": (8, 8), "depth": 1, "width": 32, "mlp_width": 32, "heads": 2}


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "gelu"},
        {"norm_eps": 1e-5},
        {"pool": "map"},
        {"pool": "gap", "pool_norm": True},
        {"position": "sincos2d"},
        {"registers": 1},
        {"layer_scale": 0.1},
        {"stem": StemSpec(layers=(), width=32, weight_eps=1e-8)},
    ],
    ids=str,
)
def test_what_the_format_cannot_mean_is_not_written(changes: dict[str, Any]) -> None:
    spec = ViTSpec(**({**SMALL, "patch_size": (4, 4), "activation": "gelu_tanh"} | changes))
    name = list(changes)[-1] if "stem" not in changes else "weight_eps"
    with pytest.raises(PatchwordError, match=name):
        google_npz.write(build_model(spec))


def test_a_bit_resnet_is_not_written() -> None:
    with torch.device("meta"):
        model = build_model(ResNetSpec(layers=(1, 1, 1, 1)))
    with pytest.raises(PatchwordError, match="no place for a ResNet"):
        google_npz.write(model)


def test_what_is_written_is_found_again() -> None:
    spec = ViTSpec(**SMALL, patch_size=(4, 4), activation="gelu_tanh", pool="gap", num_classes=3)
    model = build_model(spec)
    tensors = google_npz.write(model).tensors
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    found = google_npz.find(shapes, {}, {})
    assert found.spec == spec
    ours = mapping.read(tensors.__getitem__, shapes, found, "model.npz")
    assert ours.keys() == model.state_dict().keys()
    assert all(torch.equal(value, ours[name]) for name, value in model.state_dict().items())
