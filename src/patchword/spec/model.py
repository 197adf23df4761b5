"""What a model is, as frozen keyword-only dataclasses: they travel with the weights.

Standard library only.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from patchword.spec import ranges
from patchword.spec.ranges import check_ranges, require

Pool = Literal["token", "gap", "map", "token+gap"]
HeadKind = Literal["linear", "mlp"]
Position = Literal["none", "learned-1d", "learned-2d", "relative", "sincos2d", "rotary"]
PositionAt = Literal["stem", "every", "every-shared"]
Activation = Literal["gelu", "gelu_tanh", "swiglu"]
Distillation = Literal["none", "token", "head"]
Interpolation = Literal["bilinear", "bicubic"]
Loss = Literal["softmax", "sigmoid"]
Resize = Literal["short", "stretch"]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What every family has. Sizes in pixels, (height, width)."""

    image_size: tuple[int, int] = (224, 224)
    in_channels: int = ranges.AT_LEAST_ONE(3)
    num_classes: int = ranges.ZERO_OR_MORE(1000)
    """0 leaves the head out: the model returns the pooled features."""
    probability: Loss = "softmax"
    """how logits become probabilities, as the model was trained"""

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            size = self.image_size[name == "width"]
            require(size >= 1, f"image {name} is {size}; it must be at least 1")
        check_ranges(self)


