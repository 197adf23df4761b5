"""What every family of models has in common: images in, pooled features, a head."""

from __future__ import annotations

import math
from typing import ClassVar, Generic

from torch import Tensor, nn
from typing_extensions import TypeVar

from patchword.spec.batch import Grid, Outputs
from patchword.spec.model import (
    CalibrationSpec,
    Loss,
    MixerSpec,
    ModelSpec,
    PreprocessSpec,
    ViTSpec,
)
from patchword.spec.parse import PatchwordError

Spec = TypeVar("Spec", bound=ModelSpec, default=ModelSpec, covariant=True)


class Model(nn.Module, Generic[Spec]):
    """A model as its `spec` describes it.

    `model(images)`: float `[B, C, H, W]`, normalised by `preprocess.mean` and `.std`, to logits
    `[B, K]`, or to the pooled features `[B, D]` if the spec has no classes. `classes` names the
    logits; it is empty if nobody has named them. `calibration` holds the temperature of the
    probabilities, None if nobody has measured it; the logits are the same with and without.
    """

    HEADS: ClassVar[tuple[str, ...]] = ("head.", "pre_logits.")
    """how the names of the tensors begin that belong to the classes, not to the body"""

    def __init__(
        self, spec: Spec, preprocess: PreprocessSpec | None, classes: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.preprocess = preprocess or PreprocessSpec()
        self.classes = classes
        self.calibration: CalibrationSpec | None = None
        self.spec = spec
        self.head: nn.Linear | None = None

    def features(self, images: Tensor) -> Outputs:
        """Pooled features `[B, D]`, tokens `[B, N, D]`, and the grid, of images `[B, C, H, W]`.

        Raises `PatchwordError` if the images are not of a size that the model takes.
        """
        raise NotImplementedError

    def pooled_features(self, images: Tensor) -> Tensor:
        """`features(images).pooled` alone, `[B, D]`, which may cost less."""
        return self.features(images).pooled

    def represent(self, pooled: Tensor) -> Tensor:
        """What the head's last layer takes, "pre-logits": of pooled features `[B, D]` they
        themselves, or after the hidden layer that the head may have, `[B, D']`."""
        return pooled

    def classify(self, pooled: Tensor) -> Tensor:
        """The head: `[B, D]` to logits `[B, K]`; the identity if the spec has no classes."""
        represented = self.represent(pooled)
        return represented if self.head is None else self.head(represented)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.features(images).pooled)

    @property
    def temperature(self) -> float:
        """What logits are divided by before they become probabilities; 1 without calibration."""
        return temperature(self.calibration)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits `[B, K]` to probabilities `[B, K]`, float64, at the model's temperature."""
        return probabilities(logits, self.spec.probability, self.calibration)

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) in pixels; of a ResNet, which has no patches, a pixel."""
        return self.spec.patch_size if isinstance(self.spec, ViTSpec | MixerSpec) else (1, 1)

    def grid_of(self, images: Tensor) -> Grid:
        """(rows, columns) of the patches of images `[B, C, H, W]`, whatever their size."""
        height, width = self.patch_size
        return int(images.shape[2]) // height, int(images.shape[3]) // width

    def check(self, images: Tensor) -> None:
        """Raises `PatchwordError` unless the model can take `images`: `[B, C, H, W]` of the spec's
        channels, and of sides that the patches divide."""
        channels, (height, width) = self.spec.in_channels, self.patch_size
        if (
            images.ndim != 4
            or images.shape[1] != channels
            or min(images.shape[2:]) < 1
            or images.shape[2] % height
            or images.shape[3] % width
        ):
            sizes = f"multiples of {height} x {width} pixels" if height * width > 1 else "any size"
            raise PatchwordError(
                f"images are {list(images.shape)}, the model takes [B, {channels}, H, W] of "
                f"{sizes}; resize or convert them"
            )

    def part_macs(self, training: bool = False) -> list[int]:
        """Multiply-accumulates of one image's forward pass, of the spec's size: of what comes
        before the blocks, of each block, and of the head; in `training` without the patches that
        are dropped (`ViTSpec.patch_dropout`)."""
        raise NotImplementedError

    def macs(self) -> int:
        """Multiply-accumulates of one image's forward pass, of the spec's size."""
        return sum(self.part_macs())


def temperature(calibration: CalibrationSpec | None) -> float:
    """What logits are divided by before they become probabilities; 1 without calibration."""
    return 1.0 if calibration is None else calibration.temperature


def probabilities(logits: Tensor, kind: Loss, calibration: CalibrationSpec | None) -> Tensor:
    """Logits `[B, K]` to probabilities `[B, K]`, float64: softmax, or with `sigmoid` each class by
    itself, at the temperature of the calibration."""
    scaled = logits.double() / temperature(calibration)
    return scaled.softmax(dim=1) if kind == "softmax" else scaled.sigmoid()


def init_head(head: nn.Linear | None) -> None:
    """Zero, as the paper's new heads are (section 3.2)."""
    if head is not None:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)


def init_lecun(weight: Tensor) -> None:
    """Truncated normal whose standard deviation after truncation is 1 / sqrt(fan-in); `weight` is
    `[out, in]` or `[out, in, kh, kw]`."""
    std = 1 / (0.87962566103423978 * math.sqrt(weight[0].numel()))
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def init_linear(layer: nn.Linear) -> None:
    """Xavier uniform weight, zero bias."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
