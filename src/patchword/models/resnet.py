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

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchword.models.model import Model, init_head, init_lecun
from patchword.spec.batch import Grid, Outputs
from patchword.spec.model import PreprocessSpec, ResNetSpec, StemSpec

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

    def macs(self, size: tuple[int, int]) -> int:
        """Multiply-accumulates for one image of (height, width) pixels."""
        return math.prod(_halved(size, self.stride)) * self.weight.numel()


def _halved(size: tuple[int, int], stride: int = 2) -> tuple[int, int]:
    return -(-size[0] // stride), -(-size[1] // stride)


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
        nn.init.zeros_(self.norm3.weight)
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

    def macs(self, size: tuple[int, int]) -> int:
        """Multiply-accumulates of the convolutions for one image of (height, width) pixels."""
        return sum(_macs(self.root, self.stages, size))


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
        return Outputs(x.mean((2, 3)), tokens, self.grid_of(images))

    def grid_of(self, images: Tensor) -> Grid:
        """(rows, columns) of the last feature map, at stride 32."""
        return _halved((int(images.shape[2]), int(images.shape[3])), 32)

    def part_macs(self, training: bool = False) -> list[int]:
        """Of convolutions and head, not GroupNorm, pooling, additions or the standardisation of the
        weights (once a batch)."""
        head = 0 if self.head is None else self.head.weight.numel()
        return [*_macs(self.root, self.stages, self.spec.image_size), head]


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


def _macs(root: StdConv, stages: nn.Sequential, size: tuple[int, int]) -> list[int]:
    """Multiply-accumulates of the root and of each block for one image of (height, width)
    pixels."""
    counts = [root.macs(size)]
    size = _halved(_halved(size))  # root and pooling
    for stage in stages:
        for block in cast(nn.Sequential, stage):
            block = cast(PostBlock | PreBlock, block)
            before = block.conv1.macs(size) + block.conv2.macs(size)
            before += 0 if block.downsample is None else block.downsample.macs(size)
            size = _halved(size, block.conv2.stride)
            counts.append(before + block.conv3.macs(size))
    return counts
