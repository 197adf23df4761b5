"""What a run finds out before it starts: resolution, a head, a batch that fits, a learning rate,
its length.

All of it is stored in the run's `config.json`, or is a pure function of what is; a resumed run
measures nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from patchword.data.splits import drawn
from patchword.evaluation.probe import Probe, fit_logistic, sweep_logistic
from patchword.models.summary import layer_table
from patchword.models.vit import ViT
from patchword.models.zoo import enlarged
from patchword.run import folder as runs
from patchword.run.inputs import Inputs
from patchword.run.pretraining import probed_images, progress_evaluator
from patchword.session.device import resolve_precision
from patchword.session.features import Features, eval_batch_size, extract
from patchword.spec.parse import PatchwordError
from patchword.spec.train import TrainSpec, seconds
from patchword.training.optim import learning_rate
from patchword.training.trainer import Trainer
from patchword.weights.load import say_resampled

SIZE_IMAGES = 2000
"""of train and of val each, at most, by whose features resolutions are compared"""
ENLARGED_EPOCHS = 5
"""that a run limited in time must reach at a higher resolution"""
TRIAL_SHARE = 0.04
"""of the run's time or steps, for each learning rate tried"""
TRIAL_IMAGES = 512
"""of the val part, on which the rates are compared"""
EVALUATION_SHARE = 0.2
"""of the time, at most, for evaluations on the val part where the user does not say how often"""


def settle(
    spec: TrainSpec, inputs: Inputs, started: float, console: Console, *, ready: bool
) -> TrainSpec:
    """`spec` with everything that had to be measured on this machine and data; `started` is when
    the run's time began (monotonic seconds), `ready` whether there is a model without training. The
    inputs' model stays as it is.

    Raises `PatchwordError` if the memory is too small, or the time too short and nothing ready.
    """
    inputs.spec = spec
    if spec.probe:
        inputs.spec = spec = _fitting_batch(inputs)
        if (parts := spec.optim.accumulate) > 1:
            console.print(f"batch of {spec.batch_size} in {parts} parts, for want of memory")
    with memory_explained(spec):
        timed, pace = spec.steps is None, 0.0
        if timed:
            with console.status("measuring the time of a step"):
                pace = _pace(_trial(inputs, 1000), inputs, _limit(spec))
        if spec.steps != 0 and spec.optim.rates and len(inputs.division["val"]):
            spec = _chosen_rate(inputs, pace, console)
            inputs.spec = spec
        if timed:
            spec = _in_time(inputs, pace, started, console, ready)
    _let_go()
    inputs.spec = spec
    return spec


class OutOfMemory(PatchwordError):
    """The memory is too small for a step; the message says what helps."""


@contextmanager
def memory_explained(spec: TrainSpec) -> Iterator[None]:
    """Turn the errors of want of memory, the device's or the host's, into one with a remedy."""
    try:
        yield
    except RuntimeError as error:
        if not _is_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory with {spec.batch_size // spec.optim.accumulate} images at a time; "
            f"use --accumulate {2 * spec.optim.accumulate}, or a smaller --batch-size"
        ) from error


def _is_memory(error: RuntimeError) -> bool:
    """The driver, cuBLAS and Triton take memory besides PyTorch, and say so in words."""
    words = ("can't allocate", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in words)


# The resolution ----------------------------------------------------------------------------------


def at_fitting_size(inputs: Inputs, started: float, console: Console) -> Inputs:
    """The inputs with their model at `enlarge` times the resolution, if a logistic regression on
    frozen features is better there on the val part; else as they are.

    Stays at the resolution where the model has no other or no head for this, where there is no val
    part, and where the time is too short for `ENLARGED_EPOCHS`.
    """
    spec = inputs.spec
    size = enlarged(inputs.model.spec, spec.enlarge)
    if size == spec.size or not len(inputs.division["val"]):
        return inputs
    larger = dataclasses.replace(spec, image_size=size)
    model = runs.build_model(larger, inputs.source, quiet=True)
    other = dataclasses.replace(inputs, spec=larger, model=model)
    here, there = _by(spec.size), _by(size)
    if spec.time is not None:
        epochs = _epochs_in_time(other, started, console)
        if epochs < ENLARGED_EPOCHS:
            said = f"resolution {here}: {spec.time} is {epochs:.1f} epochs at {there}"
            console.print(said, highlight=False)
            return inputs
    sampled = {
        part: drawn(inputs.source.labels, at, SIZE_IMAGES, spec.seed)
        for part, at in inputs.division.items()
    }
    found: list[float] = []
    for tried in (inputs, other):
        probe = probe_head(dataclasses.replace(tried, division=sampled), console, quiet=True)
        if probe is None:
            return inputs
        found.append(probe.accuracy)
    better = found[1] > found[0]
    console.print(
        f"resolution {there if better else here}: a head on frozen features has top-1 on val "
        f"{found[0]:.2%} at {here}, {found[1]:.2%} at {there}",
        highlight=False,
        soft_wrap=True,
    )
    if not better:
        return inputs
    say_resampled(Path(spec.init or ""), inputs.model.spec, model.spec)
    return other


