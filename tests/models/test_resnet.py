"""The BiT ResNet and the hybrid's stem against both written in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor, nn

from patchword.models.resnet import ResNet, ResNetStem, StdConv, standardized
from patchword.models.zoo import RESNETS, macs, model_cost, model_spec, resized, variant_name
from patchword.spec.model import ResNetSpec, StemSpec
from patchword.spec.parse import PatchwordError, UsageError

Array = NDArray[np.float64]
Weights = dict[str, Array]
Pads = tuple[tuple[int, int], tuple[int, int]]

PARAMETERS = {  # at 1000 classes, as timm counts them
    "BiT-R50x1": 25_549_352,
    "BiT-R50x2": 97_988_712,
    "BiT-R101x1": 44_541_480,
    "BiT-R152x1": 60_185_128,
    "BiT-R152x2": 236_335_208,
    "BiT-R200x3": 568_633_000,
}
TINY = ResNetSpec(layers=(1, 2, 1, 1), num_classes=5, image_size=(64, 48))
with torch.device("meta"):
    ON_META = ResNet(TINY)


def test_no_variant_is_missing():
    assert list(PARAMETERS) == list(RESNETS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_exact(name: str):
    spec = model_spec(name)
    assert model_cost(spec)[0] == PARAMETERS[name]
    assert variant_name(spec) == name


@pytest.mark.parametrize(
    "spec",
    [
        *(model_spec(name) for name in PARAMETERS),
        model_spec("BiT-R50x1", image_size=(97, 65), in_channels=1, num_classes=0),
        model_spec("BiT-R50x1", image_size=1),
    ],
    ids=[*PARAMETERS, "odd", "one pixel"],
)
def test_macs_by_formula_are_those_counted(
    spec: ResNetSpec, counted_macs: Callable[[ResNetSpec], int]
):
    assert macs(spec) == counted_macs(spec)


# Both networks in numpy --------------------------------------------------------------------------


def same(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's "SAME", as its documentation defines it."""
    over = size % stride
    total = max(kernel - over, 0) if over else max(kernel - stride, 0)
    return total // 2, total - total // 2


