"""`patchword train`: from a spec to a run directory with weights, figures and a report."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from patchword.data.balance import imbalance
from patchword.data.sources import Source, open_source
from patchword.data.splits import Division
from patchword.evaluation.classify import Classification
from patchword.evaluation.probe import Probe
from patchword.models.model import Model
from patchword.models.zoo import exaflops, macs, variant_name
from patchword.parsing import PatchwordError, UsageError, changed
from patchword.specs import TrainSpec, with_length, without_rates
from patchword.training.checkpoint import Checkpoints, replace_text
from patchword.training.log import Lines, LiveLine
from patchword.training.loop import Run
from patchword.training.parallel import (
    keep_memory,
    make_deterministic,
    resolve_device,
    resolve_precision,
)
from patchword.training.recipes import base_spec, find_recipe
from patchword.training.trainer import Trainer, set_head
from patchword.training.tuning import trained_count
from patchword.weights.files import SINGLE
from patchword.weights.loading import load_model
from patchword.weights.pretrained import suggested
from patchword.workflows import runs
from patchword.workflows.inputs import Inputs
from patchword.workflows.reporting import report_run
from patchword.workflows.starting import memory_explained, probe_head, settle

logger = logging.getLogger("patchword")
FEW_IMAGES = 100_000
"""Fewer are said to be few to train from scratch on. The smallest set of the paper is ImageNet,
1.3 million images; even from that the large models are worse than the small, and B/16 reaches
89.49 % on Flowers against 99.38 % from ImageNet-21k (section 4.3, table 5)."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    run: Path
    split: str
    """what `result` was measured on: test, else val, else train"""
    result: Classification | None
    """of the best weights; None if the run had been finished before"""
    summary: dict[str, Any]
    """`summary.json`: figures, speed and cost"""


def train(
    data: str | Path | TrainSpec,
    recipe: str | None = None,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    **settings: Any,
) -> TrainResult:
    """Train or fine-tune a model; the same call on the same run directory resumes.

    `data` names a source (a folder, a .csv, parquet, `digits`, `hub:NAME`), or is a whole spec.
    `settings` are fields of `TrainSpec` and its groups by name: `epochs=10, lr=1e-3,
    init="runs/x"`. `out` is the run directory, by default `runs/<data>-<model>`. Raises
    `UsageError` on unknown settings and if a run in `out` has others, `PatchwordError` on data that
    cannot be used, `TrainingError` if the run had to stop, `Interrupted` after a signal.
    """
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    if isinstance(data, TrainSpec):
        if recipe is not None:
            raise UsageError(f"a whole spec is no base for recipe {recipe!r}; name a source")
        spec = with_length(changed(data, **settings), data)
    else:
        base = base_spec(str(data), recipe, settings.get("init"))
        spec = with_length(changed(base, **settings), base)
    if "lr" in settings and "rates" not in settings:
        spec = without_rates(spec)
    console = console or Console(stderr=True, markup=False, emoji=False)
    started = time.monotonic()
    source = open_source(spec.source)
    run = Path(out) if out is not None else runs.default_run(source, spec)
    if (run / runs.SWEEP).exists() and not overwrite:
        raise UsageError(
            f"{run} holds a sweep; go on with --sweep or --runs, or give another --out"
        )
    with runs.locked(run):
        stored = None if overwrite else runs.stored_spec(run)
        division = runs.open_division(run if stored else None, source, spec)
        if stored is None:
            spec = runs.resolve(spec, division)
            runs.check_init_outlives(run, spec)
        else:
            spec = runs.resume_spec(spec, stored, division, run)
            summary = _read_summary(run)
            if summary.get("finished"):
                console.print(f"{run} is finished; --overwrite trains it again", highlight=False)
                return TrainResult(run, summary.get("split", ""), None, summary)
            runs.note_changes(run, source)
        return _train(spec, source, division, run, console, started, fresh=stored is None)


def _train(
    spec: TrainSpec,
    source: Source,
    division: Division,
    run: Path,
    console: Console,
    started: float,
    *,
    fresh: bool,
) -> TrainResult:
    if spec.deterministic:
        make_deterministic()
    keep_memory()
    device = resolve_device(spec.device)
    checkpoints = Checkpoints(run, spec.keep)
    newest = None if fresh else checkpoints.newest()
    if newest is None or spec.init is None:
        model = runs.build_model(spec, source)
    else:  # the weights of `init` may have gone since
        model = load_model(newest[0] / SINGLE)
    inputs = Inputs(source=source, division=division, spec=spec, model=model, device=device)
    _say_data(console, source, division, spec)
    inputs.fill_cache(console)
    probe = None
    if spec.probe and newest is None:
        probe = probe_head(inputs, console)
        if probe is not None:
            _say_probe(console, probe, division, time.monotonic() - started)
    if fresh:
        spec = settle(spec, inputs, started, console, ready=probe is not None)
        runs.clear(run)  # only now: a run that cannot start overwrites nothing
        runs.store(run, spec, source, division)
        _say_better(console, spec, source, len(division["train"]))
    _say_cost(console, spec, model, len(division["train"]))
    dtype = resolve_precision(spec.precision, device)
    ready = None if probe is None else (probe.weight, probe.bias)
    if ready is not None and spec.steps == 0 and model.head is not None:  # that is all of the run
        set_head(model.head, ready)
    trainer = Trainer(model, spec, device, dtype, inputs.class_weights())
    if newest is not None:
        trainer.read(*newest)
        console.print(f"resuming from {newest[0]}", highlight=False)
    progress = trainer.progress
    training = Run(
        trainer=trainer,
        feed=inputs.feed,
        prepare=inputs.prepare,
        evaluators={"val": inputs.evaluator("val")} if len(division["val"]) else {},
        checkpoints=checkpoints,
        metrics=Lines(run / "metrics.jsonl", progress.step),
        evaluations=Lines(run / "evaluations.jsonl", progress.evaluated),
        live=LiveLine(console),
        steps_per_epoch=len(division["train"]) / spec.batch_size,
        locate=source.location,
        extra_log=_tensorboard(run, spec, progress.step),
        ready_head=ready,
    )
    with memory_explained(spec):
        training.fit()
    return _finish(run, trainer, inputs, console)