def _check_patches(image_size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    for axis, size, patch in zip(("height", "width"), image_size, patch_size, strict=True):
        require(
            patch >= 1 and size >= patch and size % patch == 0,
            f"image {axis} {size} is not a multiple of the patch {axis} {patch}; "
            f"use {max(1, round(size / max(patch, 1))) * patch}",
        )


@dataclass(frozen=True, kw_only=True)
class StemSpec:
    """The ResNet of a hybrid (section 3.1): a root convolution and max pooling of stride 2 each,
    then stages of post-activation bottleneck blocks, each but the first of stride 2."""

    layers: tuple[int, ...]
    """blocks per stage: (3, 4, 6, 3) is kind (i) of section 3.1, (3, 4, 9) kind (ii), () the root
    alone"""
    width: int = 64
    """channels of the root; stage k puts out 4 * 2^k times as many (k from 0)"""
    norm_eps: float = ranges.POSITIVE(1e-6)
    weight_eps: float = ranges.POSITIVE(1e-5)
    """added to the standard deviation (`weight_eps_in` is `std`) by which the convolutions' weights
    are divided, or to the variance. The defaults are Google's; timm's are 1e-8 in the variance and
    a `norm_eps` of 1e-5"""
    weight_eps_in: Literal["std", "variance"] = "std"

    def __post_init__(self) -> None:
        require(all(n >= 1 for n in self.layers), f"stem layers {self.layers} must be positive")
        require(
            self.width >= 32 and self.width % 32 == 0,
            f"stem width {self.width} is not a multiple of 32, the groups of its GroupNorm",
        )
        check_ranges(self)

    @property
    def stride(self) -> int:
        """Pixels of the image per pixel of the feature map."""
        return 4 * 2 ** max(len(self.layers) - 1, 0)

    @property
    def channels(self) -> int:
        """Of the feature map."""
        return self.width * 4 * 2 ** (len(self.layers) - 1) if self.layers else self.width


@dataclass(frozen=True, kw_only=True)
class ViTSpec(ModelSpec):
    """A Vision Transformer (paper section 3.1, table 1), or a hybrid if it has a stem."""

    depth: int = ranges.AT_LEAST_ONE()
    width: int = ranges.AT_LEAST_ONE()
    mlp_width: int = ranges.AT_LEAST_ONE()
    heads: int = ranges.AT_LEAST_ONE()
    patch_size: tuple[int, int]
    """in pixels of the image; a hybrid's patches are `patch_size` / stem.stride map pixels"""
    stem: StemSpec | None = None
    pool: Pool = "token"
    """class token (paper), global average (D.3), multi-head attention pooling, or class token and
    average side by side (DINOv2's classifier)"""
    pool_norm: bool = False
    """the last LayerNorm comes after the pooling instead of before it (timm's `fc_norm`)"""
    head: HeadKind = "linear"
    """`mlp`: the pre-training head, one hidden layer and tanh (section 3.1)"""
    head_width: int | None = None
    """units of that hidden layer, None for `width`"""
    position: Position = "learned-1d"
    """table 8's four, the fixed sin-cos table, or DINOv3's rotary"""
    position_at: PositionAt = "stem"
    """added to the input, at every layer (a table each), or at every layer (one table); `relative`
    at the stem acts in the first layer only; `rotary` always acts in every layer"""
    activation: Activation = "gelu"
    """of the MLP; `gelu_tanh` is the approximation that Google's code uses"""
    dropout: float = ranges.BELOW_ONE(0.0)
    """after every dense layer except qkv, and after adding the position embeddings (B.1.1)"""
    drop_path: float = ranges.BELOW_ONE(0.0)
    """stochastic depth: 0 at the first block, rising linearly to this at the last"""
    patch_dropout: float = ranges.BELOW_ONE(0.0)
    """share of the patches left out of each image in training (FLIP, arXiv 2212.00794)"""
    layer_scale: float | None = ranges.FINITE(None)
    """initial value of LayerScale, None for none"""
    registers: int = ranges.ZERO_OR_MORE(0)
    distillation: Distillation = "none"
    """DeiT's distillation token: its output unused (`token`), or its own head's logits averaged
    with the class token's (`head`)"""
    qk_norm: bool = False
    norm_eps: float = ranges.POSITIVE(1e-6)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.width % self.heads == 0,
            f"width {self.width} is not a multiple of heads {self.heads}; change one of them",
        )
        require(
            self.head_width is None or (self.head == "mlp" and self.head_width >= 1),
            f"head_width is {self.head_width}; it must be at least 1, and goes with head mlp",
        )
        _check_patches(self.image_size, self.patch_size)
        self._check_position()
        self._check_tokens()

    def _check_position(self) -> None:
        position, width, depth = self.position, self.width, self.width // self.heads
        require(
            position != "sincos2d" or (width >= 8 and width % 4 == 0),
            f"position sincos2d needs a width of 8 or more that 4 divides, not {width}",
        )
        require(
            position != "learned-2d" or width % 2 == 0,
            f"position learned-2d needs an even width, not {width}",
        )
        require(
            position != "rotary" or depth % 4 == 0,
            f"position rotary needs a width per head that 4 divides, not {depth}",
        )
        require(
            not self.patch_dropout
            or (self.position_at == "stem" and position not in ("relative", "rotary")),
            "patch_dropout needs positions that are added at the stem; set position or position_at",
        )

    def _check_tokens(self) -> None:
        token = self.pool in ("token", "token+gap")
        require(
            self.distillation == "none" or self.pool == "token",
            f"a distillation token goes with pool token, not {self.pool}",
        )
        require(
            not (self.pool_norm and (token or self.pool == "map")), "pool_norm goes with pool gap"
        )
        if self.stem is not None:
            for patch in self.patch_size:
                require(
                    patch % self.stem.stride == 0,
                    f"patch size {patch} is not a multiple of the stem's stride {self.stem.stride}",
                )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        return (
            self.image_size[0] // self.patch_size[0],
            self.image_size[1] // self.patch_size[1],
        )

    @property
    def leading(self) -> int:
        """Tokens before registers and patches: the class token and the distillation token."""
        return (self.pool in ("token", "token+gap")) + (self.distillation != "none")

    @property
    def prefix(self) -> int:
        """Tokens before the patches: the leading ones and the registers."""
        return self.leading + self.registers


