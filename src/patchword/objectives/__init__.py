"""What training minimises: the labels' loss, or without labels what patches look like.

The loop and the trainer know `Objective` alone.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from patchword.data.seeding import derived_seed
from patchword.models.model import Model
from patchword.models.vit import ViT
from patchword.models.zoo import macs, unfilled_model, variant_name
from patchword.objectives import mae, masked_patch
from patchword.objectives.base import Objective
from patchword.objectives.classification import LabelLoss
from patchword.spec.model import ModelSpec, ViTSpec
from patchword.spec.parse import UsageError, nearest
from patchword.spec.train import TrainSpec

UNLABELLED = {"masked-patch": masked_patch.MaskedPatch, "mae": mae.MaskedAutoencoder}
"""Those that need no labels."""
RATES = {"masked-patch": masked_patch.RATE, "mae": mae.RATE}
"""The share of masked patches where none is asked for."""


def create_objective(
    spec: TrainSpec, model: Model, class_weights: Tensor | None = None
) -> Objective:
    """The objective of a run for a model; what it trains besides is drawn by the run's seed. Raises
    `UsageError` if the model is not one for it."""
    if spec.objective == "classification":
        return LabelLoss(spec.optim, class_weights)
    check_objective(spec, model.spec)
    if not isinstance(model, ViT):
        raise TypeError("check_objective lets ViTs pass alone")
    with torch.random.fork_rng([]):
        torch.manual_seed(derived_seed(spec.seed, "objective"))
        return UNLABELLED[spec.objective](model, spec.pretrain)


def check_objective(spec: TrainSpec, model: ModelSpec) -> None:
    """Raises `UsageError` if the spec's objective is unknown, or not for such a model."""
    if spec.objective == "classification":
        return
    if spec.objective not in UNLABELLED:
        names = ("classification", *UNLABELLED)
        raise UsageError(f"unknown objective {spec.objective!r}{nearest(spec.objective, names)}")
    what = f"--objective {spec.objective}"
    if not isinstance(model, ViTSpec):
        raise UsageError(
            f"{what} is for a ViT, not {variant_name(model)}; use --model ViT-S/16 or another ViT"
        )
    if model.stem is not None:
        raise UsageError(
            f"{what} does not go with the hybrid {variant_name(model)}: through its ResNet the "
            "neighbours of a masked patch show what it is; use a ViT without a ResNet"
        )
    if math.prod(model.grid) < 2:
        raise UsageError(f"{what} needs two patches or more; use a larger --image-size")
    if spec.objective == "mae" and (
        model.position in ("relative", "rotary") or model.position_at != "stem"
    ):
        raise UsageError(
            f"{what} needs positions that are added at the stem, as its encoder sees some of the "
            "patches only; use --position sincos2d or learned-1d with --position-at stem"
        )
    small = spec.objective == "masked-patch" and spec.pretrain.predict == "4x4"
    if small and min(model.patch_size) < masked_patch.SMALL:
        raise UsageError(
            f"--predict 4x4 needs patches of {masked_patch.SMALL} pixels or more, not "
            f"{model.patch_size[0]}x{model.patch_size[1]}; use --predict mean"
        )


def training_exaflops(spec: TrainSpec, model: ModelSpec, images: int) -> float:
    """What a run computes for so many images, two operations a multiply-accumulate.

    The forward pass of everything counts once. What is trained counts twice more, for the gradients
    of its weights and of its inputs (section 4.4: 6 x MACs x images / 1e18 where all is trained).
    What lies below the lowest trained part has no backward pass. LoRA's matrices count as trained:
    the gradient of each whole matrix is computed, and then projected; the products with the
    additions themselves, once a step and not once an image, are left out.
    """
    forward = training_macs(spec, model)
    return (2 * forward + 4 * (forward - _frozen_macs(spec, model))) * images / 1e18


def training_macs(spec: TrainSpec, model: ModelSpec) -> int:
    """Multiply-accumulates of one image's forward pass in training, counted as `Model.part_macs`
    does: of the model and the objective's parts, for as many tokens as they see."""
    if spec.objective == "classification" or not isinstance(model, ViTSpec):
        return sum(unfilled_model(model).part_macs(training=True))
    bare = dataclasses.replace(model, num_classes=0)
    if spec.objective == "mae":
        return mae.macs(bare, spec.pretrain)
    rate, patches = spec.pretrain.mask_rate or masked_patch.RATE, math.prod(model.grid)
    head = round(rate * patches) * model.width * masked_patch.outputs(model, spec.pretrain)
    return macs(bare) + head


def _frozen_macs(spec: TrainSpec, model: ModelSpec) -> int:
    """Of those, what lies below the lowest part that is trained (`TuneSpec`)."""
    parts = unfilled_model(model).part_macs(training=True)  # embedding, blocks, head
    below = {"all": 0, "lora": 1, "last": len(parts) - 1 - spec.tuning.last_blocks}
    return sum(parts[: below[spec.tuning.tune]])
