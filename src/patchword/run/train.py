"""`patchword train`: from a spec to a run directory with weights, figures and a report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from patchword.data.registry import open_source
from patchword.data.sources import Source
from patchword.data.splits import Division
from patchword.data.unlabelled import open_images
from patchword.evaluation.classify import Classification
from patchword.run import folder, pretraining
from patchword.run.finish import finish, read_summary
from patchword.run.inputs import Data, Inputs
from patchword.run.say import say_better, say_cost
from patchword.run.start import Start, start_again, start_new
from patchword.run.trials import memory_explained
from patchword.session.device import keep_memory, make_deterministic
from patchword.spec.parse import PatchwordError, UsageError, changed
from patchword.spec.train import TrainSpec, with_length, without_rates
from patchword.training.checkpoint import Checkpoints
from patchword.training.log import Lines, LiveLine
from patchword.training.loop import Loop
from patchword.training.recipes import base_spec
from patchword.training.trainer import HeadValues, Trainer, set_head


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    folder: Path
    """the run directory"""
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

    `data` names a source (a folder, a .csv, parquet, `digits`, `hub:NAME`), or is a whole request.
    `settings` are fields of `TrainSpec` and its groups by name: `epochs=10, lr=1e-3,
    init="runs/x"`. `out` is the run directory, by default `runs/<data>-<model>`. Raises
    `UsageError` on unknown settings and if a run in `out` has others, `PatchwordError` on data that
    cannot be used, `TrainingError` if the run had to stop, `Interrupted` after a signal.
    """
    began = time.monotonic()
    request = _requested(data, recipe, settings)
    console = console or Console(stderr=True, markup=False, emoji=False)
    source = open_images(request.source) if request.self_supervised else open_source(request.source)
    run = Path(out) if out is not None else folder.default_run(source, request)
    if (run / folder.SWEEP).exists() and not overwrite:
        raise UsageError(
            f"{run} holds a sweep; go on with --sweep or --runs, or give another --out"
        )
    return train_in(run, request, source, overwrite=overwrite, began=began, console=console)


def _requested(
    data: str | Path | TrainSpec, recipe: str | None, settings: dict[str, Any]
) -> TrainSpec:
    """The request that the arguments of `train` make."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    if isinstance(data, TrainSpec):
        if recipe is not None:
            raise UsageError(f"a whole spec is no base for recipe {recipe!r}; name a source")
        base = data
    else:
        base = base_spec(str(data), recipe, settings.get("init"), settings.get("objective"))
    request = with_length(changed(base, **settings), base)
    return without_rates(request) if "lr" in settings and "rates" not in settings else request


def train_in(
    run: Path,
    request: TrainSpec,
    source: Source,
    division: Division | None = None,
    *,
    overwrite: bool = False,
    began: float,
    console: Console,
) -> TrainResult:
    """Train in a run directory, or go on with the run there. `division` is that of a new run, by
    default what the request makes; `began` when its time began (monotonic seconds). Raises what
    `train` does."""
    with folder.locked(run):
        stored = None if overwrite else folder.stored_config(run)
        one_of_several = division is not None
        if stored is not None or division is None:
            division = folder.open_division(run if stored else None, source, request)
        data, checkpoints = Data(source=source, division=division), Checkpoints(run, request.keep)
        if stored is None:
            folder.check_init_outlives(run, request)
            prepare_process(request)
            start = start_new(run, request, data, began, console)
            if not one_of_several:
                say_better(console, start.inputs.settled, data)
        else:
            settled = folder.resumed(run, request, stored)
            summary = read_summary(run)
            if summary.get("finished"):
                text = f"{run} is finished; --overwrite trains it again"
                console.print(text, highlight=False, soft_wrap=True)
                return TrainResult(run, summary.get("split") or "", None, summary)
            folder.note_changes(run, source, stored)
            prepare_process(request)
            start = start_again(run, settled, data, checkpoints, began, console)
        return _follow(run, start, checkpoints, console)


def prepare_process(request: TrainSpec) -> None:
    """Set what holds for the whole process."""
    if request.deterministic:
        make_deterministic()
    keep_memory()


def _follow(run: Path, start: Start, checkpoints: Checkpoints, console: Console) -> TrainResult:
    """Train from a start to the end."""
    inputs, model, settled = start.inputs, start.inputs.model, start.inputs.settled
    say_cost(console, settled, model, len(inputs.division["train"]))
    if start.head is not None and settled.steps == 0 and model.head is not None:
        set_head(model.head, start.head)  # that is all of the run
    trainer = Trainer(model, settled, inputs.class_weights())
    if start.checkpoint is not None:
        trainer.read(*start.checkpoint)
        console.print(f"resuming from {start.checkpoint[0]}", highlight=False, soft_wrap=True)
    loop = _loop(run, trainer, inputs, checkpoints, console, start.head)
    with memory_explained(settled):
        loop.fit()
    (run / folder.HEAD).unlink(missing_ok=True)  # best/ is in its place
    result, summary = finish(run, trainer, inputs, console)
    return TrainResult(run, summary["split"] or "", result, summary)


def _loop(
    run: Path,
    trainer: Trainer,
    inputs: Inputs,
    checkpoints: Checkpoints,
    console: Console,
    head: HeadValues | None,
) -> Loop:
    """The loop, with all that it reads and writes."""
    progress, division = trainer.progress, inputs.division
    evaluator = pretraining.progress_evaluator(inputs, trainer.objective)
    return Loop(
        trainer=trainer,
        feed=inputs.feed,
        prepare=inputs.prepare,
        evaluators={"val": evaluator} if len(division["val"]) else {},
        checkpoints=checkpoints,
        metrics=Lines(run / "metrics.jsonl", progress.step),
        evaluations=Lines(run / "evaluations.jsonl", progress.evaluated),
        live=LiveLine(console),
        steps_per_epoch=len(division["train"]) / inputs.request.batch_size,
        locate=inputs.source.location,
        named=inputs.named,
        criterion=pretraining.criterion(inputs),
        extra_log=_tensorboard(run, inputs.request, progress.step),
        ready_head=head,
    )


def _tensorboard(run: Path, request: TrainSpec, step: int) -> Callable[[dict[str, Any]], None]:
    """What adds a line to the run's TensorBoard events, from which those after `step` are cut."""
    if not request.tensorboard:
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
