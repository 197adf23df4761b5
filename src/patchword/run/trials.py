"""What a run can only find out by trying: resolution, a head, parts that fit, a learning rate, its
length. Trials work on copies and throw-away inputs, and return values."""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import numpy as np
import torch
from rich.console import Console

from patchword.data.splits import drawn
from patchword.evaluation.probe import Probe, fit_logistic, sweep_logistic
from patchword.models.summary import layer_table
from patchword.models.vit import ViT
from patchword.models.zoo import enlarged
from patchword.run.inputs import Inputs, build_model
from patchword.run.pretraining import probed_images, progress_evaluator
from patchword.session.features import Features, eval_batch_size, extract
from patchword.spec.parse import PatchwordError
from patchword.spec.settled import Settled
from patchword.spec.train import TrainSpec, seconds
from patchword.training.optim import learning_rate
from patchword.training.trainer import Trainer

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


class OutOfMemory(PatchwordError):
    """The memory is too small for a step; the message says what helps."""


@contextmanager
def memory_explained(settled: Settled) -> Iterator[None]:
    """Turn the errors of want of memory, the device's or the host's, into one with a remedy."""
    try:
        yield
    except RuntimeError as error:
        if not _is_memory(error):
            raise
        parts = settled.parts
        raise OutOfMemory(
            f"out of memory with {settled.request.batch_size // parts} images at a time; "
            f"use --parts {2 * parts}, or a smaller --batch-size"
        ) from error


def _is_memory(error: RuntimeError) -> bool:
    """The driver, cuBLAS and Triton take memory besides PyTorch, and say so in words."""
    words = ("can't allocate", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in words)


def trainer_of(inputs: Inputs) -> Trainer:
    """A trainer of a copy of the model; the one before is let go."""
    let_go()
    return Trainer(copy.deepcopy(inputs.model), inputs.settled, inputs.class_weights())


