"""What a run ends with: its best weights measured, the summary, the report."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from patchword.evaluation.classify import Classification
from patchword.models.zoo import macs, variant_name
from patchword.objectives import training_exaflops
from patchword.report.record import read_run
from patchword.report.words import next_commands
from patchword.run import folder as runs
from patchword.run import pretraining
from patchword.run.inputs import Inputs
from patchword.run.reporting import report_run
from patchword.training.checkpoint import replace_text
from patchword.training.trainer import Trainer
from patchword.weights.load import load_model


def finish(
    run: Path, trainer: Trainer, inputs: Inputs, console: Console
) -> tuple[Classification | None, dict[str, Any]]:
    """Measure the best weights, write the report, and with `summary.json` end the run. Returns the
    result, None where no labels were learned, and the summary."""
    summary = _trained(trainer)
    if inputs.request.self_supervised:
        result = None
        summary |= pretraining.outcome(run, summary, trainer, inputs)
        _write_summary(run, summary)
        summary["next"] = next_commands(read_run(run))
        with console.status("drawing what the model predicts"):
            pretraining.report(run, trainer, inputs)
    else:
        result = _measured(run, trainer, inputs, console, summary)
    summary["finished"] = True
    _write_summary(run, summary)
    return result, summary


def _trained(trainer: Trainer) -> dict[str, Any]:
    """What was trained, for how long, and which weights are the best."""
    progress, model, request = trainer.progress, trainer.model, trainer.settled.request
    images = progress.step * request.batch_size
    best = "average" if trainer.average else "raw"
    return {
        "architecture": variant_name(model.spec),
        "steps": progress.step,
        "images": images,
        "seconds": round(progress.seconds, 2),
        "images_per_second": round(images / (progress.seconds or 1), 2),
        "parameters": sum(p.numel() for p in model.parameters()),
        "gmacs": macs(model.spec) / 1e9,
        "exaflops": training_exaflops(request, model.spec, images),
        "best_step": progress.step if progress.best is None else progress.best_step,
        "best_weights": best if progress.best is None else progress.best_weights,
        "rollbacks": progress.rollbacks,
    }


def _measured(
    run: Path, trainer: Trainer, inputs: Inputs, console: Console, summary: dict[str, Any]
) -> Classification:
    """The figures of the best weights, which are added to the summary, in the report."""
    progress = trainer.progress
    part = next(name for name in ("test", "val", "train") if len(inputs.division[name]))
    model = load_model(run, device=inputs.device)
    with console.status(f"evaluating on {part}"):
        began = time.monotonic()
        result = inputs.evaluator(part).measure(model)
    taken = time.monotonic() - began
    summary |= {
        "best_val_top1": progress.best,
        "bad_images": len({int(index) for index in progress.bad} | inputs.bad.keys()),
        "split": part,
        **result.scalars(),
        "evaluate_images_per_second": round(result.n / taken, 2),
    }
    _write_summary(run, summary)
    report_run(run, model, inputs.source, result, part)
    return result


def _write_summary(run: Path, summary: dict[str, Any]) -> None:
    replace_text(run / runs.SUMMARY, json.dumps(summary, indent=1))


def read_summary(run: Path) -> dict[str, Any]:
    """`summary.json`; empty if it is not there."""
    try:
        return json.loads((run / runs.SUMMARY).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not there yet, or damaged: written again
        return {}
