"""Self-supervised runs: how they come along, what they are measured by, what they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from patchword.data.seeding import derived_seed
from patchword.evaluation.representation import Labelled, Representation
from patchword.inspection.figures.drawing import encode
from patchword.inspection.figures.reconstruction import draw_predictions
from patchword.objectives import create_objective
from patchword.objectives.base import Objective
from patchword.report.sections import Results
from patchword.run.inputs import Inputs
from patchword.run.reporting import again, inside, spread, write_reports
from patchword.spec.batch import Evaluator
from patchword.training.criterion import LINEAR, LOSS, TOP1, Criterion
from patchword.training.log import read_lines
from patchword.training.trainer import FILES, Trainer, read_weights
from patchword.weights.load import load_model

PICTURES = 8
"""Images that are shown with their predictions."""


def progress_evaluator(
    inputs: Inputs, objective: Objective, some: np.ndarray | None = None
) -> Evaluator:
    """What measures a run on its val part, or on `some` of it, and then without probes: they cost
    more than they say."""
    if not inputs.request.self_supervised:
        return inputs.evaluator("val", some)
    indices, labelled = inputs.division["val"] if some is None else some, None
    if some is None and probed_images(inputs):
        support, queries = (_probed(inputs, part) for part in ("train", "val"))
        labelled = Labelled(
            inputs.passes("train", support),
            inputs.passes("val", queries),
            len(inputs.source.classes),
        )
    none = torch.empty(0)
    return Representation(
        inputs.passes("val", indices),
        inputs.to_input,
        lambda forward, images: objective.loss(forward, images, none),
        inputs.request.seed,
        labelled,
    )


def criterion(inputs: Inputs) -> Criterion:
    """What chooses the best weights: labels if there are any."""
    if not inputs.request.self_supervised:
        return TOP1
    return LINEAR if probed_images(inputs) else LOSS


def probed_images(inputs: Inputs) -> int:
    """How many images the probes of an evaluation look at; 0 where the labels are learned, where
    they have nothing to tell apart, and where they are not wanted."""
    if not inputs.request.self_supervised:
        return 0
    parts = [_probed(inputs, part) for part in ("train", "val")]
    labels = [inputs.source.labels[at] for at in parts]
    if any(len(np.unique(found)) < 2 for found in labels):
        return 0
    return sum(map(len, parts))


def _probed(inputs: Inputs, part: str) -> np.ndarray:
    """The images of a part whose labels are looked at: a draw by the run's seed, in order."""
    seed, indices = inputs.request.seed, inputs.division[part]
    most = inputs.request.pretrain.probe_images
    if len(indices) <= most:
        return indices
    rng = np.random.default_rng(derived_seed(seed, "probe"))
    return np.sort(rng.choice(indices, most, replace=False))


def outcome(run: Path, summary: dict[str, Any], trainer: Trainer, inputs: Inputs) -> dict[str, Any]:
    """What the summary says of a run without labels: the figures of its best weights on val, which
    chose them. The test part is not looked at."""
    found: dict[str, Any] = {}
    for line in read_lines(run / "evaluations.jsonl"):
        if (line["step"], line["weights"]) == (summary["best_step"], summary["best_weights"]):
            found = {key: line[key] for key in ("n", "loss", "knn", "linear") if key in line}
    return {
        "objective": inputs.request.objective,
        "bad_images": len({int(index) for index in trainer.progress.bad} | inputs.bad.keys()),
        "split": "val" if found else None,
        **found,
    }


def report(run: Path, trainer: Trainer, inputs: Inputs) -> None:
    """Write `report.html` and `MODEL_CARD.md`, with some images as the model predicts them."""
    model = load_model(run, device=inputs.device)
    if trainer.progress.best is None:
        network = trainer.networks["average" if trainer.average else "raw"]
    else:
        network = create_objective(inputs.request, model).network(model).to(inputs.device)
        read_weights(network, run / "best", FILES["raw"])
    part = "val" if len(inputs.division["val"]) else "train"
    indices = inputs.division[part]
    results = Results(
        pictures=_pictures(network, trainer.objective, inputs, spread(indices, PICTURES)),
        figures=inside(model, inputs.source, indices),
        reproduce=again(run),
    )
    write_reports(run, results)


@torch.no_grad()
def _pictures(
    network: nn.Module, objective: Objective, inputs: Inputs, indices: np.ndarray
) -> bytes | None:
    """Images with what the network sees of them and predicts: a PNG, None if none can be read."""
    batch = next(iter(inputs.passes("val", indices)()))
    images = batch.images[batch.mask]
    if not len(images):
        return None
    with torch.random.fork_rng([]):
        torch.manual_seed(derived_seed(inputs.request.seed, "pictures"))
        shown = objective.pictures(network.eval(), inputs.to_input(images))
    rows = [row.permute(0, 2, 3, 1).float().cpu().numpy() for row in shown]
    return encode(draw_predictions(*rows))