def pads_of(x: Array, kernel: int, stride: int, padding: str) -> Pads:
    if padding == "fixed":
        return (kernel // 2, kernel // 2), (kernel // 2, kernel // 2)
    return same(x.shape[1], kernel, stride), same(x.shape[2], kernel, stride)


def windows(x: Array, kernel: int, stride: int, pads: Pads, value: float) -> Array:
    """`[C, H, W]` to `[C, H', W', k, k]`."""
    padded = np.pad(x, ((0, 0), *pads), constant_values=value)
    return sliding_window_view(padded, (kernel, kernel), (1, 2))[:, ::stride, ::stride]


def standard(w: Array, eps: float, eps_in: str) -> Array:
    filters = w.reshape(len(w), -1)
    mean, variance = filters.mean(1), filters.var(1)
    scale = np.sqrt(variance) + eps if eps_in == "std" else np.sqrt(variance + eps)
    return (w - mean[:, None, None, None]) / scale[:, None, None, None]


class Reference:
    """The parts of a network with its weights and constants."""

    def __init__(self, weights: Weights, padding: str, norm_eps: float, weight_eps: float, at: str):
        self.weights, self.padding, self.norm_eps = weights, padding, norm_eps
        self.weight_eps, self.at = weight_eps, at

    def convolve(self, x: Array, name: str, stride: int = 1) -> Array:
        w = standard(self.weights[f"{name}.weight"], self.weight_eps, self.at)
        pads = pads_of(x, w.shape[-1], stride, self.padding)
        return np.einsum("cyxij,ocij->oyx", windows(x, w.shape[-1], stride, pads, 0.0), w)

    def norm(self, x: Array, name: str) -> Array:
        grouped = x.reshape(32, -1)
        mean, variance = grouped.mean(1)[:, None], grouped.var(1)[:, None]
        x = ((grouped - mean) / np.sqrt(variance + self.norm_eps)).reshape(x.shape)
        scale, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return x * scale[:, None, None] + bias[:, None, None]

    def pool(self, x: Array, value: float) -> Array:
        return windows(x, 3, 2, pads_of(x, 3, 2, self.padding), value).max((3, 4))

    def post_block(self, x: Array, name: str, stride: int) -> Array:
        shortcut = x
        if f"{name}.downsample.weight" in self.weights:
            shortcut = self.convolve(x, f"{name}.downsample", stride)
            shortcut = self.norm(shortcut, f"{name}.downsample_norm")
        x = relu(self.norm(self.convolve(x, f"{name}.conv1"), f"{name}.norm1"))
        x = relu(self.norm(self.convolve(x, f"{name}.conv2", stride), f"{name}.norm2"))
        return relu(self.norm(self.convolve(x, f"{name}.conv3"), f"{name}.norm3") + shortcut)

    def pre_block(self, x: Array, name: str, stride: int) -> Array:
        active = relu(self.norm(x, f"{name}.norm1"))
        shortcut = x
        if f"{name}.downsample.weight" in self.weights:
            shortcut = self.convolve(active, f"{name}.downsample", stride)
        y = relu(self.norm(self.convolve(active, f"{name}.conv1"), f"{name}.norm2"))
        y = relu(self.norm(self.convolve(y, f"{name}.conv2", stride), f"{name}.norm3"))
        return self.convolve(y, f"{name}.conv3") + shortcut

    def stages(self, x: Array, layers: tuple[int, ...], block: Any) -> Array:
        for stage, count in enumerate(layers):
            for index in range(count):
                x = block(x, f"stages.{stage}.{index}", 2 if stage and not index else 1)
        return x


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def in_numpy(module: nn.Module) -> Weights:
    return {name: value.numpy() for name, value in module.state_dict().items()}


GOOGLE: dict[str, Any] = {"norm_eps": 1e-6, "weight_eps": 1e-5, "weight_eps_in": "std"}
TIMM: dict[str, Any] = {"norm_eps": 1e-5, "weight_eps": 1e-8, "weight_eps_in": "variance"}
GREAT: dict[str, Any] = {"norm_eps": 0.3, "weight_eps": 0.1}  # so great that each of them matters


@pytest.mark.parametrize(
    ("layers", "size", "constants"),
    [
        ((), (16, 23), GOOGLE),
        ((1,), (17, 12), TIMM),
        ((2, 1), (33, 24), GOOGLE),
        ((2, 1), (24, 33), TIMM),
        ((1, 1, 2), (35, 41), GREAT | {"weight_eps_in": "std"}),
        ((1, 1, 2), (16, 64), GREAT | {"weight_eps_in": "variance"}),
    ],
)
def test_stem(
    layers: tuple[int, ...],
    size: tuple[int, int],
    constants: dict[str, Any],
    perturb: Callable[[nn.Module], None],
):
    """Odd sizes and rectangles too; pooling over nothing outside the image, as Google's."""
    spec = StemSpec(layers=layers, width=32, **constants)
    stem = ResNetStem(spec, 3).double()
    perturb(stem)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        found = stem(images).numpy()
    assert found.shape[1:] == (spec.channels, *(math.ceil(n / spec.stride) for n in size))
    plain = Reference(in_numpy(stem), "same", spec.norm_eps, spec.weight_eps, spec.weight_eps_in)
    for image, value in zip(images.numpy(), found, strict=True):
        x = relu(plain.norm(plain.convolve(image, "root", 2), "root_norm"))
        wanted = plain.stages(plain.pool(x, -np.inf), layers, plain.post_block)
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-9 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("size", "factor", "constants"),
    [
        ((64, 48), 1, {}),
        ((37, 50), 1, {"norm_eps": 0.3, "weight_eps": 0.1}),
        ((1, 9), 1, {}),
        ((33, 31), 2, {}),
    ],
)
def test_bit(
    size: tuple[int, int],
    factor: int,
    constants: dict[str, Any],
    perturb: Callable[[nn.Module], None],
):
    """Any size, with zeros around the image and around the map that is pooled."""
    layers = (1, 2, 1, 1) if factor == 1 else (1, 1, 1, 1)
    spec = ResNetSpec(layers=layers, width_factor=factor, num_classes=5, **constants)
    model = ResNet(spec).double().eval()
    perturb(model)
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        found = model(image).numpy()[0]
        tokens = model.features(image).tokens.numpy()[0]
    plain = Reference(in_numpy(model), "fixed", spec.norm_eps, spec.weight_eps, "variance")
    x = plain.pool(plain.convolve(image.numpy()[0], "root", 2), 0.0)
    x = relu(plain.norm(plain.stages(x, layers, plain.pre_block), "norm"))
    wanted = plain.weights["head.weight"] @ x.mean((1, 2)) + plain.weights["head.bias"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9 * np.abs(wanted).max())
    rows = x.reshape(len(x), -1).T
    np.testing.assert_allclose(tokens, rows, rtol=0, atol=1e-9 * np.abs(rows).max())


