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
from patchword.report.blocks import Mistake
from patchword.report.markdown import write_card
from patchword.report.page import THUMBNAIL, write_page
from patchword.report.record import read_run
from patchword.report.sections import Results

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
    """Write the report and the card of a classifier; `flags` are what its command had besides the
    settings in `config.json`."""
    results = Results(
        result=result,
        split=split,
        mistakes=worst_mistakes(source, result),
        figures=inside(model, source, result.indices),
        reproduce=again(run, flags),
    )
    write_reports(run, results)


def write_reports(run: Path, results: Results) -> None:
    """Write `report.html` and `MODEL_CARD.md` into a run directory."""
    record = read_run(run)
    write_page(record, results)
    write_card(record, results)


def again(run: Path, flags: str = "") -> str:
    """The command line that repeats a run; of several, `flags` tell how many."""
    config, out = shlex.quote(f"{run}/config.json"), shlex.quote(f"{run}-again")
    return f"patchword train --config {config}{flags or ' --settled'} --out {out}"


def spread(indices: np.ndarray, most: int) -> np.ndarray:
    """Up to so many of them, evenly."""
    return indices[np.unique(np.linspace(0, len(indices) - 1, most).round().astype(np.int64))]


def inside(model: Model, source: Source, indices: np.ndarray) -> dict[str, bytes]:
    """Title -> PNG of what can be seen in the model and, by some of the images at `indices`, in its
    attention."""
    images = _images(model, source, spread(indices, LOOKED_AT))
    drawn: dict[str, bytes] = {}
    with contextlib.suppress(NotApplicable):
        drawn["Patch embedding filters"] = encode(draw_filters(*model_filters(model)))
    if not len(images):
        return drawn
    device = next(model.parameters()).device
    inputs = to_input(torch.from_numpy(images).to(device), model.preprocess)
    with contextlib.suppress(NotApplicable):
        positions = model_positions(model, inputs)
        drawn[positions.title] = encode(positions.draw())
    if isinstance(model, ViT):
        distance, uniform = (
            measure_attention(model, [inputs]).distance,
            uniform_distance(model.spec),
        )
        figure = draw_attention_distance(distance, uniform=uniform, images=len(images))
        drawn["Mean attention distance"] = encode(figure)
        for number, mask in enumerate(rollout(model, inputs[:ROLLOUTS]), 1):
            image = images[number - 1].transpose(1, 2, 0)
            drawn[f"Attention rollout, image {number}"] = encode(draw_rollout(image, mask))
    return drawn


def _images(model: Model, source: Source, indices: np.ndarray) -> np.ndarray:
    """uint8 `[n, C, H, W]`: those that can be read."""
    transform = EvalTransform(model.spec.image_size, model.spec.in_channels, model.preprocess)
    read: list[np.ndarray] = []
    for index in indices.tolist():
        with contextlib.suppress(BadImage):
            read.append(transform(source.read(index)))
    return np.stack(read) if read else np.zeros((0, 0, 0, 0), np.uint8)


def worst_mistakes(source: Source, result: Classification) -> list[Mistake]:
    """The most confident mistakes, with thumbnails."""
    names = list(result.per_class)
    worst: list[Mistake] = []
    for at in result.mistakes(MISTAKES):
        index = int(result.indices[at])
        try:
            image = decode(source.read(index), source.channels, at_least=(THUMBNAIL, THUMBNAIL))
        except BadImage:
            continue
        worst.append(
            Mistake(
                key=source.keys[index],
                label=names[int(result.labels[at])],
                predicted=names[int(result.predicted[at])],
                probability=float(result.confidence[at]),
                thumbnail=image,
            )
        )
    return worst
