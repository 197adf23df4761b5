"""The MLP-Mixer against its equations written in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from patchword.models.mixer import Mixer
from patchword.models.zoo import (
    MIXERS,
    create_model,
    macs,
    model_cost,
    model_spec,
    resized,
    variant_name,
)
from patchword.spec.model import MixerSpec
from patchword.spec.parse import PatchwordError, UsageError

Array = NDArray[np.float64]

PARAMETERS = {  # at 224 px and 1000 classes, as timm counts them
    "Mixer-S/32": 19_104_624,
    "Mixer-S/16": 18_528_264,
    "Mixer-B/32": 60_293_428,
    "Mixer-B/16": 59_880_472,
    "Mixer-L/16": 208_196_168,
}


def tiny(**changes: Any) -> MixerSpec:
    fields: dict[str, Any] = {
        "depth": 2,
        "width": 24,
        "tokens_mlp_width": 10,
        "channels_mlp_width": 40,
        "patch_size": (4, 2),
        "image_size": (12, 8),
        "num_classes": 5,
    }
    return MixerSpec(**(fields | changes))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_exact(name: str):
    spec = model_spec(name)
    assert model_cost(spec)[0] == PARAMETERS[name]
    assert variant_name(spec) == name


def test_table_1_of_the_mixer_paper():
    """Depth, width, and the two MLPs' widths; S, B and L."""
    assert [tuple(row.values()) for row in MIXERS.values()] == [
        (8, 512, 256, 2048),
        (12, 768, 384, 3072),
        (24, 1024, 512, 4096),
    ]


@pytest.mark.parametrize(
    "spec",
    [*(model_spec(name) for name in PARAMETERS), tiny(), tiny(num_classes=0, in_channels=1)],
    ids=[*PARAMETERS, "tiny", "features"],
)
def test_macs_by_formula_are_those_counted(
    spec: MixerSpec, counted_macs: Callable[[MixerSpec], int]
):
    assert macs(spec) == counted_macs(spec)


# Eq. 1 in numpy ----------------------------------------------------------------------------------


def dense(x: Array, w: dict[str, Array], name: str) -> Array:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(x: Array, w: dict[str, Array], name: str) -> Array:
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]


def exact(x: Array) -> Array:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def approximate(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def reference(image: Array, w: dict[str, Array], spec: MixerSpec) -> Array:
    """Logits of one image `[C, H, W]`."""
    gelu = exact if spec.activation == "gelu" else approximate
    (ph, pw), (rows, columns) = spec.patch_size, spec.grid
    patches = [
        image[:, y * ph : (y + 1) * ph, x * pw : (x + 1) * pw].transpose(1, 2, 0).reshape(-1)
        for y in range(rows)
        for x in range(columns)
    ]
    x = dense(np.stack(patches), w, "patch_embedding")
    for i in range(spec.depth):
        name = f"blocks.{i}"
        y = layer_norm(x, w, f"{name}.norm1").T
        x = x + dense(gelu(dense(y, w, f"{name}.tokens.hidden")), w, f"{name}.tokens.output").T
        y = layer_norm(x, w, f"{name}.norm2")
        x = x + dense(gelu(dense(y, w, f"{name}.channels.hidden")), w, f"{name}.channels.output")
    return dense(layer_norm(x, w, "norm").mean(0), w, "head")


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_logits_are_those_of_the_equations(activation: str, perturb: Callable[[nn.Module], None]):
    spec = tiny(activation=activation)
    model = Mixer(spec).double().eval()
    perturb(model)
    images = torch.randn(3, 3, 12, 8, dtype=torch.float64)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    with torch.no_grad():
        found = model(images).numpy()
    wanted = np.stack([reference(image, weights, spec) for image in images.numpy()])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9 * np.abs(wanted).max())


def test_features_and_tokens(perturb: Callable[[nn.Module], None]):
    model = Mixer(tiny()).eval()
    perturb(model)
    images = torch.randn(2, 3, 12, 8)
    pooled, tokens, grid = model.features(images)
    assert grid == (3, 4)
    assert tokens.shape == (2, 12, 24)
    torch.testing.assert_close(pooled, tokens.mean(1))
    torch.testing.assert_close(model(images), model.classify(pooled))
    assert Mixer(tiny(num_classes=0))(images).shape == (2, 24)


def test_every_parameter_gets_a_gradient(perturb: Callable[[nn.Module], None]):
    model = Mixer(tiny())
    perturb(model)
    model(torch.randn(2, 3, 12, 8)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_initial_weights():
    """LeCun normal, truncated at two standard deviations, for every matrix but the head."""
    model = create_model("Mixer-S/16", 10, 64)
    for name, value in model.state_dict().items():
        if name.startswith("head.") or name.endswith("bias"):
            assert not value.any(), name
        elif ".norm" in name or name.startswith("norm"):
            assert (value == 1).all(), name
        else:
            std = value.shape[1] ** -0.5
            assert value.std().item() == pytest.approx(std, rel=0.05), name
            assert value.abs().max() < 2 * std / 0.8796 * 1.001, name


def test_stochastic_depth_rises_from_none_to_all_of_it():
    model = Mixer(tiny(depth=5, drop_path=0.4))
    rates = [block.drop_path for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert model.head is not None
    nn.init.normal_(model.head.weight)
    images = torch.randn(1, 3, 12, 8).expand(32, -1, -1, -1)
    assert model.train()(images).std(0).max() > 0.01
    assert model.eval()(images).std(0).max() < 1e-5


def test_other_sizes_are_refused():
    model = Mixer(tiny())
    with pytest.raises(PatchwordError, match="the model takes"):
        model(torch.zeros(1, 3, 8, 12))
    with pytest.raises(PatchwordError, match="its own size"):
        resized(model.spec, (24, 16))
    with pytest.raises(UsageError, match="multiple of the patch"):
        tiny(image_size=(13, 8))


def test_a_tiny_one_learns_digits(learn_digits: Callable[[Mixer, int, float], float]):
    spec = tiny(
        image_size=(8, 8), patch_size=(2, 2), in_channels=1, num_classes=10, tokens_mlp_width=32
    )
    assert learn_digits(Mixer(spec), 120, 5e-3) > 0.75