def let_go() -> None:
    """Give back the memory of trials that are over: PyTorch's optimisers hang in cycles of
    references, which Python leaves lying for a while, their weights on the device with them."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


# The resolution ----------------------------------------------------------------------------------


def fitting_size(inputs: Inputs, began: float, console: Console) -> tuple[int, int]:
    """`enlarge` times the resolution, if a logistic regression on frozen features is better there
    on the val part; else that of the inputs.

    It stays where the model has no other or no head for this, where there is no val part, and where
    the time is too short for `ENLARGED_EPOCHS`.
    """
    request, own = inputs.request, inputs.settled.image_size
    size = enlarged(inputs.model.spec, request.enlarge)
    if size == own or not len(inputs.division["val"]):
        return own
    settled = dataclasses.replace(inputs.settled, image_size=size)
    larger = dataclasses.replace(
        inputs, settled=settled, model=build_model(settled, inputs.source, quiet=True)
    )
    here, there = _by(own), _by(size)
    if request.time is not None:
        epochs = _epochs_in_time(larger, began, console)
        if epochs < ENLARGED_EPOCHS:
            said = f"resolution {here}: {request.time} is {epochs:.1f} epochs at {there}"
            console.print(said, highlight=False)
            return own
    accuracies: list[float] = []
    for tried in (inputs, larger):
        probe = probe_head(tried, console, most=SIZE_IMAGES, quiet=True)
        if probe is None:
            return own
        accuracies.append(probe.accuracy)
    better = accuracies[1] > accuracies[0]
    console.print(
        f"resolution {there if better else here}: a head on frozen features has top-1 on val "
        f"{accuracies[0]:.2%} at {here}, {accuracies[1]:.2%} at {there}",
        highlight=False,
        soft_wrap=True,
    )
    return size if better else own


def _by(size: tuple[int, int]) -> str:
    return "{}x{}".format(*size)


def _epochs_in_time(inputs: Inputs, began: float, console: Console) -> float:
    """About as many epochs as the run will have, by the time of a step."""
    request = inputs.request
    inputs = inputs.settling(parts=fitting_parts(inputs))
    with memory_explained(inputs.settled), console.status("measuring the time of a step"):
        step = pace(trainer_of(inputs), inputs, limit(request) / 3)
    left = 0.75 * (seconds(request.time or "") - (time.monotonic() - began))
    return left / step * request.batch_size / len(inputs.division["train"])


# A head to start from -----------------------------------------------------------------------------


def probe_head(
    inputs: Inputs, console: Console, *, most: int | None = None, quiet: bool = False
) -> Probe | None:
    """A logistic regression on the model's frozen features, its regulariser chosen on the val part:
    a usable classifier before any training; of `most` images of a part, if so many are enough.

    The features are kept on disk (`features.extract`, `quiet` as there). Returns None where the
    head is not one linear layer on them.
    """
    model, request = inputs.model, inputs.request
    if model.head is None or (isinstance(model, ViT) and model.pre_logits is not None):
        return None
    features: dict[str, Features] = {}
    with console.status("") as status:
        for part in ("train", "val"):
            indices = inputs.division[part]
            if most is not None:
                indices = drawn(inputs.source.labels, indices, most, request.seed)
            if len(indices):
                features[part] = extract(
                    model,
                    inputs.source,
                    indices,
                    device=inputs.device,
                    batch_size=eval_batch_size(model),
                    workers=inputs.settled.workers if len(indices) > 256 else 0,
                    precision=inputs.settled.precision,
                    on_bad=request.data.on_bad_image,
                    quiet=quiet,
                    progress=lambda done, total, part=part: status.update(
                        f"features of {part}: {done:,}/{total:,} images"
                    ),
                )
        status.update("fitting a head to the features")
        return _probe(features["train"], features.get("val"), len(inputs.source.classes))


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


# The parts of a step -----------------------------------------------------------------------------


def fitting_parts(inputs: Inputs) -> int:
    """As many parts of a step as the memory needs: on a GPU the first number with which a step
    works, elsewhere by the activations that a step keeps. Raises `PatchwordError` if no number is
    enough."""
    batch, parts = inputs.request.batch_size, inputs.settled.parts
    if has_own_memory(inputs.device):
        while not _fits(inputs.settling(parts=parts), last=bool(batch % (2 * parts))):
            parts *= 2
        return parts
    kept = sum(row.activation_bytes for row in layer_table(inputs.model.spec))
    size = kept // 2 if inputs.settled.precision == "bfloat16" else kept
    room = 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    while size * batch / parts > room and not batch % (2 * parts):
        parts *= 2
    return parts


def has_own_memory(device: torch.device) -> bool:
    """Whether want of memory on the device is an error to go on from: on a CPU the system may end
    the process instead."""
    return device.type == "cuda"


def _fits(inputs: Inputs, *, last: bool) -> bool:
    """Whether there is memory for a step; raises `OutOfMemory` if there is not, and no smaller
    parts are to be had."""
    try:
        with memory_explained(inputs.settled):
            pace(trainer_of(inputs), inputs, 0.0, steps=1)
    except OutOfMemory:
        if last:
            raise
        return False
    return True


# The learning rate -------------------------------------------------------------------------------


def best_rate(inputs: Inputs, step: float, console: Console) -> float:
    """The learning rate of `optim.rates` whose short run of its own, from the same weights and over
    the same batches, ends with the lowest loss on the val part; of a run limited in time `step` is
    how long a step takes, in seconds."""
    request = inputs.request
    rates = request.optim.rates
    count = max(5, min(100, int(TRIAL_SHARE * inputs.settled.steps)))
    if request.time is not None:
        count = int(TRIAL_SHARE * seconds(request.time) / step)
        if count < 5:
            said = f"too little time to try learning rates: {request.optim.lr:g} it is"
            console.print(said, highlight=False)
            return request.optim.lr
    losses: dict[float, float] = {}
    for rate in rates:
        with console.status(f"trying the learning rate {rate:g} for {count} steps"):
            losses[rate] = trial_loss(inputs, rate, count)
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
    return best


def trial_loss(inputs: Inputs, rate: float, count: int) -> float:
    """The loss on images of val after a run of `count` steps; infinite if it was not finite on the
    way."""
    tried = inputs.settling(steps=count, lr=rate)
    trainer = trainer_of(tried)
    with closing(tried.feed(0, count)) as batches:
        for position, batch in enumerate(batches):
            step_rate = learning_rate(position, count, tried.settled.optim)
            loss, _ = trainer.step(*tried.prepare(batch, position), step_rate)
            if not math.isfinite(loss):
                return math.inf
            trainer.progress.step = trainer.progress.position = position + 1
    labels, val = inputs.source.labels, inputs.division["val"]
    some = drawn(labels, val, TRIAL_IMAGES, inputs.request.seed)
    measure = progress_evaluator(inputs, trainer.objective, some)
    return float(measure(trainer.network.eval())["loss"])


# The length --------------------------------------------------------------------------------------


def limit(request: TrainSpec) -> float:
    """Seconds to measure the pace for."""
    return min(30.0, 0.03 * seconds(request.time or ""))


def fitting_length(
    inputs: Inputs, step: float, began: float, console: Console, *, ready: bool
) -> tuple[int, int | None]:
    """As many steps of `step` seconds as fit into the time with the evaluations, which are timed on
    a sample, and 5 % in hand, and how many of them are between two evaluations where the user does
    not say; no steps if that is too short for one and a model is `ready`.

    Raises `PatchwordError` if it is too short and none is.
    """
    request = inputs.request
    text = request.time or ""
    trainer = trainer_of(inputs)
    val = evaluation_time(inputs, trainer, "val") * (2 if request.optim.average else 1)
    test = evaluation_time(inputs, trainer, "test")
    left = 0.95 * (seconds(text) - (time.monotonic() - began)) - test - (val if ready else 0.0)
    every = None
    if request.eval_every is None:
        rounds = max(1, min(10, int(EVALUATION_SHARE * left / val))) if val else 10
        steps = int((left - rounds * val) / step)
        every = max(1, math.ceil(steps / rounds))
    else:
        steps = int(left / (step + val / request.eval_every))
    if steps < 1 and not ready:
        raise PatchwordError(
            f"--time {text} is too short: a step takes {step:.2g} s, an evaluation {val:.2g} s, "
            f"and {max(left, 0):.0f} s are left for them; give more time"
        )
    said = f"{text} leaves no time to train in: the head on frozen features is the model"
    if steps > 0:
        said = f"{text}: {steps:,} steps of {step:.3f} s"
    console.print(said, highlight=False, soft_wrap=True)
    return max(0, steps), every


def evaluation_time(inputs: Inputs, trainer: Trainer, part: str) -> float:
    """Seconds that the evaluation of a part takes, by a sample of it; without labels there is none
    of test."""
    size = len(inputs.division[part])
    some = inputs.division[part][: 4 * eval_batch_size(inputs.model)]
    if not size or (part == "test" and inputs.request.self_supervised):
        return 0.0
    began = time.monotonic()
    if part == "val":
        progress_evaluator(inputs, trainer.objective, some)(trainer.network.eval())
        size += probed_images(inputs)
    else:
        inputs.evaluator(part, some)(trainer.network.eval())
    return (time.monotonic() - began) * size / len(some)


def pace(trainer: Trainer, inputs: Inputs, seconds_at_least: float, steps: int = 4) -> float:
    """Mean seconds per step over `steps` steps and so many seconds at least, but for the first
    three."""
    taken: list[float] = []
    with closing(inputs.feed(0, 10_000)) as batches:
        began = mark = time.monotonic()
        for position, batch in enumerate(batches):
            trainer.step(*inputs.prepare(batch, position), inputs.settled.lr * 1e-3)
            taken.append(time.monotonic() - mark)
            mark = time.monotonic()
            if len(taken) >= steps and mark - began >= seconds_at_least:
                break
    return float(np.mean(taken[3:] or taken))
