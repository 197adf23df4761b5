"""The data of a training run, from a source to batches on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from patchword.data.balance import class_weights
from patchword.data.loader import (
    ImageCache,
    Plan,
    cache_images,
    eval_batches,
    train_batches,
    worth_caching,
)
from patchword.data.seeding import derived_seed
from patchword.data.sources import Source
from patchword.data.splits import Division
from patchword.data.transforms import BatchAugment, EvalTransform, TrainTransform, to_input
from patchword.evaluation.classify import Classify
from patchword.models.model import Model
from patchword.models.zoo import create_model
from patchword.objectives import check_objective
from patchword.session.features import eval_batch_size
from patchword.spec.batch import Batch
from patchword.spec.parse import PatchwordError
from patchword.spec.settled import Settled
from patchword.spec.train import TrainSpec
from patchword.training.loop import name_bad
from patchword.training.tuning import trained_names
from patchword.weights.load import transfer


@dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """The images of a run, and which of them are for what."""

    source: Source
    division: Division


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """The data of a run as its model takes them: batches to train on, and parts to measure on."""

    data: Data
    settled: Settled
    model: Model
    cached: ImageCache | None = None
    bad: dict[int, str] = field(default_factory=dict)
    """images that could not be read for an evaluation: position in the source -> reason"""
    named: set[int] = field(default_factory=set)
    """positions of the unreadable images that the log has named"""

    def settling(self, **found: Any) -> Inputs:
        """The same with settings that were found."""
        return replace(self, settled=replace(self.settled, **found))

    @property
    def request(self) -> TrainSpec:
        """What was asked of the run."""
        return self.settled.request

    @property
    def source(self) -> Source:
        return self.data.source

    @property
    def division(self) -> Division:
        return self.data.division

    @cached_property
    def device(self) -> torch.device:
        """Where the model runs."""
        return torch.device(self.settled.device)

    @cached_property
    def plan(self) -> Plan:
        """Which images make up each step."""
        train, request = self.division["train"], self.request
        balanced = self.source.labels[train] if request.data.balance == "sampler" else None
        return Plan(train, request.batch_size, request.seed, labels=balanced)

    @cached_property
    def transform(self) -> TrainTransform:
        spec = self.model.spec
        return TrainTransform(
            spec.image_size, spec.in_channels, self.model.preprocess, self.request.augment
        )

    @cached_property
    def eval_transform(self) -> EvalTransform:
        spec = self.model.spec
        return EvalTransform(spec.image_size, spec.in_channels, self.model.preprocess)

    @cached_property
    def augment(self) -> BatchAugment:
        return BatchAugment(self.request.augment, len(self.source.classes))

    def class_weights(self) -> Tensor | None:
        """float `[K]`, what the loss of an image counts by its class; None if the same for all."""
        if self.request.data.balance != "loss":
            return None
        labels = self.source.labels[self.division["train"]]
        return torch.from_numpy(class_weights(labels, len(self.source.classes)))

    def decoded(self, console: Console) -> Inputs:
        """The same with all images decoded once, if the per-image transform allows it and they fit
        in memory."""
        indices = np.concatenate([self.division["train"], self.division["val"]])
        wanted = self.request.data.cache
        if wanted == "on" and self.transform.random:
            raise PatchwordError("--cache on needs a transform without random crops; --crop resize")
        fits = worth_caching(self.source, indices, self.transform)
        if wanted == "off" or not (fits or wanted == "on"):
            return self
        with console.status("") as status:
            cached = cache_images(
                self.source,
                indices,
                self.transform,
                workers=self.settled.workers if len(indices) > 2000 else 0,
                on_bad=self.request.data.on_bad_image,
                progress=lambda done, total: status.update(f"decoding {done:,}/{total:,} images"),
            )
        return replace(self, cached=cached)

    def feed(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """The training batches of positions `start` to `stop`."""
        return train_batches(
            self.source,
            self.plan,
            self.transform,
            start=start,
            stop=stop,
            workers=self.settled.workers,
            seed=self.request.seed,
            on_bad=self.request.data.on_bad_image,
            cached=self.cached,
        )

    def prepare(self, batch: Batch, position: int) -> tuple[Tensor, Tensor]:
        """Normalised images and their targets, on the device, each part of the step augmented on
        its own."""
        images = batch.images.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        inputs, count = to_input(images, self.model.preprocess), self.settled.parts
        parts = zip(inputs.chunk(count), labels.chunk(count), strict=True)
        done = [
            self.augment(*part, self._generator(position, number))
            for number, part in enumerate(parts)
        ]
        if count == 1:
            return done[0]
        return torch.cat([part[0] for part in done]), torch.cat([part[1] for part in done])

    def _generator(self, position: int, number: int) -> torch.Generator:
        """What a part of a step is augmented by; an undivided one has no number."""
        part = (number,) if self.settled.parts > 1 else ()
        seed = derived_seed(self.request.seed, "batch", position, *part)
        return torch.Generator().manual_seed(seed)

    def note_bad(self, batch: Batch) -> None:
        """Keep count of unreadable images, and name each once."""
        for index, reason in batch.bad:
            self.bad.setdefault(index, reason)
            name_bad(index, reason, self.source.location, self.named)

    def evaluator(self, part: str, some: np.ndarray | None = None) -> Classify:
        """Measures a model on a part of the data, or on `some` of its images."""
        return Classify(
            self.passes(part, self.division[part] if some is None else some),
            self.source.classes,
            self.to_input,
            loss=self.request.optim.loss,
        )

    def passes(self, part: str, indices: np.ndarray) -> Callable[[], Iterator[Batch]]:
        """What starts a pass over images of a part, cut as in evaluation."""
        cached = None if part == "test" else self.cached

        def batches() -> Iterator[Batch]:
            for batch in eval_batches(
                self.source,
                indices,
                self.eval_transform,
                batch_size=eval_batch_size(self.model),
                workers=self.settled.workers if len(indices) > 256 else 0,
                on_bad=self.request.data.on_bad_image,
                cached=cached,
            ):
                self.note_bad(batch)
                yield batch

        return batches

    def to_input(self, images: Tensor) -> Tensor:
        """uint8 images `[B, C, H, W]` as the model takes them, on the device."""
        return to_input(images.to(self.device), self.model.preprocess)


def build_model(settled: Settled, source: Source, *, quiet: bool = False) -> Model:
    """The model that a run starts from, a pure function of its settings and the data. Raises
    `UsageError` if it has no such parts as are to be trained, or is not one for the objective. The
    log says what weights it comes from, unless `quiet`.

    A self-supervised one has no head, whatever the labels of the data.
    With the sigmoid loss a fresh model's head starts at a bias of -log K, so that every class
    begins improbable, as in the authors' public code: -10 for ImageNet-21k, -6.9 for ImageNet
    (big_vision, vit_i21k and vit_i1k).
    """
    request = settled.request
    torch.manual_seed(request.seed)
    options: dict[str, Any] = settled.options.given() | {"probability": request.optim.loss}
    classes = () if request.self_supervised else source.classes
    count, size = len(classes), settled.image_size
    if request.init is not None:
        model = transfer(
            request.init,
            num_classes=count,
            image_size=size,
            trust_pickle=request.trust_pickle,
            quiet=quiet,
            **options,
        )
    else:
        model = create_model(settled.model, count, size, source.channels, **options)
        if request.optim.loss == "sigmoid" and model.head is not None:
            torch.nn.init.constant_(model.head.bias, -math.log(count))
    model.preprocess = settled.preprocess
    model.classes = classes
    trained_names(model, request.tuning)  # raises before the run starts
    check_objective(request, model.spec)
    return model
