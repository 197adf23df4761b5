"""Requests settled without a run, for what takes a run's settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from patchword.run.folder import stored_config
from patchword.run.settle import assumed
from patchword.spec.settled import Settled
from patchword.spec.train import TrainSpec, TuneSpec


def settled(request: TrainSpec, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Settled:
    """What the request settles to, on one training image, in 10 steps if it names no length and
    with ViT-mu/8 if it names no model."""
    lengths = (request.steps, request.epochs, request.images, request.time)
    definite = dataclasses.replace(
        request,
        model=request.model or (None if request.init else "ViT-mu/8"),
        steps=10 if lengths == (None,) * 4 else request.steps,
        workers=request.workers or 0,
        device=device,  # pyright: ignore[reportArgumentType]
        precision="float32" if dtype is torch.float32 else "bfloat16",
    )
    one = np.zeros(1, np.int64)
    from_scratch = dataclasses.replace(definite, tuning=TuneSpec())
    found = assumed(from_scratch, {"train": one, "val": one, "test": one})
    return dataclasses.replace(found, request=definite)


def stored(run: Path) -> Settled:
    """What the run in a folder settled to."""
    config = stored_config(run)
    assert config is not None
    assert config.settled is not None
    return config.settled


def config(run: Path) -> TrainSpec:
    """The request that the run in a folder settled to."""
    return stored(run).pinned()
