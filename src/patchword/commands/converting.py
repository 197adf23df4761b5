"""`patchword convert`: weights of one format to another, with proof that they say the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from patchword.data.class_names import ClassNames
from patchword.models.model import Model
from patchword.spec.parse import PatchwordError
from patchword.weights.formats import FORMATS, WeightFormat
from patchword.weights.load import (
    WeightsFile,
    assembled,
    describe_weights,
    load_model,
    read_weights,
)
from patchword.weights.save import saving, untold

IMAGES = 4
ARCHITECTURE = ("heads", "activation")
"""What a reader of a lone state dict has to know, as it has to know the library's model; the eps of
the norms is what the library has."""


@dataclass(frozen=True)
class Conversion:
    """What was read, what was written, and how far the two are apart."""

    source: WeightsFile
    written: WeightsFile
    difference: float
    """largest absolute difference of the logits (of the features, without a head) on `IMAGES`
    images of normal noise, between the model before and after writing and reading it"""
    scale: float
    """largest absolute logit of the model before"""
    told: dict[str, Any]
    """what the file does not tell of the architecture, and its reader was told"""

    @property
    def parity(self) -> str:
        """The difference, on a line."""
        told = ", ".join(f"{name}={value}" for name, value in self.told.items())
        return (
            f"worst logit difference {self.difference:.3g} on {IMAGES} random images, of logits up "
            f"to {self.scale:.3g}{told and f', read with {told}'}"
        )

    def check(self, tolerance: float) -> None:
        """Raises `PatchwordError` unless the logits agree, relative to the largest."""
        if self.difference <= tolerance * self.scale:  # false of NaN
            return
        raise PatchwordError(
            f"{self.written.path} is not kept: {self.parity}, which is more than {tolerance:g} of "
            "them; write another format, such as patchword's own"
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `patchword convert --json`."""
        return {
            "found": _row(self.source),
            "written": _row(self.written),
            "worst_logit_difference": self.difference,
            "largest_logit": self.scale,
            "read_with": self.told,
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

    Raises `PatchwordError` if they cannot be read, the format cannot hold them, `out` exists and
    `overwrite` is not set, or what was written gives other logits by more than
    `WeightFormat.tolerance`: then `out` stays as it was; `UsageError` on unknown formats.
    """
    file = describe_weights(source, trust_pickle=trust_pickle)
    model = load_model(source, trust_pickle=trust_pickle, classes=classes)
    spec, tolerances = model.spec, {known.name: known.tolerance for known in FORMATS}
    tolerance = tolerances.get(format, WeightFormat.tolerance)
    images = torch.randn(
        IMAGES, spec.in_channels, *spec.image_size, generator=torch.Generator().manual_seed(0)
    )
    with saving(model, out, format=format, overwrite=overwrite) as place, torch.inference_mode():
        before = model(images)
        written = describe_weights(place, trust_pickle=True, image_size=spec.image_size)
        told = {k: v for k, v in untold(spec, written.spec).items() if k in ARCHITECTURE}
        after = _read(place, spec.image_size, told)(images)
        conversion = Conversion(
            source=file,
            written=replace(written, path=Path(out)),
            difference=(after - before).abs().max().item(),
            scale=before.abs().max().item(),
            told=told,
        )
        conversion.check(tolerance)
    return conversion


def _read(path: Path, image_size: tuple[int, int], told: dict[str, Any]) -> Model:
    tensors, file = read_weights(path, trust_pickle=True, image_size=image_size, **told)
    return assembled(tensors, file, file.spec, quiet=True).eval()
