"""The model card of a self-supervised run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from patchword.report import record as facts
from patchword.report.card import (
    code,
    details,
    markdown,
    procedure,
    table,
    training_data,
    write_card,
)
from patchword.report.card.family import family_of
from patchword.report.record import RunFacts

METHODS = {
    "masked-patch": "masked patch prediction (section 4.6 of the Vision Transformer's paper)",
    "mae": "a masked autoencoder (He et al., arXiv 2111.06377)",
}


def write_pretraining_card(run: Path, *, reproduce: str = "") -> Path:
    """Write `MODEL_CARD.md` into the directory of a run that learned no labels, and return its
    path; `reproduce` is the command line that repeats the run. Raises `PatchwordError` if `run` is
    not a run directory."""
    about = facts.read_run(run)
    title = f"{about.model} on {about.data_name}"
    method = METHODS.get(about.objective, about.objective)
    sections = [
        ("Model details", details(about, {"Output": "features; there is no head"})),
        ("Intended use and limits", _limits(about, method)),
        ("Training data", training_data(about)),
        ("Training procedure", procedure(about, reproduce)),
        ("Evaluation", _evaluation(about)),
        ("How to use", _use(about)),
        ("Environment", table("Item", about.environment)),
        ("Citation", family_of(about.model).citation),
    ]
    return write_card(run, title, _front_matter(about), sections)


def _front_matter(run: RunFacts) -> dict[str, Any]:
    hub = run.source.startswith("hub:")
    return {
        "library_name": "patchword",
        "pipeline_tag": "image-feature-extraction",
        "tags": [*family_of(run.model).tags, "self-supervised", run.objective, "pytorch"],
        **({"datasets": [run.data_name]} if hub else {}),
    }


def _limits(run: RunFacts, method: str) -> str:
    use = (
        f"The model turns images into features. It was trained without labels, by {method}: it is "
        "to be fine-tuned on a task, or its features to be probed. It names no classes."
    )
    return use + "\n" + "".join(f"\n- {markdown(note)}" for note in facts.pretraining_notes(run))


def _evaluation(run: RunFacts) -> str:
    rows = {
        "Loss of the objective": run.given("loss", lambda loss: f"{loss:.4f}"),
        "Top-1, 10 nearest neighbours, frozen features": run.given("knn", facts.percent),
        "Top-1, logistic regression, frozen features": run.given("linear", facts.percent),
    }
    found = table("Figure", rows)
    return f"Measured on validation images.\n\n{found}" if found else ""


def _use(run: RunFacts) -> str:
    folder = code(shlex.quote(str(run.path)))
    commands = "\n".join(code(line) for line in facts.pretraining_commands(run))
    return (
        "In Python:\n\n"
        "```python\nimport patchword\n\n"
        f"model = patchword.load_model({str(run.path)!r})\n"
        "# normalised images [B, C, H, W] to features [B, D]\n```\n\n"
        f"On the command line ({folder} is this run):\n\n```sh\n{commands}\n```"
    )
