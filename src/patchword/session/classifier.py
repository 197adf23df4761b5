"""A classifier: what is known of it, and what it says of pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from patchword.data.transforms import to_input
from patchword.models.model import Model, probabilities, temperature
from patchword.session.device import Working
from patchword.spec.model import CalibrationSpec, Loss, PreprocessSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class Classifier:
    """What classifies images, whatever computes it."""

    image_size: tuple[int, int]
    """(height, width) in pixels"""
    in_channels: int
    num_classes: int
    """K, at least 1"""
    probability: Loss
    """how logits become probabilities"""
    preprocess: PreprocessSpec
    classes: tuple[str, ...]
    """names of the classes; none if nobody has named them"""
    calibration: CalibrationSpec | None
    origin: str | None
    """what it was loaded from, as the user named it; None for a model that was passed in"""
    logits: Callable[[Tensor], Tensor]
    """uint8 images `[B, C, H, W]`, cut and resized, to float32 logits `[B, K]` on the CPU"""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the K classes; their numbers if nobody has named them."""
        return self.classes or tuple(map(str, range(self.num_classes)))

    @property
    def temperature(self) -> float:
        """What logits are divided by before they become probabilities; 1 without calibration."""
        return temperature(self.calibration)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits `[B, K]` to probabilities `[B, K]`, float64."""
        return probabilities(logits, self.probability, self.calibration)


def torch_classifier(
    working: Working, device: torch.device, model: Model, origin: str | None
) -> Classifier:
    """A model with a head, in evaluation mode on `device`, computed by its working copy."""

    def logits(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return working(to_input(images.to(device), model.preprocess)).cpu()

    spec = model.spec
    return Classifier(
        image_size=spec.image_size,
        in_channels=spec.in_channels,
        num_classes=spec.num_classes,
        probability=spec.probability,
        preprocess=model.preprocess,
        classes=model.classes,
        calibration=model.calibration,
        origin=origin,
        logits=logits,
    )
