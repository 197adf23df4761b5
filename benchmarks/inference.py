"""Speed of the forward pass: patchword beside timm, transformers, torchvision and vit-pytorch.

    python benchmarks/inference.py --model ViT-Ti/16 --image-size 224 --batch-sizes 1 8 32

Images per second and latency (median and 99th percentile of single calls), on normalised images
already on the device; bfloat16 contenders hold bfloat16 weights and get bfloat16 images.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import tyro
from torch import Tensor

import peers
import timing
from patchword.models.vit import ViT

BASELINE = "timm float32"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Options(timing.Options):
    """Time the forward pass of every contender, in interleaved shuffled rounds."""

    batch_sizes: tuple[int, ...] = (1, 8, 32)
    calls_per_round: int = 8


def contenders(model: ViT, options: Options) -> dict[str, tuple[Forward, torch.dtype]]:
    """The forward pass of each contender, and the dtype of its images, by name."""
    chosen: dict[str, tuple[Forward, torch.dtype]] = {}
    for library in ("patchword", *peers.installed()):
        for precision, dtype in DTYPES.items():
            for suffix in ("", " compiled"):
                name = f"{library} {precision}{suffix}"
                if not options.wants(name, BASELINE):
                    continue
                own = library == "patchword"
                module = deepcopy(model) if own else peers.build(library, model)
                module = module.eval().to(options.device, dtype)
                call = torch.compile(module, dynamic=False) if suffix else module
                chosen[name] = (call, dtype)
    return chosen


@torch.inference_mode()
def measure(
    forwards: dict[str, tuple[Forward, torch.dtype]], images: Tensor, options: Options
) -> list[dict[str, Any]]:
    """The rows of one batch of images, float32 `[B, C, H, W]`."""
    calls = {name: partial(call, images.to(dtype)) for name, (call, dtype) in forwards.items()}
    times = timing.interleave(calls, options, options.calls_per_round)
    return timing.summarize(times, BASELINE, len(images))


def main(options: Options) -> None:
    model = peers.from_options(options)
    facts = peers.describe(model)
    forwards = contenders(model, options)
    results: dict[str, list[dict[str, Any]]] = {}
    for size in options.batch_sizes:
        images = torch.randn(size, model.spec.in_channels, *model.spec.image_size)
        rows = measure(forwards, images.to(options.device), options)
        timing.show(f"{options.title}, forward, batch {size}", rows, BASELINE)
        results[str(size)] = rows
    if options.save:
        content = {"settings": asdict(options), **facts, "baseline": BASELINE, "results": results}
        print(timing.record(f"inference {options.title}", options.device, content))


if __name__ == "__main__":
    main(tyro.cli(Options))
