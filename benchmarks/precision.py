"""Loss curves in bfloat16 and in float32, over several seeds, on the same batches.

The question is whether the default CPU and GPU precision trains as float32 does: the distance
between the two precisions at the same seed, against the distance between seeds in float32.

    python benchmarks/precision.py data/cifar10 --steps 300 --seeds 3
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from tyro.conf import Positional

from patchword.data.registry import open_source
from patchword.run import folder as runs
from patchword.run.inputs import Data, Inputs, build_model
from patchword.run.settle import assumed
from patchword.spec.parse import changed
from patchword.training.recipes import base_spec
from patchword.training.trainer import Trainer
from timing import record

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Options:
    """Compare loss curves of the two precisions."""

    data: Positional[str]
    recipe: str = "cifar10-small"
    steps: int = 300
    seeds: int = 3
    batch_size: int = 64
    window: int = 20
    """steps of the moving mean that smooths the curves"""


def losses(options: Options, seed: int, precision: str, console: Console) -> np.ndarray:
    """The loss of every step, float64 `[steps]`."""
    base = base_spec(options.data, options.recipe)
    source = open_source(options.data)
    spec = changed(
        base,
        seed=seed,
        precision=precision,
        batch_size=options.batch_size,
        time=None,
        steps=options.steps,
    )
    division = runs.open_division(None, source, spec)
    settled, data = assumed(spec, division), Data(source=source, division=division)
    model = build_model(settled, source)
    inputs = Inputs(data=data, settled=settled, model=model).decoded(console)
    trainer = Trainer(model, settled)
    found: list[float] = []
    for position, batch in enumerate(inputs.feed(0, options.steps)):
        # warm-up over 50 steps, then a constant rate: short runs would else see only warm-up
        rate = spec.optim.lr * min(1.0, (position + 1) / 50)
        found.append(trainer.step(*inputs.prepare(batch, position), rate)[0])
        trainer.progress.step = trainer.progress.position = position + 1
    console.print(f"{precision} seed {seed}: last loss {np.mean(found[-options.window :]):.4f}")
    return np.array(found)


def main(options: Options) -> None:
    """Run every precision and seed; print the distances; write the record and the picture."""
    console = Console()
    kernel = np.ones(options.window) / options.window
    curves = {
        (precision, seed): np.convolve(losses(options, seed, precision, console), kernel, "valid")
        for seed in range(options.seeds)
        for precision in PRECISIONS
    }
    seeds = range(options.seeds)
    between_precisions = [np.abs(curves["bfloat16", s] - curves["float32", s]) for s in seeds]
    between_seeds = [
        np.abs(curves["float32", a] - curves["float32", b])
        for a, b in itertools.combinations(seeds, 2)
    ]
    content = {
        "options": vars(options),
        "mean_distance_between_precisions": float(np.mean(between_precisions)),
        "largest_distance_between_precisions": float(np.max(between_precisions)),
        "mean_distance_between_seeds": float(np.mean(between_seeds)),
        "largest_distance_between_seeds": float(np.max(between_seeds)),
        "last_loss": {f"{p} {s}": float(curve[-1]) for (p, s), curve in curves.items()},
    }
    console.print_json(data=content)
    path = record("precision", "cpu", content)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    colours = {"float32": "#0072B2", "bfloat16": "#D55E00"}
    for (precision, seed), curve in curves.items():
        label = precision if seed == 0 else None
        axes.plot(curve, color=colours[precision], alpha=0.7, linewidth=1.2, label=label)
    axes.set_xlabel(f"step (moving mean over {options.window})")
    axes.set_ylabel("training loss")
    axes.set_title(
        f"{options.seeds} seeds each, {options.recipe} recipe, batch {options.batch_size}"
    )
    axes.legend()
    figure.savefig(path.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Options, prog="benchmarks/precision.py"))
