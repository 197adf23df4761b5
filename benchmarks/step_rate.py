"""Images a second of patchword's training step, and its share of what the device multiplies.

    python benchmarks/step_rate.py --model ViT-B/16 --device cuda

The step is that of `train_step.py`, in the device's own precision, eager and compiled, with the
largest batch (a power of two) that a step works with. In the same rounds the device multiplies two
random square matrices of the same dtype: the step's FLOP/s, three times those of the forward pass,
as a share of that rate. Each kind of step is written down as soon as it is measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import peers
import timing
from patchword.models.vit import ViT
from patchword.models.zoo import build_model
from patchword.session.device import resolve_precision
from train_step import Options, own_step

SIDE = {"cuda": 8192, "cpu": 1024}
"""Of the matrices."""


def forward_flops(model: ViT) -> int:
    """Floating-point operations of the matrix products of one image's forward pass, two a
    multiply-accumulate, as PyTorch counts them while they run."""
    with torch.device("meta"), torch.no_grad():
        twin = build_model(model.spec).eval()
        images = torch.empty(1, model.spec.in_channels, *model.spec.image_size)
        with FlopCounterMode(display=False) as counter:
            twin(images)
    return counter.get_total_flops()


def batch_of(model: ViT, options: Options) -> tuple[Tensor, Tensor]:
    images = torch.randn(options.batch_size, model.spec.in_channels, *model.spec.image_size)
    labels = torch.randint(options.classes, (options.batch_size,))
    return images.to(options.device), labels.to(options.device)


def fitted(model: ViT, dtype: torch.dtype, options: Options) -> Options:
    """The options with the batch halved until a step works. Raises the allocator's error if even
    one image is too much."""
    while True:
        try:
            own_step(deepcopy(model), dtype, options, compiled=False)(*batch_of(model, options))
            return options
        except torch.OutOfMemoryError:
            if options.batch_size == 1:
                raise
        torch.cuda.empty_cache()
        options = replace(options, batch_size=options.batch_size // 2)


def product(dtype: torch.dtype, device: str) -> tuple[Callable[[], Tensor], int]:
    """What multiplies two square matrices, and the floating-point operations of that."""
    side = SIDE[device]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return partial(torch.mm, a, b), 2 * side**3


def measured(model: ViT, dtype: torch.dtype, options: Options, *, compiled: bool) -> dict[str, Any]:
    """Speed of a kind of step, next to that of the matrix product."""
    step = own_step(deepcopy(model), dtype, options, compiled=compiled)
    images, labels = batch_of(model, options)
    multiply, work = product(dtype, options.device)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first, _ = cast(tuple[float, float], step(images, labels))
    contenders = {"step": partial(step, images, labels), "product": multiply}
    times = timing.interleave(contenders, options, options.steps_per_round)
    seconds = {name: float(np.median(values)) for name, values in times.items()}
    flops = 3 * forward_flops(model) * options.batch_size
    rate, ceiling = flops / seconds["step"], work / seconds["product"]
    return {
        "compiled": compiled,
        "first_loss": first,
        "step": timing.spread(times["step"]),
        "product": timing.spread(times["product"]),
        "images_per_second": options.batch_size / seconds["step"],
        "tflops": rate / 1e12,
        "product_tflops": ceiling / 1e12,
        "share": rate / ceiling,
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30
        if options.device == "cuda"
        else None,
    }


def main(options: Options, out: Path) -> None:
    """Measure; raises `AssertionError` if the compiled step computes another loss."""
    model = peers.from_options(options)
    dtype = resolve_precision("auto", torch.device(options.device))
    options = fitted(model, dtype, options)
    results: list[dict[str, Any]] = []
    for compiled in (False, True) if options.compile else (False,):
        torch.manual_seed(options.seed)  # the same images and labels
        row = measured(model, dtype, options, compiled=compiled)
        results.append(row)
        content = {
            "title": f"{options.title}, batch {options.batch_size}",
            "dtype": str(dtype).removeprefix("torch."),
            "settings": asdict(options),
            "forward_gflops": forward_flops(model) / 1e9,
            "results": results,
        }
        out.write_text(json.dumps(timing.headed(options.device, content), indent=1) + "\n")
        print(
            f"{options.title}, batch {options.batch_size}, {content['dtype']}, "
            f"{'compiled' if compiled else 'eager'}: {1000 * row['step']['median']:.1f} ms, "
            f"{row['images_per_second']:.1f} images/s, {row['tflops']:.3g} TFLOP/s, "
            f"{row['share']:.1%} of the matrix product's {row['product_tflops']:.3g}",
            flush=True,
        )
    losses = [row["first_loss"] for row in results]
    assert max(losses) - min(losses) < 0.02 * abs(losses[0]), f"first losses differ: {losses}"


def arguments() -> tuple[Options, Path]:
    """From the command line, by the standard library: a bare machine may have no tyro."""
    base = Options(model="ViT-B/16", batch_size=512, rounds=8, warmup=2)
    parser = argparse.ArgumentParser(description="Speed of a training step")
    parser.add_argument("--model", default=base.model)
    parser.add_argument("--image-size", type=int, default=base.image_size)
    parser.add_argument("--depth", type=int)
    parser.add_argument("--batch-size", type=int, default=base.batch_size, help="largest to try")
    parser.add_argument("--rounds", type=int, default=base.rounds)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--out", type=Path, default=Path("step-rate.json"))
    given = vars(parser.parse_args())
    out = given.pop("out")
    return replace(base, **given), out


if __name__ == "__main__":
    main(*arguments())
