"""`patchword explain`: why a model gives images their class."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from patchword.commands.figure_folder import file_names, numbers
from patchword.data.class_names import ClassNames
from patchword.data.loader import eval_batches
from patchword.data.transforms import EvalTransform, to_input
from patchword.evaluation.matching import match_classes
from patchword.inspection.explain import Explanation, explain_class
from patchword.inspection.figures.drawing import Format, encode
from patchword.inspection.figures.explain import draw_explanation
from patchword.inspection.removal import drops_tokens
from patchword.models.model import Model
from patchword.models.vit import ViT
from patchword.session.measuring import (
    eval_workers,
    find_images,
    image_source,
    load_classifier,
)
from patchword.spec.parse import PatchwordError, UsageError, nearest
from patchword.spec.train import Device

logger = logging.getLogger("patchword")
READ_AHEAD = 16
"""Images decoded at a time"""
FORMATS: dict[str, Format] = {".png": "png", ".pdf": "pdf"}


@dataclass(frozen=True, kw_only=True)
class Explained:
    """An image, why it has a class, and where the picture of that lies."""

    path: str
    label: str
    """of the class that is explained"""
    predicted: str
    """the most probable class"""
    predicted_probability: float
    explanation: Explanation
    picture: Path

    def to_dict(self) -> dict[str, Any]:
        """Part of the JSON of `patchword explain --json`."""
        found = self.explanation
        return {
            "path": self.path,
            "class": self.label,
            "probability": found.probability,
            "predicted": self.predicted,
            "predicted_probability": self.predicted_probability,
            "agreement": found.agreement,
            "maps": {name: numbers(values) for name, values in found.maps.items()},
            "curves": {
                name: {
                    "shares": numbers(curves.shares),
                    "deletion": numbers(curves.deletion),
                    "insertion": numbers(curves.insertion),
                    "deletion_score": found.scores[name][0],
                    "insertion_score": found.scores[name][1],
                }
                for name, curves in found.curves.items()
            },
            "picture": str(self.picture),
        }


@dataclass(frozen=True, kw_only=True)
class Explanations:
    """What `explain_images` found."""

    images: list[Explained]
    taken_away_by: Literal["leaving out tokens", "painting in the mean colour"]
    """how a patch is taken from an image"""

    def mean(self) -> dict[str, Any]:
        """Means over the images: `deletion` and `insertion`, for each map and `random`, and the
        `agreement`, over the images that have one, or None."""
        found = [row.explanation for row in self.images]
        agreements = [one.agreement for one in found if one.agreement is not None]
        scores = {name: np.mean([one.scores[name] for one in found], 0) for name in found[0].curves}
        return {
            "deletion": {name: float(area[0]) for name, area in scores.items()},
            "insertion": {name: float(area[1]) for name, area in scores.items()},
            "agreement": float(np.mean(agreements)) if agreements else None,
        }

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `patchword explain --json`."""
        rows = [row.to_dict() for row in self.images]
        return {"taken_away_by": self.taken_away_by, "mean": self.mean(), "images": rows}


