"""What a run says of itself when it starts."""

from __future__ import annotations

import logging

from rich.console import Console

from patchword.data.balance import imbalance
from patchword.data.splits import Division
from patchword.evaluation.probe import Probe
from patchword.models.model import Model
from patchword.models.zoo import variant_name
from patchword.objectives import training_exaflops, training_macs
from patchword.run.inputs import Data
from patchword.spec.settled import Settled
from patchword.spec.train import TrainSpec
from patchword.training.optim import span
from patchword.training.recipes import find_recipe
from patchword.training.tuning import trained_count
from patchword.weights.pretrained import suggested

logger = logging.getLogger("patchword")
FEW_IMAGES = 100_000
"""Fewer are said to be few to train from scratch on. The smallest set of the paper is ImageNet,
1.3 million images; even from that the large models are worse than the small, and B/16 reaches
89.49 % on Flowers against 99.38 % from ImageNet-21k (section 4.3, table 5)."""


def say_data(console: Console, data: Data, request: TrainSpec) -> None:
    """The images, and how even their classes are."""
    source, division = data.source, data.division
    parts = ", ".join(f"{len(at):,} {part}" for part, at in division.items() if len(at))
    what = f"{len(source.classes)} classes" if source.labelled else "no labels"
    console.print(f"data {source.name}: {what}, {parts} images", highlight=False)
    if request.self_supervised:
        return
    uneven = imbalance(source.labels[division["train"]], source.classes)
    if uneven is not None:
        remedies = {
            "none": "--balance sampler or loss makes up for it",
            "sampler": "all classes are drawn equally often",
            "loss": "images of small classes count for more",
        }
        console.print(
            f"{uneven}; {remedies[request.data.balance]}", highlight=False, soft_wrap=True
        )


def say_objective(console: Console, settled: Settled, probed: int) -> None:
    """What a self-supervised run learns, and what it has labels for."""
    what = {
        "mae": "from those that it sees, the pixels of those that it does not",
        "mean": "their mean colours",
        "4x4": "4x4 colours of each",
        "pixels": "their pixels",
    }
    request = settled.request
    kind = "mae" if request.objective == "mae" else request.pretrain.predict
    use = f"labels of {probed:,} images measure progress and choose the best weights"
    console.print(
        f"objective {request.objective}: {100 * settled.mask_rate:g} % of the patches "
        f"masked, learns {what[kind]}; {use if probed else 'no labels are used'}",
        highlight=False,
        soft_wrap=True,
    )


def say_probe(console: Console, probe: Probe, division: Division, taken: float) -> None:
    """What the head on frozen features is worth."""
    part = "val" if len(division["val"]) else "train"
    console.print(
        f"head on frozen features: top-1 on {part} {probe.accuracy:.2%} after {taken:.0f} s "
        f"(logistic regression, l2 {probe.l2:g})",
        highlight=False,
    )


def say_better(console: Console, settled: Settled, data: Data) -> None:
    """Advise to start from weights, where there are few images and the recipe is not for that many:
    those of digits and CIFAR are. Pretrained weights take images in colour."""
    request, train_images = settled.request, len(data.division["train"])
    meant = find_recipe(request.recipe).images if request.recipe else None
    small = meant is not None and meant < FEW_IMAGES
    known = request.init is not None or request.self_supervised
    if known or small or train_images >= FEW_IMAGES or data.source.channels != 3:
        return
    console.print(
        f"{train_images:,} images are few to train {settled.model} on from scratch (section 4.3): "
        f"--init {suggested(settled.model).name} would do better; "
        "`patchword models --pretrained` lists more",
        highlight=False,
        soft_wrap=True,
    )


def say_warmup(settled: Settled) -> None:
    """Warns where the learning rate never reaches its peak for long."""
    steps = settled.steps
    if span(settled.optim.warmup, steps) == steps > 1:
        logger.warning("the warm-up takes all %d steps; give a shorter --warmup", steps)


def say_cost(console: Console, settled: Settled, model: Model, train_images: int) -> None:
    """The model, the length, and what both take together."""
    request, steps = settled.request, settled.steps
    images, cost = steps * request.batch_size, training_macs(request, model.spec)
    total = training_exaflops(request, model.spec, images)
    parameters = sum(p.numel() for p in model.parameters())
    trained = trained_count(model, request.tuning)
    part = "" if trained == parameters else f" of which {trained / 1e6:.3g} M are trained,"
    console.print(
        f"model {variant_name(model.spec)}: {parameters / 1e6:.2f} M parameters,{part} "
        f"{cost / 1e9:.3g} GMACs an image; {settled.device}, {settled.precision}\n"
        f"{steps:,} steps of {request.batch_size} = {images:,} images = "
        f"{images / train_images:.1f} epochs, {total:.3g} exaFLOPs",
        highlight=False,
    )
