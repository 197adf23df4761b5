"""What a finished run shows: the report and the model card."""

from __future__ import annotations

import shlex
from pathlib import Path

from patchword.card import write_model_card
from patchword.data.images import BadImage, decode
from patchword.data.sources import Source
from patchword.evaluation.classify import Classification
from patchword.inspection.embedding_figures import embedding_figures
from patchword.models.model import Model
from patchword.report import THUMBNAIL, Mistake, write_report

MISTAKES = 24


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
        figures=embedding_figures(model),
        reproduce=reproduce,
    )
    write_model_card(run, result=result, split=split, reproduce=reproduce)


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