def explain_images(
    model: str | Path | Model,
    images: str | Path | Sequence[str | Path],
    *,
    label: str | None = None,
    out: str | Path | None = None,
    window: int | None = None,
    overwrite: bool = False,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int | None = None,
    device: Device = "auto",
    workers: int | None = None,
    trust_pickle: bool = False,
    classes: ClassNames | None = None,
    bad: dict[str, str] | None = None,
    console: Console | None = None,
) -> Explanations:
    """Explain each image's most probable class, or the class named `label`, with a picture each.

    `images` are those of `predict`, as is `bad`. `out` is the picture, `.png` or `.pdf`, if there
    is one image, or a folder of pictures `NAME.png`; by default they are `explain-NAME.png` in the
    working directory. `window`: so many patches a side are taken away at a time for the occlusion
    map; None is 1 up to 16 x 16 patches, else what 256 passes allow. `batch_size`: images with
    patches taken away that the model is given at a time.

    `classes` as in `evaluate`.

    Raises `PatchwordError` if the model is missing or damaged or has fewer than two classes, no
    image can be read, or a picture exists and `overwrite` is not set; `UsageError` if the model has
    no such class, a number is out of range, or several images are to go into one picture.
    """
    for name, value in (("window", window), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; use 1 or more")
    net, _, where = load_classifier(model, image_size, device, "float32", trust_pickle, classes)
    names = net.classes or tuple(str(i) for i in range(net.spec.num_classes))
    wanted = None if label is None else _class_named(label, names)
    bad = {} if bad is None else bad
    paths = find_images([images] if isinstance(images, str | Path) else images, bad)
    pictures = _pictures(paths, out, overwrite)
    console = console or Console(stderr=True, markup=False, emoji=False)
    if not isinstance(net, ViT):
        logger.info(
            "rollout does not apply: a %s has no attention; explained by occlusion alone",
            type(net).__name__,
        )
    found: list[Explained] = []
    start = time.perf_counter()
    with console.status("") as status:
        for at, pixels in _readable(net, paths, workers, bad):
            rate = (time.perf_counter() - start) / max(len(found), 1)
            status.update(f"{len(found):,}/{len(paths):,} images explained, {rate:.1f} s each")
            inputs = to_input(pixels[None].to(where), net.preprocess)
            found.append(
                _explained(net, inputs, names, wanted, window, batch_size, paths[at], pictures[at])
            )
            _draw(found[-1], pixels)
    drops = drops_tokens(net)
    return Explanations(
        images=found,
        taken_away_by="leaving out tokens" if drops else "painting in the mean colour",
    )


def _class_named(label: str, names: Sequence[str]) -> int:
    """The model's class of that name, or by ImageNet's. Raises `PatchwordError` if it is several,
    `UsageError` if there is none."""
    (index,) = match_classes([label], names)
    if index < 0:
        raise UsageError(f"the model has no class {label!r}{nearest(label, names)}")
    return index


def _explained(
    net: Model,
    inputs: Tensor,
    classes: Sequence[str],
    wanted: int | None,
    window: int | None,
    batch_size: int | None,
    path: str,
    picture: Path,
) -> Explained:
    """One image, normalised, `[1, C, H, W]`, explained."""
    with torch.no_grad():
        shares = net.probabilities(net(inputs).float().cpu())[0]
    best = int(shares.argmax())
    target = best if wanted is None else wanted
    (found,) = explain_class(
        net, inputs, torch.tensor([target]), window=window, batch_size=batch_size
    )
    return Explained(
        path=path,
        label=classes[target],
        predicted=classes[best],
        predicted_probability=float(shares[best]),
        explanation=found,
        picture=picture,
    )


def _draw(row: Explained, pixels: Tensor) -> None:
    """The picture of an image, uint8 `[C, H, W]`, into its file."""
    figure = draw_explanation(pixels.permute(1, 2, 0).numpy(), row.explanation, row.label)
    row.picture.parent.mkdir(parents=True, exist_ok=True)
    row.picture.write_bytes(encode(figure, FORMATS[row.picture.suffix.lower()]))


def _readable(
    net: Model, paths: Sequence[str], workers: int | None, bad: dict[str, str]
) -> Iterator[tuple[int, Tensor]]:
    """The places and pixels, uint8 `[C, H, W]`, of the images that can be read; others go into
    `bad`. Raises `PatchwordError` if none can be read."""
    for batch in eval_batches(
        image_source(paths),
        np.arange(len(paths)),
        EvalTransform(net.spec.image_size, net.spec.in_channels, net.preprocess),
        batch_size=READ_AHEAD,
        workers=eval_workers(workers, len(paths)),
        on_bad="skip",
    ):
        for index, reason in batch.bad:
            logger.warning("cannot read %s: %s", paths[index], reason)
            bad[paths[index]] = reason
        for row in batch.mask.nonzero()[:, 0].tolist():
            yield int(batch.indices[row]), batch.images[row]


def _pictures(paths: Sequence[str], out: str | Path | None, overwrite: bool) -> list[Path]:
    """Where the picture of each image goes."""
    names = file_names(paths)
    if out is None:
        pictures = [Path(f"explain-{name}.png") for name in names]
    elif Path(out).suffix.lower() in FORMATS:
        if len(paths) > 1:
            raise UsageError(f"{len(paths)} images do not go into {out}; give a folder as --out")
        pictures = [Path(out)]
    else:
        if Path(out).is_file():
            raise PatchwordError(f"{out} is a file; give a .png, a .pdf or a folder as --out")
        pictures = [Path(out) / f"{name}.png" for name in names]
    there = next((picture for picture in pictures if picture.exists()), None)
    if there is not None and not overwrite:
        raise PatchwordError(f"{there} exists; give another --out, or pass --overwrite")
    return pictures
