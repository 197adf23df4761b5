"""ResNets of weight-standardised convolutions and GroupNorm (paper sections 3.1 and 4.1): BiT's, a
baseline (arXiv 1912.11370), and the stem of a hybrid.

Both are a root convolution, max pooling, and stages of bottleneck blocks, named alike. Convolutions
have a `weight` `[out, in, k, k]`, GroupNorms a `weight` and a `bias` `[channels]`:

    root                        convolution, k = 7
    root_norm                   GroupNorm, of a stem only
    stages.{i}.{j}.conv1 ... 3  convolutions, k = 1, 3, 1
    stages.{i}.{j}.norm1 ... 3  GroupNorm before (BiT) or after (stem) the convolution so numbered
    stages.{i}.0.downsample     convolution, k = 1, of the shortcut
    stages.{i}.0.downsample_norm  GroupNorm, of a stem only
    norm, head                  last GroupNorm and the classifier, of BiT only

i counts stages, j blocks in a stage, from 0. Every stage but the first halves the map, in its first
block's 3 x 3 convolution and shortcut. Odd sizes are halved upwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchword.models.model import Model, init_head, init_lecun
from patchword.spec.batch import Outputs
from patchword.spec.model import PreprocessSpec, ResNetSpec, StemSpec
from patchword.spec.parse import PatchwordError

GROUPS = 32
"""of every GroupNorm"""
BIT_WIDTH = 64
"""channels of BiT's root, times the width factor"""

Padding = Literal["same", "fixed"]
"""`same`: TensorFlow's, as little as the image's size needs, the odd one at the end (hybrids).
`fixed`: half the kernel on every side (BiT). They differ at stride 2 only."""


def _pads(size: int, kernel: int, stride: int, padding: Padding) -> tuple[int, int]:
    """Zeros before and after an axis of `size` pixels, such that ceil(size / stride) come out."""
    if padding == "fixed":
        return kernel // 2, kernel // 2
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def standardized(weight: Tensor, eps: float, eps_in: Literal["std", "variance"]) -> Tensor:
    """Each filter of `[out, in, kh, kw]` less its mean, over its standard deviation + eps, or over
    the root of its variance + eps (arXiv 1903.10520). A constant filter becomes zero; its gradient
    is finite."""
    flat = weight.flatten(1)
    if eps_in == "variance":  # a LayerNorm of the filters, which is one fused kernel
        return F.layer_norm(flat, flat.shape[1:], eps=eps).view_as(weight)
    centred = flat - flat.mean(1, keepdim=True)
    std = torch.norm_except_dim(centred, 2, 0) * flat.shape[1] ** -0.5
    return (centred * (std + eps).reciprocal()).view_as(weight)


