"""`patchword train`: from a spec to a run directory with weights, figures and a report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from patchword.data.sources import Source, open_source
from patchword.data.splits import Division
from patchword.data.unlabelled import open_images
from patchword.evaluation.classify import Classification
from patchword.run import folder as runs
from patchword.run import pretraining
from patchword.run.finish import finish, read_summary
from patchword.run.inputs import Inputs
from patchword.run.say import (
    say_better,
    say_cost,
    say_data,
    say_objective,
    say_probe,
    say_warmup,
)
from patchword.run.settle import at_fitting_size, memory_explained, probe_head, settle
from patchword.session.device import (
    keep_memory,
    make_deterministic,
    resolve_device,
    resolve_precision,
)
from patchword.spec.parse import PatchwordError, UsageError, changed
from patchword.spec.train import TrainSpec, with_length, without_rates
from patchword.training.checkpoint import Checkpoints
from patchword.training.log import Lines, LiveLine
from patchword.training.loop import Run
from patchword.training.recipes import base_spec
from patchword.training.trainer import Head, Trainer, set_head, wearing
from patchword.weights.files import SINGLE
from patchword.weights.load import load_model
from patchword.weights.save import save_model

logger = logging.getLogger("patchword")


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    run: Path
    split: str
    """what was measured on: test, else val, else train; without labels val, or nothing"""
    result: Classification | None
    """of the best weights; None if the run had been finished before, or learned no labels"""
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
        base = base_spec(str(data), recipe, settings.get("init"), settings.get("objective"))
        spec = with_length(changed(base, **settings), base)
    if "lr" in settings and "rates" not in settings:
        spec = without_rates(spec)
    console = console or Console(stderr=True, markup=False, emoji=False)
    started = time.monotonic()
    source = open_images(spec.source) if spec.self_supervised else open_source(spec.source)
    run = Path(out) if out is not None else runs.default_run(source, spec)
    if (run / runs.SWEEP).exists() and not overwrite:
        raise UsageError(
            f"{run} holds a sweep; go on with --sweep or --runs, or give another --out"
        )
    with runs.locked(run):
        stored = None if overwrite else runs.stored_spec(run)
        division = runs.open_division(run if stored else None, source, spec)
        choose_size = stored is None and spec.may_enlarge
        if stored is None:
            spec = runs.resolve(spec, division)
            runs.check_init_outlives(run, spec)
        else:
            spec = runs.resume_spec(spec, stored, division, run)
            summary = read_summary(run)
            if summary.get("finished"):
                text = f"{run} is finished; --overwrite trains it again"
                console.print(text, highlight=False, soft_wrap=True)
                return TrainResult(run, summary.get("split") or "", None, summary)
            runs.note_changes(run, source)
        return _train(
            spec,
            source,
            division,
            run,
            console,
            started,
            fresh=stored is None,
            choose_size=choose_size,
        )


def _train(
    spec: TrainSpec,
    source: Source,
    division: Division,
    run: Path,
    console: Console,
    started: float,
    *,
    fresh: bool,
    choose_size: bool,
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
    say_data(console, source, division, spec)
    if spec.self_supervised:
        say_objective(console, spec, pretraining.probed_images(inputs))
    if choose_size:
        inputs = at_fitting_size(inputs, started, console)
        spec, model = inputs.spec, inputs.model
    inputs.fill_cache(console)
    ready = None
    if spec.probe and newest is None:
        probe = probe_head(inputs, console)
        if probe is not None:
            say_probe(console, probe, division, time.monotonic() - started)
            ready = (probe.weight, probe.bias)
            if fresh:
                with wearing([model], ready):
                    save_model(model, run / runs.HEAD, overwrite=True)
                text = f"usable from now on: patchword predict {run / runs.HEAD} IMAGES"
                console.print(text, highlight=False, soft_wrap=True)
    if fresh:
        spec = settle(spec, inputs, started, console, ready=ready is not None)
        # only now: a run that cannot start overwrites nothing
        runs.clear(run, runs.HEAD if ready else None)
        runs.store(run, spec, source, division)
        say_better(console, spec, source, len(division["train"]))
    say_warmup(spec)
    say_cost(console, spec, model, len(division["train"]))
    dtype = resolve_precision(spec.precision, device)
    if ready is not None and spec.steps == 0 and model.head is not None:  # that is all of the run
        set_head(model.head, ready)
    trainer = Trainer(model, spec, device, dtype, inputs.class_weights())
    if newest is not None:
        trainer.read(*newest)
        console.print(f"resuming from {newest[0]}", highlight=False, soft_wrap=True)
    training = _loop(run, trainer, inputs, checkpoints, console, ready)
    with memory_explained(spec):
        training.fit()
    (run / runs.HEAD).unlink(missing_ok=True)  # best/ is in its place
    result, summary = finish(run, trainer, inputs, console)
    return TrainResult(run, summary["split"] or "", result, summary)


def _loop(
    run: Path,
    trainer: Trainer,
    inputs: Inputs,
    checkpoints: Checkpoints,
    console: Console,
    ready: Head | None,
) -> Run:
    """The loop, with all that it reads and writes."""
    progress, division = trainer.progress, inputs.division
    evaluator = pretraining.progress_evaluator(inputs, trainer.objective)
    return Run(
        trainer=trainer,
        feed=inputs.feed,
        prepare=inputs.prepare,
        evaluators={"val": evaluator} if len(division["val"]) else {},
        checkpoints=checkpoints,
        metrics=Lines(run / "metrics.jsonl", progress.step),
        evaluations=Lines(run / "evaluations.jsonl", progress.evaluated),
        live=LiveLine(console),
        steps_per_epoch=len(division["train"]) / trainer.spec.batch_size,
        locate=inputs.source.location,
        named=inputs.named,
        criterion=pretraining.criterion(inputs),
        extra_log=_tensorboard(run, trainer.spec, progress.step),
        ready_head=ready,
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
