"""The ways in which a run starts, all of them.

| way | model | settings |
|---|---|---|
| new, from scratch | drawn by the seed | settled and stored |
| new, from weights | those of `init`, with a new head | settled and stored |
| new, with a head ready (`probe`) | the same; a head on its frozen features is fitted | the same |
| resumed | that of the newest checkpoint | those stored |
| resumed before the first checkpoint | as a new one, its head fitted again | those stored |
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from patchword.models.model import Model
from patchword.run import folder
from patchword.run.inputs import Data, Inputs, build_model
from patchword.run.pretraining import probed_images
from patchword.run.say import say_data, say_objective, say_warmup
from patchword.run.settle import ready_head, settle
from patchword.spec.settled import Settled
from patchword.spec.train import TrainSpec
from patchword.training.checkpoint import Checkpoints
from patchword.training.trainer import HeadValues, wearing
from patchword.weights.files import SINGLE
from patchword.weights.load import load_model
from patchword.weights.save import save_model


@dataclass(frozen=True)
class Start:
    """What a run starts with."""

    inputs: Inputs
    head: HeadValues | None = None
    """on the frozen features, if there is one"""
    checkpoint: tuple[Path, dict[str, Any]] | None = None
    """to go on from"""


def start_new(run: Path, request: TrainSpec, data: Data, began: float, console: Console) -> Start:
    """A new run: what it settles to is stored in its folder, which is emptied only then."""

    def keep(model: Model, head: HeadValues) -> None:
        with wearing([model], head):
            save_model(model, run / folder.HEAD, overwrite=True)
        text = f"usable from now on: patchword predict {run / folder.HEAD} IMAGES"
        console.print(text, highlight=False, soft_wrap=True)

    inputs, head = settle(request, data, began, console, keep)
    folder.clear(run, None if head is None else folder.HEAD)
    folder.store(run, request, inputs.settled, data.source, data.division)
    say_warmup(inputs.settled)
    return Start(inputs, head)


def start_again(
    run: Path,
    settled: Settled,
    data: Data,
    checkpoints: Checkpoints,
    began: float,
    console: Console,
) -> Start:
    """A run that was stopped, with what it settled to."""
    newest = checkpoints.newest()
    if newest is None or settled.request.init is None:
        model = build_model(settled, data.source)
    else:  # the weights of `init` may have gone since
        model = load_model(newest[0] / SINGLE)
    inputs = Inputs(data=data, settled=settled, model=model)
    say_data(console, data, settled.request)
    if settled.request.self_supervised:
        say_objective(console, settled, probed_images(inputs))
    inputs = inputs.decoded(console)
    head = ready_head(inputs, began, console) if newest is None else None
    return Start(inputs, head, newest)