class StdConv(nn.Module):
    """A convolution without bias by the standardised `weight` `[out, in, k, k]`: float
    `[B, in, H, W]` to `[B, out, ceil(H / stride), ceil(W / stride)]`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        *,
        padding: Padding,
        eps: float,
        eps_in: Literal["std", "variance"],
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
        self.stride = stride
        self.padding: Padding = padding
        self.eps = eps
        self.eps_in: Literal["std", "variance"] = eps_in

    def forward(self, x: Tensor) -> Tensor:
        weight = standardized(self.weight, self.eps, self.eps_in)
        kernel = weight.shape[-1]
        rows, columns = (_pads(n, kernel, self.stride, self.padding) for n in x.shape[-2:])
        # One pixel wide, at stride 2, torch 2.13's padding has no sound bfloat16 gradient on CPU
        if x.shape[-1] > 1 and rows[0] == rows[1] and columns[0] == columns[1]:
            return F.conv2d(x, weight, stride=self.stride, padding=(rows[0], columns[0]))
        return F.conv2d(F.pad(x, (*columns, *rows)), weight, stride=self.stride)


def max_pool(x: Tensor, padding: Padding) -> Tensor:
    """The greatest of each 3 x 3 pixels at stride 2, zeros around the image as in BiT. Google's
    hybrids have no zeros there, which is the same, since there a ReLU comes before."""
    rows, columns = (_pads(n, 3, 2, padding) for n in x.shape[-2:])
    return F.max_pool2d(F.pad(x, (*columns, *rows)), 3, 2)


Convolution = Callable[..., StdConv]
"""`StdConv` but for its channels, kernel and stride."""


class PostBlock(nn.Module):
    """A bottleneck block of a hybrid's stem, `[B, in, H, W]` to `[B, 4 * inner, H', W']`: every
    convolution is followed by GroupNorm, the ReLU comes after the sum."""

    def __init__(
        self, convolution: Convolution, in_channels: int, inner: int, stride: int, eps: float
    ) -> None:
        super().__init__()
        out = 4 * inner
        self.conv1 = convolution(in_channels, inner, 1)
        self.norm1 = nn.GroupNorm(GROUPS, inner, eps)
        self.conv2 = convolution(inner, inner, 3, stride)
        self.norm2 = nn.GroupNorm(GROUPS, inner, eps)
        self.conv3 = convolution(inner, out, 1)
        self.norm3 = nn.GroupNorm(GROUPS, out, eps)
        project = stride > 1 or in_channels != out
        self.downsample = convolution(in_channels, out, 1, stride) if project else None
        self.downsample_norm = nn.GroupNorm(GROUPS, out, eps) if project else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.downsample is not None and self.downsample_norm is not None:
            shortcut = self.downsample_norm(self.downsample(x))
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return F.relu(self.norm3(self.conv3(x)) + shortcut)


class PreBlock(nn.Module):
    """A bottleneck block of BiT, `[B, in, H, W]` to `[B, 4 * inner, H', W']`: GroupNorm and ReLU
    come before each convolution, and before the projection of a stage's first shortcut."""

    def __init__(
        self, convolution: Convolution, in_channels: int, inner: int, stride: int, eps: float
    ) -> None:
        super().__init__()
        out = 4 * inner
        self.norm1 = nn.GroupNorm(GROUPS, in_channels, eps)
        self.conv1 = convolution(in_channels, inner, 1)
        self.norm2 = nn.GroupNorm(GROUPS, inner, eps)
        self.conv2 = convolution(inner, inner, 3, stride)
        self.norm3 = nn.GroupNorm(GROUPS, inner, eps)
        self.conv3 = convolution(inner, out, 1)
        project = stride > 1 or in_channels != out
        self.downsample = convolution(in_channels, out, 1, stride) if project else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        shortcut = x if self.downsample is None else self.downsample(active)
        y = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return self.conv3(F.relu(self.norm3(y))) + shortcut


def _stages(
    block: type[PostBlock | PreBlock],
    convolution: Convolution,
    layers: Sequence[int],
    width: int,
    eps: float,
) -> nn.Sequential:
    """Stages of so many blocks each; stage k (from 0) puts out 4 * 2^k * width channels."""
    stages: list[nn.Sequential] = []
    channels = width
    for stage, count in enumerate(layers):
        blocks: list[nn.Module] = []
        for index in range(count):
            stride = 2 if stage and not index else 1
            blocks.append(block(convolution, channels, width * 2**stage, stride, eps))
            channels = 4 * width * 2**stage
        stages.append(nn.Sequential(*blocks))
    return nn.Sequential(*stages)


class ResNetStem(nn.Module):
    """The ResNet of a hybrid: float `[B, C, H, W]` to `[B, spec.channels, ceil(H / spec.stride),
    ceil(W / spec.stride)]`.

    Post-activation, padding "SAME", as in google-research/vision_transformer (models_resnet.py).
    """

    def __init__(self, spec: StemSpec, in_channels: int) -> None:
        super().__init__()
        convolution = partial(
            StdConv, padding="same", eps=spec.weight_eps, eps_in=spec.weight_eps_in
        )
        self.root = convolution(in_channels, spec.width, 7, 2)
        self.root_norm = nn.GroupNorm(GROUPS, spec.width, spec.norm_eps)
        self.stages = _stages(PostBlock, convolution, spec.layers, spec.width, spec.norm_eps)
        init_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.root_norm(self.root(images)))
        return self.stages(max_pool(x, "same"))


