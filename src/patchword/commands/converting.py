"""`patchword convert`: weights of one format to another, with proof that they say the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from patchword.data.class_names import ClassNames
from patchword.weights.load import WeightsFile, describe_weights, load_model
from patchword.weights.save import save_model

IMAGES = 4


@dataclass(frozen=True)
class Conversion:
    """What was found, what was written, and how far the two are apart."""

    found: WeightsFile
    written: WeightsFile
    difference: float
    """largest absolute difference of the logits (of the features, without a head) on `IMAGES`
    images of normal noise, between the model before and after writing and reading it"""
    scale: float
    """largest absolute logit of the model before"""

    @property
    def parity(self) -> str:
        """The difference, on a line."""
        return (
            f"worst logit difference {self.difference:.3g} on {IMAGES} random images, of logits up "
            f"to {self.scale:.3g}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `patchword convert --json`."""
        return {
            "found": _row(self.found),
            "written": _row(self.written),
            "worst_logit_difference": self.difference,
            "largest_logit": self.scale,
        }


def _row(file: WeightsFile) -> dict[str, Any]:
    spec = file.spec
    return {
        "path": str(file.path),
        "format": file.format,
        "model": file.model,
        "image_size": list(spec.image_size),
        "num_classes": spec.num_classes,
        "notes": list(file.notes),
    }


def convert(
    source: str | Path,
    out: str | Path,
    *,
    format: str,
    trust_pickle: bool = False,
    classes: ClassNames | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write the weights of `source`, anything that `load_model` takes, to `out` in a format, with
    `classes` as the names of the classes.

    Raises `PatchwordError` if they cannot be read, the format cannot hold them, or `out` exists and
    `overwrite` is not set; `UsageError` on unknown formats.
    """
    found = describe_weights(source, trust_pickle=trust_pickle)
    before = load_model(source, trust_pickle=trust_pickle, classes=classes)
    path = save_model(before, out, format=format, overwrite=overwrite)
    spec = before.spec
    images = torch.randn(
        IMAGES, spec.in_channels, *spec.image_size, generator=torch.Generator().manual_seed(0)
    )
    with torch.inference_mode():
        wanted = before(images)
        del before
        after = load_model(path, image_size=spec.image_size, trust_pickle=True)
        difference = (after(images) - wanted).abs().max().item()
    written = describe_weights(path, trust_pickle=True, image_size=spec.image_size)
    return Conversion(found, written, difference, wanted.abs().max().item())
