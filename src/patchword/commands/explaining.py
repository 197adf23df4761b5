"""`patchword explain`: why a model gives images their class."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import torch
from torch import Tensor

from patchword.commands.figure_folder import file_names, numbers
from patchword.evaluation.matching import match_classes
from patchword.inspection.explain import Explanation, explain_class
from patchword.inspection.figures.drawing import Format, encode
from patchword.inspection.figures.explain import draw_explanation
from patchword.inspection.removal import drops_tokens
from patchword.models.model import Model
from patchword.models.vit import ViT
from patchword.session.session import Images, Loading, Session
from patchword.spec.parse import PatchwordError, UsageError, at_least, nearest

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
    images: Images,
    *,
    label: str | None = None,
    out: str | Path | None = None,
    window: int | None = None,
    overwrite: bool = False,
    bad: dict[str, str] | None = None,
    **loading: Unpack[Loading],
) -> Explanations:
    """Explain each image's most probable class, or the class named `label`, with a picture each.

    `images` are those of `predict`, as is `bad`. `out` is the picture, `.png` or `.pdf`, if there
    is one image, or a folder of pictures `NAME.png`; by default they are `explain-NAME.png` in the
    working directory. `window`: so many patches a side are taken away at a time for the occlusion
    map; None is 1 up to 16 x 16 patches, else what 256 passes allow. `model` and `loading` are
    those of `Session`, but for `batch_size`: images with patches taken away that the model is given
    at a time.

    Raises `PatchwordError` if the model is missing or damaged or has fewer than two classes, no
    image can be read, or a picture exists and `overwrite` is not set; `UsageError` if the model has
    no such class, a number is out of range, or several images are to go into one picture.
    """
    at_least("window", window, 1)
    at_least("batch_size", loading.get("batch_size"), 1)
    session = Session(model, precision="float32", **loading)
    names = session.classifier.names
    wanted = None if label is None else _class_named(label, names)
    source = session.images(images)
    pictures = _pictures(source.keys, out, overwrite)
    if not isinstance(session.net, ViT):
        logger.info(
            "rollout does not apply: a %s has no attention; explained by occlusion alone",
            type(session.net).__name__,
        )
    found: list[Explained] = []
    start, everything = time.perf_counter(), np.arange(len(source))
    with session.console.status("") as status:
        for images_read, at in session.readable(source, everything, batch_size=READ_AHEAD):
            for pixels, index in zip(images_read, map(int, at), strict=True):
                rate = (time.perf_counter() - start) / max(len(found), 1)
                done = f"{len(found):,}/{len(source):,} images explained, {rate:.1f} s each"
                status.update(done)
                place = source.keys[index], pictures[index]
                found.append(_explained(session, pixels, wanted, window, *place))
    if bad is not None:
        bad |= session.bad
    drops = drops_tokens(session.net)
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
    session: Session,
    pixels: Tensor,
    wanted: int | None,
    window: int | None,
    path: str,
    picture: Path,
) -> Explained:
    """One image, uint8 `[C, H, W]`, explained, with its picture drawn."""
    model = session.classifier
    shares = model.probabilities(model.logits(pixels[None]))[0]
    best = int(shares.argmax())
    target = best if wanted is None else wanted
    (found,) = explain_class(
        session.net,
        session.inputs(pixels[None]),
        torch.tensor([target]),
        window=window,
        batch_size=session.batch_size,
    )
    figure = draw_explanation(pixels.permute(1, 2, 0).numpy(), found, model.names[target])
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(encode(figure, FORMATS[picture.suffix.lower()]))
    return Explained(
        path=path,
        label=model.names[target],
        predicted=model.names[best],
        predicted_probability=float(shares[best]),
        explanation=found,
        picture=picture,
    )


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