class ResNet(Model[ResNetSpec]):
    """A BiT ResNet; see `Model` for what it takes and returns. Images may be of any size: the
    spec's is the one it was made for. The tokens are the last feature map's pixels, row by row."""

    def __init__(
        self,
        spec: ResNetSpec,
        *,
        preprocess: PreprocessSpec | None = None,
        classes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(spec, preprocess, classes)
        width = BIT_WIDTH * spec.width_factor
        convolution = partial(StdConv, padding="fixed", eps=spec.weight_eps, eps_in="variance")
        self.root = convolution(spec.in_channels, width, 7, 2)
        self.stages = _stages(PreBlock, convolution, spec.layers, width, spec.norm_eps)
        channels = 4 * width * 2 ** (len(spec.layers) - 1)
        self.norm = nn.GroupNorm(GROUPS, channels, spec.norm_eps)
        self.head = nn.Linear(channels, spec.num_classes) if spec.num_classes else None
        init_weights(self)
        init_head(self.head)

    def features(self, images: Tensor) -> Outputs:
        self.check(images)
        x = self.stages(max_pool(self.root(images), "fixed"))
        x = F.relu(self.norm(x))
        tokens = x.flatten(2).transpose(1, 2)
        return Outputs(x.mean((2, 3)), tokens, (x.shape[2], x.shape[3]))

    def check(self, images: Tensor) -> None:
        """Raises `PatchwordError` unless `images` have the spec's channels and at least one
        pixel."""
        channels = self.spec.in_channels
        if images.ndim != 4 or images.shape[1] != channels or min(images.shape[2:]) < 1:
            raise PatchwordError(
                f"images are {list(images.shape)}, the model takes [B, {channels}, H, W] of any "
                "size; convert them, or create the model with in_channels"
            )


def init_weights(module: nn.Module) -> None:
    """Initialise as the authors' public code does (big_transfer, bit_jax; vision_transformer,
    models_resnet).

    Convolutions: normal truncated at two standard deviations, variance 1 / fan-in ("LeCun").
    GroupNorm: scale 1, bias 0, but scale 0 in the last of a post-activation block's branch
    (`norm3`), which so starts as its shortcut. BiT's head: 0 (`init_head`).
    """
    for part in module.modules():
        if isinstance(part, StdConv):
            init_lecun(part.weight)
        elif isinstance(part, nn.GroupNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
    for part in module.modules():
        if isinstance(part, PostBlock):
            nn.init.zeros_(part.norm3.weight)


def _convolution_macs(
    layers: Sequence[int], width: int, image_size: tuple[int, int], in_channels: int
) -> list[int]:
    """Multiply-accumulates of the root and of each block for one image."""
    rows, columns = (-(-size // 2) for size in image_size)
    found = [rows * columns * 7 * 7 * in_channels * width]
    channels = width
    for stage, count in enumerate(layers):
        before = rows * columns
        rows, columns = -(-rows // 2), -(-columns // 2)  # the pooling, then a first block's stride
        pixels, inner = rows * columns, width * 2**stage
        out = 4 * inner
        rest = pixels * (9 * inner + out) * inner  # the second and third convolution
        shrinking = (before if stage else pixels) * channels * inner + pixels * channels * out
        found += [shrinking + rest, *[pixels * out * inner + rest] * (count - 1)]
        channels = out
    return found


def stem_macs(spec: StemSpec, image_size: tuple[int, int], in_channels: int) -> int:
    """Multiply-accumulates of a stem for one image of (height, width) pixels: its convolutions."""
    return sum(_convolution_macs(spec.layers, spec.width, image_size, in_channels))


def part_macs(spec: ResNetSpec) -> list[int]:
    """Multiply-accumulates of one image's forward pass, of the root, each block, and the head:
    convolutions, not GroupNorm, pooling, additions or the standardisation of the weights (once a
    batch)."""
    width = BIT_WIDTH * spec.width_factor
    channels = 4 * width * 2 ** (len(spec.layers) - 1)
    body = _convolution_macs(spec.layers, width, spec.image_size, spec.in_channels)
    return [*body, channels * spec.num_classes]