@dataclass(frozen=True, kw_only=True)
class ResNetSpec(ModelSpec):
    """A BiT ResNet, version 2: pre-activation bottleneck blocks, GroupNorm, weight-standardised
    convolutions (sections 3.1 and 4.1; arXiv 1912.11370). Takes images of any size."""

    layers: tuple[int, int, int, int]
    """blocks per stage"""
    width_factor: int = ranges.AT_LEAST_ONE(1)
    """all channels times this: the x3 of BiT-R101x3"""
    norm_eps: float = ranges.POSITIVE(1e-5)
    weight_eps: float = ranges.POSITIVE(1e-10)
    """added to the variance by whose root the convolutions' weights are divided; timm's is 1e-8"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(all(n >= 1 for n in self.layers), f"layers {self.layers} must be positive")

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the last feature map, at stride 32."""
        return (-(-self.image_size[0] // 32), -(-self.image_size[1] // 32))


@dataclass(frozen=True, kw_only=True)
class MixerSpec(ModelSpec):
    """An MLP-Mixer (arXiv 2105.01601)."""

    depth: int = ranges.AT_LEAST_ONE()
    width: int = ranges.AT_LEAST_ONE()
    tokens_mlp_width: int = ranges.AT_LEAST_ONE()
    """hidden units of the MLP over the patches"""
    channels_mlp_width: int = ranges.AT_LEAST_ONE()
    """hidden units of the MLP over the channels"""
    patch_size: tuple[int, int]
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    drop_path: float = ranges.BELOW_ONE(0.0)
    norm_eps: float = ranges.POSITIVE(1e-6)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_patches(self.image_size, self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        return (
            self.image_size[0] // self.patch_size[0],
            self.image_size[1] // self.patch_size[1],
        )


@dataclass(frozen=True, kw_only=True)
class PreprocessSpec:
    """How an image becomes the model's input. It travels with the weights."""

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """per channel, of pixel values in [0, 1]"""
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: Interpolation = "bicubic"
    resize: Resize = "short"
    """`short`: the short side to image size / crop_fraction, then a centre crop.
    `stretch`: straight to the image size, ignoring the aspect ratio."""
    crop_fraction: float = ranges.SHARE(0.875)

    def __post_init__(self) -> None:
        require(len(self.mean) == len(self.std) > 0, "mean and std are empty or differ in length")
        require(all(map(math.isfinite, self.mean)), f"mean {self.mean} must be finite")
        require(
            all(value > 0 and math.isfinite(value) for value in self.std),
            f"std {self.std} must be positive",
        )
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class CalibrationSpec:
    """How sure a model may be of what it says, measured on images that it was not trained on. It
    travels with the weights."""

    temperature: float = ranges.POSITIVE()
    """probabilities are those of the logits divided by this (Guo et al. 2017, arXiv 1706.04599)"""
    measured_on: str
    """the images of the counts below, in words"""
    images: int
    thresholds: tuple[float, ...]
    """of the top probability, rising, the first 0"""
    kept: tuple[int, ...]
    """images at least so sure, for each threshold"""
    right: tuple[int, ...]
    """those of them whose most probable class is the true one"""

    def __post_init__(self) -> None:
        check_ranges(self)
        require(self.images >= 1, f"a calibration on {self.images} images says nothing")
        counts = zip(self.right, self.kept, strict=False)
        falling = all(a >= b for a, b in pairwise((self.images, *self.kept)))
        rising = all(a < b for a, b in pairwise(self.thresholds))
        require(
            len(self.thresholds) == len(self.kept) == len(self.right) > 0
            and rising
            and falling
            and self.thresholds[0] == 0
            and all(0 <= right <= kept for right, kept in counts),
            "thresholds, kept and right are no curve of coverage and accuracy",
        )

    def expected(self, threshold: float) -> tuple[float, float | None]:
        """(coverage, accuracy) to expect of the images at least so sure, as fractions; between two
        thresholds the counts are interpolated. The accuracy is None where no image is so sure."""
        last = bisect.bisect_right(self.thresholds, threshold) - 1
        following = min(last + 1, len(self.thresholds) - 1)
        low, high = self.thresholds[last], self.thresholds[following]
        part = (threshold - low) / (high - low) if high > low else 0.0
        kept, right = (
            counts[last] + part * (counts[following] - counts[last])
            for counts in (self.kept, self.right)
        )
        return kept / self.images, right / kept if kept else None


FAMILIES: dict[str, type[ModelSpec]] = {"vit": ViTSpec, "resnet": ResNetSpec, "mixer": MixerSpec}
"""How a weight file names the kind of its spec."""