def _by(size: tuple[int, int]) -> str:
    return "{}x{}".format(*size)


def _epochs_in_time(inputs: Inputs, started: float, console: Console) -> float:
    """About as many epochs as the run will have, by the time of a step."""
    inputs.spec = spec = _fitting_batch(inputs)
    with memory_explained(spec), console.status("measuring the time of a step"):
        pace = _pace(_trial(inputs, 1000), inputs, _limit(spec) / 3)
    left = 0.75 * (seconds(spec.time or "") - (time.monotonic() - started))
    return left / pace * spec.batch_size / len(inputs.division["train"])


# A head to start from -----------------------------------------------------------------------------


def probe_head(inputs: Inputs, console: Console, *, quiet: bool = False) -> Probe | None:
    """A logistic regression on the model's frozen features, its regulariser chosen on the val part:
    a usable classifier before any training.

    The features are kept on disk (`features.extract`, `quiet` as there). Returns None where the
    head is not one linear layer on them.
    """
    model, division = inputs.model, inputs.division
    if model.head is None or (isinstance(model, ViT) and model.pre_logits is not None):
        return None
    found: dict[str, Features] = {}
    with console.status("") as status:
        for part in ("train", "val"):
            if len(division[part]):
                found[part] = extract(
                    model,
                    inputs.source,
                    division[part],
                    device=inputs.device,
                    batch_size=eval_batch_size(model),
                    workers=inputs.workers if len(division[part]) > 256 else 0,
                    precision=inputs.spec.precision,
                    quiet=quiet,
                    on_bad=inputs.spec.data.on_bad_image,
                    progress=lambda done, total, part=part: status.update(
                        f"features of {part}: {done:,}/{total:,} images"
                    ),
                )
        status.update("fitting a head to the features")
        return _probe(found["train"], found.get("val"), len(inputs.source.classes))


def _probe(train: Features, val: Features | None, classes: int) -> Probe:
    """The regulariser is chosen on val, or where there is none on every fifth image of a class; the
    head is then fitted to all of train."""
    if val is not None:
        return sweep_logistic(train.pooled, train.labels, val.pooled, val.labels, classes)
    rank = torch.zeros_like(train.labels)
    for k in range(classes):
        mine = train.labels == k
        rank[mine] = torch.arange(int(mine.sum()))
    held = rank % 5 == 4
    if not held.any():  # fewer than five images of every class
        held = torch.ones_like(held)
    rest = ~held if not held.all() else held
    probe = sweep_logistic(
        train.pooled[rest], train.labels[rest], train.pooled[held], train.labels[held], classes
    )
    weight, bias = fit_logistic(train.pooled, train.labels, classes, probe.l2)
    return dataclasses.replace(probe, weight=weight, bias=bias)


# The batch ---------------------------------------------------------------------------------------


def has_own_memory(device: torch.device) -> bool:
    """Whether want of memory on the device is an error to go on from: on a CPU the system may end
    the process instead."""
    return device.type == "cuda"


def _fitting_batch(inputs: Inputs) -> TrainSpec:
    """The spec with its batch divided into as many parts as the memory needs: on a GPU the first
    number with which a step works, elsewhere by the activations that a step keeps.

    Raises `PatchwordError` if no number is enough.
    """
    spec = inputs.spec
    parts = spec.optim.accumulate
    if has_own_memory(inputs.device):
        while True:
            try:
                with memory_explained(spec):
                    _pace(_trial(inputs, 1000), inputs, 0.0, steps=1)
                break
            except OutOfMemory:
                if spec.batch_size % (2 * parts):
                    raise
            parts *= 2
            inputs.spec = spec = _accumulating(spec, parts)
    else:
        kept = sum(row.activation_bytes for row in layer_table(inputs.model.spec))
        size = kept // 2 if spec.precision == "bfloat16" else kept
        room = 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        while size * spec.batch_size / parts > room and not spec.batch_size % (2 * parts):
            parts *= 2
        spec = _accumulating(spec, parts)
    return spec


def _accumulating(spec: TrainSpec, parts: int) -> TrainSpec:
    return dataclasses.replace(spec, optim=dataclasses.replace(spec.optim, accumulate=parts))


# The learning rate -------------------------------------------------------------------------------


def _chosen_rate(inputs: Inputs, pace: float, console: Console) -> TrainSpec:
    """The spec with the learning rate of `optim.rates` whose short run of its own, from the same
    weights and over the same batches, ends with the lowest loss on the val part."""
    spec = inputs.spec
    if spec.steps is None:
        count = int(TRIAL_SHARE * seconds(spec.time or "") / pace)
        if count < 5:
            said = f"too little time to try learning rates: {spec.optim.lr:g} it is"
            console.print(said, highlight=False)
            return spec
    else:
        count = max(5, min(100, int(TRIAL_SHARE * spec.steps)))
    losses: dict[float, float] = {}
    for rate in spec.optim.rates:
        with console.status(f"trying the learning rate {rate:g} for {count} steps"):
            losses[rate] = _trial_loss(inputs, rate, count)
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise PatchwordError(
            f"no learning rate of {', '.join(f'{rate:g}' for rate in losses)} gives a finite loss; "
            "give a lower --lr"
        )
    best = min(finite, key=lambda rate: finite[rate])
    others = ", ".join(f"{loss:.3f} at {rate:g}" for rate, loss in losses.items() if rate != best)
    console.print(
        f"learning rate {best:g}: val loss {losses[best]:.3f} after {count} steps"
        + (f", against {others}" if others else ""),
        highlight=False,
    )
    return dataclasses.replace(spec, optim=dataclasses.replace(spec.optim, lr=best))