# Standardisation ---------------------------------------------------------------------------------

EPS_IN: tuple[Literal["std", "variance"], ...] = ("std", "variance")


@pytest.mark.parametrize("eps_in", EPS_IN)
def test_filters_are_standardised(eps_in: Literal["std", "variance"]):
    weight = torch.randn(6, 4, 3, 3) * 0.1 + 2
    found = standardized(weight, 1e-10, eps_in).flatten(1)
    assert found.mean(1).abs().max() < 1e-5
    torch.testing.assert_close(found.std(1, correction=0), torch.ones(6))


@pytest.mark.parametrize("eps_in", EPS_IN)
def test_gradients_of_the_standardisation(eps_in: Literal["std", "variance"]):
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: standardized(w, 0.1, eps_in), weight)


@pytest.mark.parametrize("eps_in", EPS_IN)
def test_constant_filters_are_no_trouble(eps_in: Literal["std", "variance"]):
    weight = torch.full((2, 3, 1, 1), 0.5, requires_grad=True)
    found = standardized(weight, 1e-5, eps_in)
    assert not found.any()
    (found * torch.randn_like(found)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


# Behaviour ---------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(1, 70), st.integers(1, 70))
def test_images_of_any_size(height: int, width: int):
    with torch.device("meta"):
        pooled, tokens, grid = ON_META.features(torch.empty(2, 3, height, width))
    spec = resized(TINY, (height, width))
    assert isinstance(spec, ResNetSpec)
    assert grid == spec.grid == (-(-height // 32), -(-width // 32))
    assert tokens.shape == (2, math.prod(grid), 2048)
    assert pooled.shape == (2, 2048)


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (3, 32, 32), (1, 3, 0, 32)])
def test_other_images_are_refused(shape: tuple[int, ...]):
    model = ResNet(TINY)
    with pytest.raises(PatchwordError, match="of any size"):
        model(torch.zeros(shape))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (StemSpec, {"layers": (2, 0)}, "must be positive"),
        (StemSpec, {"layers": (2,), "width": 48}, "multiple of 32"),
        (StemSpec, {"layers": (2,), "weight_eps": 0.0}, "weight_eps"),
        (ResNetSpec, {"layers": (1, 1, 1, 0)}, "must be positive"),
        (ResNetSpec, {"layers": (1, 1, 1, 1), "width_factor": 0}, "width_factor"),
    ],
)
def test_impossible_specs_are_refused(kind: Any, fields: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        kind(**fields)


def test_features_without_a_head(perturb: Callable[[nn.Module], None]):
    model = ResNet(ResNetSpec(layers=(1, 1, 1, 1), num_classes=0)).eval()
    perturb(model)
    pooled, tokens, _ = model.features(images := torch.randn(2, 3, 40, 64))
    torch.testing.assert_close(model(images), pooled)
    torch.testing.assert_close(pooled, tokens.mean(1))


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "BiT": lambda: ResNet(TINY),
    "stem": lambda: ResNetStem(StemSpec(layers=(2, 1)), 3),
}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_every_parameter_gets_a_gradient(
    build: Callable[[], nn.Module], perturb: Callable[[nn.Module], None]
):
    module = build()
    perturb(module)
    module(torch.randn(2, 3, 64, 64)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def lecun(weight: Tensor) -> None:
    std = weight[0].numel() ** -0.5
    assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert weight.mean().abs().item() < 0.05 * std
    assert weight.abs().max() < 2 * std / 0.8796 * 1.001


ZERO = {
    "BiT": {"head.weight"},
    "stem": {f"stages.{at}.norm3.weight" for at in ("0.0", "0.1", "1.0")},
}


@pytest.mark.parametrize("which", BUILDS)
def test_initial_weights(which: str):
    """A post-activation block starts as its shortcut, a head at zero."""
    for name, value in BUILDS[which]().state_dict().items():
        if name in ZERO[which] or name.endswith("bias"):
            assert not value.any(), name
        elif value.ndim == 1:
            assert (value == 1).all(), name
        else:
            lecun(value)


def test_names_are_the_documented_ones():
    block = ["conv1", "norm1", "conv2", "norm2", "conv3", "norm3"]
    stem = ResNetStem(StemSpec(layers=(2,)), 3)
    names = [name for name, module in stem.named_modules() if not list(module.children())]
    wanted = ["root", "root_norm", *(f"stages.0.0.{part}" for part in block)]
    wanted += ["stages.0.0.downsample", "stages.0.0.downsample_norm"]
    assert names == [*wanted, *(f"stages.0.1.{part}" for part in block)]
    bit = {name.rpartition(".")[0] for name in ResNet(TINY).state_dict()}
    stages = ["0.0", "1.0", "1.1", "2.0", "3.0"]
    projections = {f"stages.{at}.downsample" for at in stages if at != "1.1"}
    blocks = {f"stages.{at}.{part}" for at in stages for part in block}
    assert bit == {"root", "norm", "head"} | blocks | projections


def test_a_tiny_one_learns_digits(learn_digits: Callable[[ResNet, int, float], float]):
    spec = ResNetSpec(layers=(1, 1, 1, 1), in_channels=1, num_classes=10, image_size=(16, 16))
    assert learn_digits(ResNet(spec), 20, 1e-3) > 0.75


def test_macs_of_a_stem_alone():
    """The root alone: 7 x 7 x 3 products for each of 64 channels at a quarter of the pixels."""
    assert ResNetStem(StemSpec(layers=()), 3).macs((224, 224)) == 112 * 112 * 49 * 3 * 64


@pytest.mark.parametrize("size", [(1, 1), (8, 1), (1, 8), (5, 4)])
@pytest.mark.parametrize("stride", [1, 2])
def test_bfloat16_gradients_are_sound_on_maps_of_any_size(size: tuple[int, int], stride: int):
    """torch 2.13's own are not on CPUs, one pixel wide at stride 2: it adds to memory that nobody
    has cleared, so that a good try proves little. 1 %: bfloat16 has 8 bits."""
    convolution = StdConv(32, 32, 3, stride, padding="fixed", eps=1e-10, eps_in="variance")
    nn.init.normal_(convolution.weight)

    def gradient(images: Tensor, enabled: bool) -> Tensor:
        convolution.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            convolution(images).float().square().sum().backward()
        assert convolution.weight.grad is not None
        return convolution.weight.grad

    for _ in range(10):
        junk = [torch.full((64 << k,), 1e30) for k in range(12) for _ in range(4)]
        images = torch.randn(4, 32, *size)
        exact = gradient(images, enabled=False)
        del junk
        assert (gradient(images, enabled=True) - exact).norm() < 0.01 * exact.norm()