def _say_data(console: Console, source: Source, division: Division, spec: TrainSpec) -> None:
    parts = ", ".join(f"{len(at):,} {part}" for part, at in division.items() if len(at))
    console.print(
        f"data {source.name}: {len(source.classes)} classes, {parts} images", highlight=False
    )
    uneven = imbalance(source.labels[division["train"]], source.classes)
    if uneven is not None:
        remedies = {
            "none": "--balance sampler or loss makes up for it",
            "sampler": "all classes are drawn equally often",
            "loss": "images of small classes count for more",
        }
        console.print(f"{uneven}; {remedies[spec.data.balance]}", highlight=False, soft_wrap=True)


def _say_probe(console: Console, probe: Probe, division: Division, taken: float) -> None:
    part = "val" if len(division["val"]) else "train"
    console.print(
        f"head on frozen features: top-1 on {part} {probe.accuracy:.2%} after {taken:.0f} s "
        f"(logistic regression, l2 {probe.l2:g})",
        highlight=False,
    )


def _say_better(console: Console, spec: TrainSpec, source: Source, train_images: int) -> None:
    """Advise to start from weights, where there are few images and the recipe is not for that many:
    those of digits and CIFAR are. Pretrained weights take images in colour."""
    meant = find_recipe(spec.recipe).images if spec.recipe else None
    small = meant is not None and meant < FEW_IMAGES
    if spec.init is not None or small or train_images >= FEW_IMAGES or source.channels != 3:
        return
    console.print(
        f"{train_images:,} images are few to train {spec.model} on from scratch (section 4.3): "
        f"--init {suggested(spec.model or '').name} would do better; "
        "`patchword models --pretrained` lists more",
        highlight=False,
        soft_wrap=True,
    )


def _say_cost(console: Console, spec: TrainSpec, model: Model, train_images: int) -> None:
    steps = spec.steps or 0
    images, cost = steps * spec.batch_size, macs(model.spec)
    parameters = sum(p.numel() for p in model.parameters())
    trained = trained_count(model, spec.tuning)
    part = "" if trained == parameters else f" of which {trained / 1e6:.3g} M are trained,"
    console.print(
        f"model {variant_name(model.spec)}: {parameters / 1e6:.2f} M parameters,{part} "
        f"{cost / 1e9:.3g} GMACs an image; {spec.device}, {spec.precision}\n"
        f"{steps:,} steps of {spec.batch_size} = {images:,} images = "
        f"{images / train_images:.1f} epochs, {exaflops(model.spec, images):.3g} exaFLOPs",
        highlight=False,
    )


def _tensorboard(run: Path, spec: TrainSpec, step: int) -> Callable[[dict[str, Any]], None]:
    """What adds a line to the run's TensorBoard events, from which those after `step` are cut."""
    if not spec.tensorboard:
        return lambda line: None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise PatchwordError(
            "--tensorboard needs its extra: pip install -c constraints.txt -e '.[tensorboard]'"
        ) from None
    writer = SummaryWriter(run / "tensorboard", purge_step=step + 1)

    def log(line: dict[str, Any]) -> None:
        prefix = f"{line['split']}/{line['weights']}/" if "split" in line else "train/"
        for name, value in line.items():
            if isinstance(value, int | float) and name != "step":
                writer.add_scalar(prefix + name, value, line["step"])
        writer.flush()

    return log


def _finish(run: Path, trainer: Trainer, inputs: Inputs, console: Console) -> TrainResult:
    """Measure the best weights, write the report, and with `summary.json` end the run."""
    progress, spec = trainer.progress, trainer.spec
    summary: dict[str, Any] = {
        "architecture": variant_name(trainer.model.spec),
        "steps": progress.step,
        "images": progress.step * spec.batch_size,
        "seconds": round(progress.seconds, 2),
        "images_per_second": round(progress.step * spec.batch_size / (progress.seconds or 1), 2),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "gmacs": macs(trainer.model.spec) / 1e9,
        "exaflops": exaflops(trainer.model.spec, progress.step * spec.batch_size),
        "best_step": progress.best_step or progress.step,
        "best_weights": progress.best_weights
        if progress.best is not None
        else ("average" if trainer.average else "raw"),
        "best_val_top1": progress.best,
        "rollbacks": progress.rollbacks,
    }
    part = next(name for name in ("test", "val", "train") if len(inputs.division[name]))
    model = load_model(run, device=inputs.device)
    with console.status(f"evaluating on {part}"):
        began = time.monotonic()
        result = inputs.evaluator(part).measure(model)
    taken = time.monotonic() - began
    summary |= {
        "bad_images": len({int(index) for index in progress.bad} | inputs.bad.keys()),
        "split": part,
        **result.scalars(),
        "evaluate_images_per_second": round(result.n / taken, 2),
    }
    _write_summary(run, summary)
    report_run(run, model, inputs.source, result, part)
    summary["finished"] = True
    _write_summary(run, summary)
    return TrainResult(run, part, result, summary)


def _write_summary(run: Path, summary: dict[str, Any]) -> None:
    replace_text(run / runs.SUMMARY, json.dumps(summary, indent=1))


def _read_summary(run: Path) -> dict[str, Any]:
    try:
        return json.loads((run / runs.SUMMARY).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not there yet, or damaged: written again
        return {}