def _trial_loss(inputs: Inputs, rate: float, count: int) -> float:
    trainer = _trial(inputs, count, rate)
    with closing(inputs.feed(0, count)) as batches:
        for position, batch in enumerate(batches):
            step_rate = learning_rate(position, count, trainer.spec.optim)
            loss, _ = trainer.step(*inputs.prepare(batch, position), step_rate)
            if not math.isfinite(loss):
                return math.inf
            trainer.progress.step = trainer.progress.position = position + 1
    some = drawn(inputs.source.labels, inputs.division["val"], TRIAL_IMAGES, trainer.spec.seed)
    measure = progress_evaluator(inputs, trainer.objective, some)
    return float(measure(trainer.network.eval())["loss"])


def _trial(inputs: Inputs, steps: int, rate: float | None = None) -> Trainer:
    """A trainer of a copy of the model, for a run of so many steps; the one before is let go."""
    _let_go()
    spec = runs.with_steps(inputs.spec, steps)
    if rate is not None:
        spec = dataclasses.replace(spec, optim=dataclasses.replace(spec.optim, lr=rate))
    dtype = resolve_precision(spec.precision, inputs.device)
    return Trainer(copy.deepcopy(inputs.model), spec, inputs.device, dtype, inputs.class_weights())


def _let_go() -> None:
    """Give back the memory of trials that are over: PyTorch's optimisers hang in cycles of
    references, which Python leaves lying for a while, their weights on the device with them."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


# The length --------------------------------------------------------------------------------------


def _limit(spec: TrainSpec) -> float:
    """Seconds to measure the pace for."""
    return min(30.0, 0.03 * seconds(spec.time or ""))


def _in_time(
    inputs: Inputs, pace: float, started: float, console: Console, ready: bool
) -> TrainSpec:
    """The spec with as many steps as fit into its time with the evaluations, which are timed on a
    sample, and 5 % in hand; none if that is too short for a step and a model is `ready`.

    Raises `PatchwordError` if it is too short and none is.
    """
    spec = inputs.spec
    budget = seconds(spec.time or "")
    trainer = _trial(inputs, 1000)
    val = _evaluation_time(inputs, trainer, "val") * (2 if spec.optim.average else 1)
    test = _evaluation_time(inputs, trainer, "test")
    left = 0.95 * (budget - (time.monotonic() - started)) - test - (val if ready else 0.0)
    if spec.eval_every is None:
        rounds = max(1, min(10, int(EVALUATION_SHARE * left / val))) if val else 10
        steps = int((left - rounds * val) / pace)
        spec = dataclasses.replace(spec, eval_every=max(1, math.ceil(steps / rounds)))
    else:
        steps = int(left / (pace + val / spec.eval_every))
    if steps < 1 and not ready:
        raise PatchwordError(
            f"--time {spec.time} is too short: a step takes {pace:.2g} s, an evaluation {val:.2g} "
            f"s, and {max(left, 0):.0f} s are left for them; give more time"
        )
    said = (
        f"{spec.time}: {steps:,} steps of {pace:.3f} s"
        if steps > 0
        else (f"{spec.time} leaves no time to train in: the head on frozen features is the model")
    )
    console.print(said, highlight=False, soft_wrap=True)
    return runs.with_steps(spec, max(0, steps))


def _evaluation_time(inputs: Inputs, trainer: Trainer, part: str) -> float:
    """Seconds that the evaluation of a part takes, by a sample of it; without labels there is none
    of test."""
    size = len(inputs.division[part])
    some = inputs.division[part][: 4 * eval_batch_size(inputs.model)]
    if not size or (part == "test" and inputs.spec.self_supervised):
        return 0.0
    began = time.monotonic()
    if part == "val":
        progress_evaluator(inputs, trainer.objective, some)(trainer.network.eval())
        size += probed_images(inputs)
    else:
        inputs.evaluator(part, some)(trainer.network.eval())
    return (time.monotonic() - began) * size / len(some)


def _pace(trainer: Trainer, inputs: Inputs, limit: float, steps: int = 4) -> float:
    """Mean seconds per step over `steps` steps and `limit` seconds at least, but for the first
    three."""
    taken: list[float] = []
    with closing(inputs.feed(0, 10_000)) as batches:
        began = mark = time.monotonic()
        for position, batch in enumerate(batches):
            trainer.step(*inputs.prepare(batch, position), trainer.spec.optim.lr * 1e-3)
            taken.append(time.monotonic() - mark)
            mark = time.monotonic()
            if len(taken) >= steps and mark - began >= limit:
                break
    return float(np.mean(taken[3:] or taken))
