"""Time of a training step: patchword beside timm, transformers, torchvision and vit-pytorch.

    python benchmarks/train_step.py --model ViT-Ti/16 --image-size 224 --batch-size 16
    python benchmarks/train_step.py --model ViT-Ti/4 --depth 9 --image-size 32 --classes 10 \
        --batch-size 128

A step is the forward pass, softmax cross-entropy, backward pass, clipping to global norm 1, a fused
AdamW update and zeroing the gradients, on normalised float32 images already on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peers
import timing
from patchword.models.vit import ViT
from patchword.models.zoo import variant_name
from patchword.run.settle import assumed
from patchword.session.device import resolve_precision
from patchword.spec.train import OptimSpec, TrainSpec
from patchword.training.trainer import Trainer

BASELINE = "timm float32"
OPTIM = OptimSpec(lr=1e-4, weight_decay=0.05, clip=1.0)


@dataclass(frozen=True, kw_only=True)
class Options(timing.Options):
    """Time one training step of every contender, in interleaved shuffled rounds."""

    batch_size: int = 16
    steps_per_round: int = 4


Step = Callable[[Tensor, Tensor], object]


def peer_step(model: nn.Module, device: str, *, autocast: bool, compiled: bool) -> Step:
    """A step as users of the library write it: float32 weights, with or without bf16 autocast."""
    parameters = list(model.train().parameters())
    run = torch.compile(model, dynamic=False) if compiled else model
    optimizer = torch.optim.AdamW(
        parameters, lr=OPTIM.lr, weight_decay=OPTIM.weight_decay, fused=True
    )

    def step(images: Tensor, labels: Tensor) -> None:
        with torch.autocast(device, torch.bfloat16) if autocast else nullcontext():
            loss = F.cross_entropy(run(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, OPTIM.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def own_step(model: ViT, dtype: torch.dtype, options: Options, *, compiled: bool) -> Step:
    """The step of patchword's training loop, which also reads the loss and tests that it and the
    gradients are finite."""
    request = TrainSpec(
        source="random",
        model=variant_name(model.spec),
        optim=OPTIM,
        batch_size=options.batch_size,
        device=options.device,
        precision="float32" if dtype is torch.float32 else "bfloat16",
        compile=compiled,
        steps=1,
    )
    trainer = Trainer(model, assumed(request, {"train": np.zeros(1, np.int64)}))
    return partial(trainer.step, lr=OPTIM.lr)


def contenders(model: ViT, options: Options) -> dict[str, Step]:
    """A training step of each contender, by name. `default` is patchword's own choice of precision
    for the device."""
    chosen: dict[str, Step] = {}
    device = torch.device(options.device)
    default = resolve_precision("auto", device)
    for name, dtype in (
        ("patchword float32", torch.float32),
        ("patchword default", default),
        ("patchword default compiled", default),
    ):
        if options.wants(name, BASELINE):
            compiled = name.endswith("compiled")
            chosen[name] = own_step(deepcopy(model), dtype, options, compiled=compiled)
    for library in peers.installed():
        for precision in ("float32", "autocast", "autocast compiled"):
            name = f"{library} {precision}"
            if options.wants(name, BASELINE):
                chosen[name] = peer_step(
                    peers.build(library, model).to(device),
                    options.device,
                    autocast="autocast" in name,
                    compiled="compiled" in name,
                )
    return chosen


def main(options: Options) -> None:
    model = peers.from_options(options)
    facts = peers.describe(model)
    images = torch.randn(options.batch_size, model.spec.in_channels, *model.spec.image_size)
    labels = torch.randint(options.classes, (options.batch_size,))
    images, labels = images.to(options.device), labels.to(options.device)
    steps = {
        name: partial(step, images, labels) for name, step in contenders(model, options).items()
    }
    times = timing.interleave(steps, options, options.steps_per_round)
    rows = timing.summarize(times, BASELINE, options.batch_size)
    title = f"{options.title}, batch {options.batch_size}"
    timing.show(f"{title}, training step", rows, BASELINE)
    if options.save:
        content = {"settings": asdict(options), **facts, "baseline": BASELINE, "results": rows}
        print(timing.record(f"train-step {title}", options.device, content))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options))
