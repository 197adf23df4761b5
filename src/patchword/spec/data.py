"""How images are found, divided, cut and augmented, as frozen keyword-only dataclasses.

Standard library only, so that the command line can build its help without importing torch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from patchword.spec import ranges
from patchword.spec.model import Interpolation, PreprocessSpec, Resize
from patchword.spec.ranges import Range, check_ranges, may_change, require

_MAGNITUDE = Range(lambda value: 0 <= value <= 30, "it must be in [0, 30]")


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Changes to the preprocessing; None leaves that of the weights, or `PreprocessSpec`'s."""

    mean: tuple[float, ...] | None = None
    """per channel, of pixel values in [0, 1]"""
    std: tuple[float, ...] | None = None
    interpolation: Interpolation | None = None
    resize: Resize | None = None
    """`short`: the short side to image size / crop_fraction, then a centre crop;
    `stretch`: straight to the image size"""
    crop_fraction: float | None = None

    def over(self, base: PreprocessSpec) -> PreprocessSpec:
        """`base` with the values that are set."""
        given = {key: value for key, value in vars(self).items() if value is not None}
        return dataclasses.replace(base, **given)


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Where the images come from and how they are divided."""

    val_fraction: float = ranges.BELOW_ONE(0.1)
    """held out to choose the best weights, where the data has no val split"""
    test_fraction: float = ranges.BELOW_ONE(0.1)
    """held out for the final figure, where the data has no split at all"""
    train_images: int | None = ranges.ONE_OR_MORE(None)
    """train on so many images at most, drawn by the seed, of each class in proportion"""
    on_bad_image: Literal["skip", "fail"] = "skip"
    cache: Literal["auto", "on", "off"] = may_change("auto")
    """keep decoded images in memory when the per-image transform is not random"""
    balance: Literal["none", "sampler", "loss"] = "none"
    """where classes differ in size: `sampler` draws all of them equally often, `loss` weights each
    image by the inverse of its class's frequency"""

    def __post_init__(self) -> None:
        check_ranges(self)
        require(self.val_fraction + self.test_fraction < 1, "nothing is left to train on")


@dataclass(frozen=True, kw_only=True)
class AugmentSpec:
    """The training transform. Crop and RandAugment run per image in the workers, the rest per
    batch on the device."""

    crop: Literal["inception", "resize"] = "inception"
    """`inception`: random area and aspect ratio; `resize`: as in evaluation"""
    crop_area: tuple[float, float] = (0.05, 1.0)
    """range of the crop's share of the image's area"""
    crop_aspect: tuple[float, float] = (0.75, 4 / 3)
    flip: bool = True
    """mirror left and right, half of the time"""
    pad: int = ranges.NOT_NEGATIVE(0)
    """shift at random by up to this many pixels, zeros (grey) coming in"""
    rotate: float = ranges.NOT_NEGATIVE(0.0)
    """largest angle of a random affine map, degrees"""
    scale: float = ranges.NOT_NEGATIVE(0.0)
    """largest relative change of size, 0.1 = between 0.9 and 1.1"""
    translate: float = ranges.NOT_NEGATIVE(0.0)
    """largest shift as a share of the image's side"""
    shear: float = ranges.NOT_NEGATIVE(0.0)
    """largest shear, degrees"""
    randaugment_layers: int = ranges.NOT_NEGATIVE(0)
    randaugment_magnitude: float = Range(lambda value: 0 <= value <= 30, "it must be in [0, 30]")(
        0.0
    )
    """0 to 30; 10 is RandAugment's original full scale"""
    mixup: float = ranges.NOT_NEGATIVE(0.0)
    """Beta(a, a) parameter, 0 for none"""
    cutmix: float = ranges.NOT_NEGATIVE(0.0)
    """Beta(a, a) parameter, 0 for none; with mixup, each batch draws one of the two"""
    erasing: float = ranges.UP_TO_ONE(0.0)
    """probability of erasing a random box of an image"""

    def __post_init__(self) -> None:
        low, high = self.crop_area
        require(0 < low <= high <= 1, f"crop_area {self.crop_area} must be in (0, 1]")
        low, high = self.crop_aspect
        require(
            0 < low <= high < math.inf, f"crop_aspect {self.crop_aspect} must be positive and rise"
        )
        check_ranges(self)
        require(self.scale < 1, f"scale is {self.scale}; it must be below 1")
