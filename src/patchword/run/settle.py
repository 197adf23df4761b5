"""What a run settles to: everything that the request leaves open, found once and stored.

Nothing is measured for what the request, the weights and the machine decide (`assumed`); the rest
is tried (`run.trials`), on inputs that are thrown away.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from patchword.data.splits import Division
from patchword.models.model import Model
from patchword.models.zoo import model_family, variant_name
from patchword.objectives import RATES
from patchword.run import trials
from patchword.run.inputs import Data, Inputs, build_model
from patchword.run.pretraining import probed_images
from patchword.run.say import say_data, say_objective, say_probe
from patchword.session.device import default_workers, resolve_device, resolve_precision
from patchword.spec.model import ModelSpec, PreprocessSpec
from patchword.spec.parse import UsageError, nearest
from patchword.spec.settled import DeviceName, Settled
from patchword.spec.train import ModelOptions, TrainSpec
from patchword.training.recipes import recipe_spec
from patchword.training.trainer import HeadValues
from patchword.weights.load import describe_weights, say_resampled

KeepHead = Callable[[Model, HeadValues], None]

TIMED_STEPS = 1000
"""Steps that a run limited in time is assumed to have until its pace is known."""


@dataclass(frozen=True)
class Origin:
    """The model of the weights that a run starts from."""

    spec: ModelSpec
    preprocess: PreprocessSpec


def origin_of(request: TrainSpec) -> Origin | None:
    """What the weights of `init` are; None without any."""
    if request.init is None:
        return None
    file = describe_weights(request.init, trust_pickle=request.trust_pickle)
    return Origin(file.spec, file.preprocess)


def assumed(request: TrainSpec, division: Division) -> Settled:
    """What the request settles to before anything is tried: at the resolution of the weights, at
    its own learning rate, in one part if it asks for no more, with `TIMED_STEPS` if it is limited
    in time.

    Raises `UsageError` if the model or the length is missing, the weights of `init` are of another
    model than the one named, or the model has no such option.
    """
    origin = origin_of(request)
    if origin is None:
        model = _named_model(request)
        size, family, base = request.size, model_family(model), PreprocessSpec()
    else:
        model = variant_name(origin.spec)
        size = request.size if request.image_size else origin.spec.image_size
        family, base = type(origin.spec), origin.preprocess
        if request.model not in (None, model):
            raise UsageError(
                f"--init {request.init} holds {model}, not {request.model}; leave out --model, or "
                "use another --recipe"
            )
    device = resolve_device(request.device)
    precision = resolve_precision(request.precision, device)
    settled = Settled(
        request=request,
        model=model,
        image_size=size,
        options=fitting_options(request, model, family),
        preprocess=request.preprocess.over(base),
        device=cast(DeviceName, device.type),
        precision="float32" if precision is torch.float32 else "bfloat16",
        workers=default_workers() if request.workers is None else request.workers,
        mask_rate=_mask_rate(request),
        steps=0,
        eval_every=1,
        checkpoint_every=1,
        log_every=1,
        lr=request.optim.lr,
        parts=request.optim.parts,
    )
    return with_steps(settled, _length(request, len(division["train"])))


def _named_model(request: TrainSpec) -> str:
    """The model of a run from scratch."""
    if request.enlarge != 1:
        raise UsageError(
            "--enlarge compares resolutions by the features of weights; give some with --init, or "
            "use another --recipe"
        )
    if request.tuning.tune != "all":
        raise UsageError(
            f"--tune {request.tuning.tune} keeps most weights as they are; give some with --init"
        )
    if request.model is None:
        raise UsageError("no model given; use --model ViT-S/16, or --init WEIGHTS")
    return request.model


def _mask_rate(request: TrainSpec) -> float:
    if not request.self_supervised:
        return 0.0
    rate = request.pretrain.mask_rate
    return RATES[request.objective] if rate is None else rate


def _length(request: TrainSpec, train_images: int) -> int:
    """Steps of the run. Raises `UsageError` where none are asked for."""
    if request.epochs is not None:
        return max(1, round(request.epochs * train_images / request.batch_size))
    if request.images is not None:
        return max(1, round(request.images / request.batch_size))
    if request.time is not None:
        return TIMED_STEPS
    if request.steps is None:
        raise UsageError("no length given; use --epochs, --steps, --images or --time")
    return request.steps


def with_steps(settled: Settled, steps: int, eval_every: int | None = None) -> Settled:
    """The same for another length, with what depends on it; `eval_every` where the user did not say
    how often, by default ten times a run."""
    request = settled.request
    every = request.eval_every or eval_every or max(1, math.ceil(steps / 10))
    return dataclasses.replace(
        settled,
        steps=steps,
        eval_every=every,
        checkpoint_every=request.checkpoint_every or every,
        log_every=request.log_every or max(1, min(50, steps // 100)),
    )


def fitting_options(request: TrainSpec, model: str, family: type[ModelSpec]) -> ModelOptions:
    """The options that the model's family has. Those of the recipe that it lacks are left out: most
    recipes were written for ViT. Raises `UsageError` if one lacks that the recipe does not give."""
    usual = recipe_spec(request.recipe, "").options.given() if request.recipe else {}
    known = {field.name for field in dataclasses.fields(family)}
    kept: dict[str, Any] = {}
    for name, value in request.options.given().items():
        if name in known:
            kept[name] = value
        elif usual.get(name) != value:
            fields = [f.name for f in dataclasses.fields(ModelOptions) if f.name in known]
            raise UsageError(f"{model} has no option {name!r}{nearest(name, fields)}")
    return ModelOptions(**kept)


def settle(
    request: TrainSpec, data: Data, began: float, console: Console, keep_head: KeepHead
) -> tuple[Inputs, HeadValues | None]:
    """All that a new run finds out, in the order in which one thing needs another; `began` is when
    its time began (monotonic seconds).

    Returns the inputs, their settings final, and the head on frozen features that the run begins
    with, if it asks for one; `keep_head(model, head)` is called as soon as that is there, since the
    rest takes time. Raises `UsageError` as `assumed` does, and `PatchwordError` if the memory is
    too small, or the time too short and nothing ready.
    """
    settled = assumed(request, data.division)
    inputs = Inputs(data=data, settled=settled, model=build_model(settled, data.source))
    say_data(console, data, request)
    if request.self_supervised:
        say_objective(console, settled, probed_images(inputs))
    if request.may_enlarge:
        size = trials.fitting_size(inputs, began, console)
        if size != settled.image_size:
            settled = dataclasses.replace(settled, image_size=size)
            model = build_model(settled, data.source, quiet=True)
            say_resampled(Path(request.init or ""), inputs.model.spec, model.spec)
            inputs = dataclasses.replace(inputs, settled=settled, model=model)
    inputs = inputs.decoded(console)
    head = ready_head(inputs, began, console)
    if head is not None:
        keep_head(inputs.model, head)
    return _measured(inputs, began, console, ready=head is not None), head


def ready_head(inputs: Inputs, began: float, console: Console) -> HeadValues | None:
    """The head on frozen features that a run begins with, if it asks for one and its model has a
    place for it."""
    probe = trials.probe_head(inputs, console) if inputs.request.probe else None
    if probe is None:
        return None
    say_probe(console, probe, inputs.division, time.monotonic() - began)
    return probe.weight, probe.bias


def _measured(inputs: Inputs, began: float, console: Console, *, ready: bool) -> Inputs:
    """The inputs with the settings that have to be measured on this machine and data: parts of a
    step, learning rate, length. `ready`: there is a model without training."""
    request, pace = inputs.request, 0.0
    if request.probe:
        parts = trials.fitting_parts(inputs)
        inputs = inputs.settling(parts=parts)
        if parts > 1:
            console.print(f"batch of {request.batch_size} in {parts} parts, for want of memory")
    with trials.memory_explained(inputs.settled):
        if request.time is not None:
            with console.status("measuring the time of a step"):
                pace = trials.pace(trials.trainer_of(inputs), inputs, trials.limit(request))
        if inputs.settled.steps and request.optim.rates and len(inputs.division["val"]):
            inputs = inputs.settling(lr=trials.best_rate(inputs, pace, console))
        if request.time is not None:
            steps, every = trials.fitting_length(inputs, pace, began, console, ready=ready)
            settled = with_steps(inputs.settled, steps, every)
            inputs = dataclasses.replace(inputs, settled=settled)
    trials.let_go()
    return inputs
