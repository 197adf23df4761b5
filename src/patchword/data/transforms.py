"""From a file's bytes to uint8 pixels, per image; then to the model's normalised input."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from patchword.data.images import MAX_PIXELS, MODES, BadImage, opened
from patchword.data.randaugment import randaugment
from patchword.data.seeding import derived_seed
from patchword.spec.data import AugmentSpec
from patchword.spec.model import PreprocessSpec
from patchword.spec.parse import PatchwordError

RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
Box = tuple[float, float, float, float]
"""left, upper, right, lower, in pixels of the full image"""

EVAL_GAP = 2.0
"""In evaluation a JPEG, or an image of more than `LARGE` pixels, is decoded reduced only if this
many times the output's pixels per side are left: the result is then close to that of a full
decode."""


class Transform(Protocol):
    """The per-image part of the input path, run in the loader's workers."""

    image_size: tuple[int, int]
    channels: int
    random: bool
    """whether it draws random numbers; if not, its results may be kept"""

    def __call__(
        self, data: bytes | np.ndarray, rng: random.Random | None = None
    ) -> np.ndarray: ...


class _Cropper:
    """Decodes, cuts a box and resizes it, in one resampling with antialias."""

    def __init__(
        self,
        image_size: tuple[int, int],
        channels: int,
        preprocess: PreprocessSpec,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if channels not in MODES:
            raise PatchwordError(f"images of {channels} channels; use 1, 3 or 4")
        self.image_size = image_size
        self.channels = channels
        self.preprocess = preprocess
        self.max_pixels = max_pixels

    def _cut(
        self, data: bytes | np.ndarray, choose: Callable[[int, int], Box] | None = None
    ) -> Image.Image:
        """The box that `choose(height, width)` names, as an image of `image_size`; without it, what
        evaluation sees of the image, from a decode that is finer by `EVAL_GAP`."""
        rows, columns = self.image_size
        gap = EVAL_GAP if choose is None else 1.0
        with opened(data, self.channels, self.max_pixels) as picture:
            height, width = picture.size
            box = (
                choose(height, width)
                if choose
                else centre_box(height, width, self.image_size, self.preprocess)
            )
            left, upper, right, lower = box
            image = picture.decoded(
                (
                    math.ceil(gap * rows * height / (lower - upper)),
                    math.ceil(gap * columns * width / (right - left)),
                )
            )
        if image.size != (width, height):  # a reduced decode, by 2, 4 or 8
            halved = {(-(-width // by), -(-height // by)): by for by in (8, 4, 2)}
            if image.size not in halved:
                raise BadImage("not of the size that its header says")
            left, upper, right, lower = (edge / halved[image.size] for edge in box)
            box = (left, upper, right, lower)
        if image.size == (columns, rows) and box == (0, 0, columns, rows):
            return image
        return image.resize((columns, rows), RESAMPLING[self.preprocess.interpolation], box=box)


def _pixels(image: Image.Image) -> np.ndarray:
    """uint8 `[C, H, W]`."""
    values = np.asarray(image)
    return values[None] if values.ndim == 2 else np.ascontiguousarray(values.transpose(2, 0, 1))


class EvalTransform(_Cropper):
    """Resize and centre crop (`short`), or resize alone (`stretch`).

    `image_size` is (height, width). `short` scales the image so that it just covers `image_size` /
    `crop_fraction` and keeps the middle. An image of more than `max_pixels` is bad.
    """

    random = False

    def __call__(self, data: bytes | np.ndarray, rng: random.Random | None = None) -> np.ndarray:
        """uint8 `[C, H, W]`. Raises `BadImage`."""
        return _pixels(self._cut(data))


class TrainTransform(_Cropper):
    """Random crop (Szegedy et al., arXiv 1409.4842) and RandAugment; the flip is `BatchAugment`'s.

    With `crop="resize"` the image is cut as in evaluation. An image of more than `max_pixels` is
    bad.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        channels: int,
        preprocess: PreprocessSpec,
        augment: AugmentSpec,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(image_size, channels, preprocess, max_pixels)
        if augment.randaugment_layers and channels == 4:
            raise PatchwordError("RandAugment takes images of 1 or 3 channels; switch it off")
        self.augment = augment
        self.random = augment.crop == "inception" or augment.randaugment_layers > 0

    def __call__(self, data: bytes | np.ndarray, rng: random.Random | None = None) -> np.ndarray:
        """uint8 `[C, H, W]`, a pure function of `data` and `rng`'s state. Raises `BadImage`."""
        spec = self.augment
        if not self.random:
            return _pixels(self._cut(data))
        if rng is None:
            raise TypeError("a random transform needs rng")
        inception = functools.partial(inception_box, spec=spec, rng=rng)
        image = self._cut(data, inception if spec.crop == "inception" else None)
        if spec.randaugment_layers:
            image = randaugment(image, spec.randaugment_layers, spec.randaugment_magnitude, rng)
        return _pixels(image)


def centre_box(
    height: int, width: int, image_size: tuple[int, int], preprocess: PreprocessSpec
) -> Box:
    """The middle of an image as `preprocess` cuts it, with the aspect of `image_size`; all of it
    for `stretch`."""
    if preprocess.resize == "stretch":
        return (0, 0, width, height)
    ratio = min(height / image_size[0], width / image_size[1]) * preprocess.crop_fraction
    h, w = min(height, ratio * image_size[0]), min(width, ratio * image_size[1])
    left, upper = (width - w) / 2, (height - h) / 2
    return (left, upper, left + w, upper + h)


def inception_box(height: int, width: int, *, spec: AugmentSpec, rng: random.Random) -> Box:
    """A box of random area (a share in `crop_area`) and aspect (log-uniform in `crop_aspect`).

    Ten tries; then the largest centred box whose aspect is in range.
    """
    low, high = spec.crop_aspect
    for _ in range(10):
        area = rng.uniform(*spec.crop_area) * height * width
        aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, upper = rng.randint(0, width - w), rng.randint(0, height - h)
            return (left, upper, left + w, upper + h)
    w = min(width, max(1, round(height * high)))
    h = min(height, max(1, round(width / low)))
    left, upper = (width - w) // 2, (height - h) // 2
    return (left, upper, left + w, upper + h)


def to_input(
    images: Tensor, preprocess: PreprocessSpec, dtype: torch.dtype = torch.float32
) -> Tensor:
    """uint8 `[B, C, H, W]` -> (x / 255 - mean) / std as `dtype`, on the images' device.

    Three values serve grey images by their average, one value serves every channel.
    """
    channels = images.shape[1]
    mean, std = np.array(preprocess.mean), np.array(preprocess.std)
    if channels == 1 and len(mean) == 3:
        mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
    if len(mean) not in (1, channels):
        raise PatchwordError(
            f"mean and std have {len(mean)} values for images of {channels} channels; give 1 or "
            f"{channels}"
        )
    factor = torch.tensor(1 / (255 * std), dtype=torch.float32).view(1, -1, 1, 1)
    offset = torch.tensor(-mean / std, dtype=torch.float32).view(1, -1, 1, 1)
    values = images.to(torch.float32).mul_(factor.to(images.device)).add_(offset.to(images.device))
    return values.to(dtype)


# Batches, on the device --------------------------------------------------------------------------


class BatchAugment:
    """The batch part of `AugmentSpec`, in this order: flip, pad and shift, affine, erasing, mixing.

    All random numbers come from a CPU generator, as many and in the same order on every device.
    """

    def __init__(self, augment: AugmentSpec, num_classes: int) -> None:
        self.augment = augment
        self.num_classes = num_classes
        spec = augment
        self._affine = any((spec.rotate, spec.scale, spec.translate, spec.shear))

    def __call__(
        self, inputs: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Normalised `[B, C, H, W]` and int64 `[B]` -> inputs of the same shape and targets.

        Targets are the labels themselves without mixing, else float32 `[B, K]` that sum to 1.
        """
        spec = self.augment
        if spec.flip:
            inputs = flip(inputs, generator)
        if spec.pad:
            inputs = shift(inputs, spec.pad, generator)
        if self._affine:
            inputs = affine(inputs, spec, generator)
        if spec.erasing:
            inputs = erase(inputs, spec.erasing, generator)
        if not (spec.mixup or spec.cutmix):
            return inputs, labels
        targets = F.one_hot(labels, self.num_classes).float()
        return mix(inputs, targets, spec, generator)


def _uniform(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator)


def flip(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored left and right with probability 1/2."""
    mirrored = _uniform(len(inputs), generator=generator) < 0.5
    return torch.where(mirrored.to(inputs.device).view(-1, 1, 1, 1), inputs.flip(-1), inputs)


def shift(inputs: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `pad` pixels along both axes; zeros come in."""
    batch, channels, height, width = inputs.shape
    moves = torch.randint(0, 2 * pad + 1, (2, batch, 1), generator=generator)
    rows = moves[0] + torch.arange(height)  # [b, h]
    columns = moves[1] + torch.arange(width)  # [b, w]
    where = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).view(batch, 1, -1)
    where = where.to(inputs.device).expand(-1, channels, -1)  # [b, c, h w]
    padded = F.pad(inputs, [pad] * 4).flatten(2)
    return padded.gather(2, where).view_as(inputs)


def affine(inputs: Tensor, spec: AugmentSpec, generator: torch.Generator) -> Tensor:
    """Each image rotated, scaled, moved and sheared at random about its centre.

    Bilinear; outside the image its border pixels go on (the background of a normalised image is
    seldom 0).
    """
    height, width = inputs.shape[2:]
    draws = 2 * _uniform(5, len(inputs), generator=generator) - 1
    angle = draws[0] * math.radians(spec.rotate)
    size = 1 + draws[1] * spec.scale
    skew = torch.tan(draws[2] * math.radians(spec.shear))
    cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
    aspect = height / width  # grid coordinates run from -1 to 1 along either side
    rows = [
        torch.stack([cos, (cos * skew - sin) * aspect, 2 * spec.translate * draws[3]], 1),
        torch.stack([sin / aspect, sin * skew + cos, 2 * spec.translate * draws[4]], 1),
    ]
    theta = torch.stack(rows, 1).to(inputs.device)  # [b, 2, 3]
    grid = F.affine_grid(theta, list(inputs.shape), align_corners=False)
    moved = F.grid_sample(
        inputs.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return moved.to(inputs.dtype)


def erase(inputs: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Random erasing (Zhong et al., arXiv 1708.04896): a box of 2 to 33 % of the area and aspect
    0.3 to 3.3 filled with normal noise of its own, in each image with `probability`.

    The noise is drawn by a second generator, seeded by the draws of the boxes. `generator` moves on
    by one image of normal numbers, whatever the boxes are.
    """
    batch, channels, height, width = inputs.shape
    draws = _uniform(5, batch, 1, generator=generator)
    torch.randn((channels, height, width), generator=generator)
    bits = draws[0].view(torch.int32).flatten().tolist()
    own = torch.Generator().manual_seed(derived_seed(0, "erasing", *bits))
    area = (0.02 + 0.31 * draws[1]) * height * width
    aspect = torch.exp((2 * draws[2] - 1) * math.log(1 / 0.3))
    h = torch.sqrt(area * aspect).round().clamp(1, height)
    w = torch.sqrt(area / aspect).round().clamp(1, width)
    top = (draws[3] * (height - h + 1)).floor()
    left = (draws[4] * (width - w + 1)).floor()
    y, x = torch.arange(height), torch.arange(width)
    rows = (y >= top) & (y < top + h) & (draws[0] < probability)  # [b, h]
    columns = (x >= left) & (x < left + w)  # [b, w]
    box = (rows[:, None, :, None] & columns[:, None, None, :]).expand(-1, channels, -1, -1)
    noise = torch.randn(int(box.sum()), generator=own)
    return inputs.masked_scatter(box.to(inputs.device), noise.to(inputs))


def mix(
    inputs: Tensor, targets: Tensor, spec: AugmentSpec, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899) of each image with the one before.

    One draw per batch: of the method, if both are on, of lambda from Beta(a, a), and of the box.
    """
    height, width = inputs.shape[2:]
    seed = torch.randint(0, 2**62, (), generator=generator)
    rng = random.Random(int(seed))
    use_cutmix = bool(spec.cutmix) and (not spec.mixup or rng.random() < 0.5)
    alpha = spec.cutmix if use_cutmix else spec.mixup
    keep = rng.betavariate(alpha, alpha)
    others = inputs.roll(1, 0)
    if use_cutmix:
        side = math.sqrt(1 - keep)
        top, bottom = _interval(height, side, rng)
        left, right = _interval(width, side, rng)
        inputs = inputs.clone()
        inputs[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
        keep = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        inputs = torch.lerp(others, inputs, keep)
    return inputs, torch.lerp(targets.roll(1, 0), targets, keep)


def _interval(length: int, share: float, rng: random.Random) -> tuple[int, int]:
    """`share` of `length` around a random point, cut off at the ends."""
    middle, half = rng.uniform(0, length), share * length / 2
    return max(0, round(middle - half)), min(length, round(middle + half))
