"""What a finished run shows: the report and the model card."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path

import numpy as np
import torch

from patchword.data.images import BadImage, decode
from patchword.data.sources import Source
from patchword.data.transforms import EvalTransform, to_input
from patchword.evaluation.classify import Classification
from patchword.inspection.attention import measure_attention, rollout, uniform_distance
from patchword.inspection.figures.attention import draw_attention_distance, draw_rollout
from patchword.inspection.figures.drawing import encode
from patchword.inspection.figures.embedding import draw_filters
from patchword.inspection.of_model import NotApplicable, model_filters, model_positions
from patchword.models.model import Model
from patchword.models.vit import ViT
from patchword.report import THUMBNAIL, Mistake, write_report
from patchword.report.card import write_model_card

MISTAKES = 24
LOOKED_AT = 8
"""images that the figures of attention are made from: a second or two of a run"""
ROLLOUTS = 2
"""of them, those whose rollout is shown"""


def report_run(
    run: Path,
    model: Model,
    source: Source,
    result: Classification,
    split: str,
    flags: str = "",
) -> None:
    """Write `report.html` and `MODEL_CARD.md` into a run directory; `flags` are what its command
    had besides the settings in `config.json`."""
    config, again = shlex.quote(f"{run}/config.json"), shlex.quote(f"{run}-again")
    reproduce = f"patchword train --config {config}{flags} --out {again}"
    write_report(
        run,
        result=result,
        split=split,
        mistakes=worst_mistakes(source, result),
        figures=inside(model, source, result.indices),
        reproduce=reproduce,
    )
    write_model_card(run, result=result, split=split, reproduce=reproduce)


def inside(model: Model, source: Source, indices: np.ndarray) -> dict[str, bytes]:
    """Title -> PNG of what can be seen in the model and, by some of the images at `indices`, in its
    attention."""
    some = indices[np.unique(np.linspace(0, len(indices) - 1, LOOKED_AT).round().astype(np.int64))]
    images = _images(model, source, some)
    found: dict[str, bytes] = {}
    with contextlib.suppress(NotApplicable):
        found["Patch embedding filters"] = encode(draw_filters(*model_filters(model)))
    if not len(images):
        return found
    device = next(model.parameters()).device
    inputs = to_input(torch.from_numpy(images).to(device), model.preprocess)
    with contextlib.suppress(NotApplicable):
        positions = model_positions(model, inputs)
        found[positions.title] = encode(positions.draw())
    if isinstance(model, ViT):
        distance = measure_attention(model, [inputs]).distance
        drawn = draw_attention_distance(
            distance, uniform=uniform_distance(model.spec), images=len(images)
        )
        found["Mean attention distance"] = encode(drawn)
        for number, mask in enumerate(rollout(model, inputs[:ROLLOUTS]), 1):
            image = images[number - 1].transpose(1, 2, 0)
            found[f"Attention rollout, image {number}"] = encode(draw_rollout(image, mask))
    return found


def _images(model: Model, source: Source, indices: np.ndarray) -> np.ndarray:
    """uint8 `[n, C, H, W]`: those that can be read."""
    transform = EvalTransform(model.spec.image_size, model.spec.in_channels, model.preprocess)
    found: list[np.ndarray] = []
    for index in indices.tolist():
        with contextlib.suppress(BadImage):
            found.append(transform(source.read(index)))
    return np.stack(found) if found else np.zeros((0, 0, 0, 0), np.uint8)


def worst_mistakes(source: Source, result: Classification) -> list[Mistake]:
    """The most confident mistakes, with thumbnails."""
    names = list(result.per_class)
    found: list[Mistake] = []
    for at in result.mistakes(MISTAKES):
        index = int(result.indices[at])
        try:
            image = decode(source.read(index), source.channels, at_least=(THUMBNAIL, THUMBNAIL))
        except BadImage:
            continue
        found.append(
            Mistake(
                key=source.keys[index],
                label=names[int(result.labels[at])],
                predicted=names[int(result.predicted[at])],
                probability=float(result.confidence[at]),
                thumbnail=image,
            )
        )
    return found
