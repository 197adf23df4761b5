"""The data of a training run, from a source to batches on the device."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

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
from patchword.session.features import eval_batch_size
from patchword.spec.batch import Batch
from patchword.spec.parse import PatchwordError
from patchword.spec.train import TrainSpec
from patchword.training.loop import name_bad


@dataclass(kw_only=True)
class Inputs:
    """The data of a run: batches to train on, and parts to measure on."""

    source: Source
    division: Division
    spec: TrainSpec
    model: Model
    device: torch.device
    cached: ImageCache | None = None
    bad: dict[int, str] = field(default_factory=dict)
    """images that could not be read for an evaluation: position in the source -> reason"""
    named: set[int] = field(default_factory=set)
    """positions of the unreadable images that the log has named"""

    def __post_init__(self) -> None:
        spec, model = self.spec, self.model
        size, channels = model.spec.image_size, model.spec.in_channels
        train = self.division["train"]
        self.labels = self.source.labels[train]
        balanced = self.labels if spec.data.balance == "sampler" else None
        self.plan = Plan(train, spec.batch_size, spec.seed, labels=balanced)
        self.transform = TrainTransform(size, channels, model.preprocess, spec.augment)
        self.eval_transform = EvalTransform(size, channels, model.preprocess)
        self.augment = BatchAugment(spec.augment, len(self.source.classes))
        self.workers = spec.workers or 0

    def class_weights(self) -> Tensor | None:
        """float `[K]`, what the loss of an image counts by its class; None if the same for all."""
        if self.spec.data.balance != "loss":
            return None
        return torch.from_numpy(class_weights(self.labels, len(self.source.classes)))

    def fill_cache(self, console: Console) -> None:
        """Decode the images once, if the per-image transform allows it and they fit in memory."""
        indices = np.concatenate([self.division["train"], self.division["val"]])
        wanted, fits = self.spec.data.cache, worth_caching(self.source, indices, self.transform)
        if wanted == "on" and self.transform.random:
            raise PatchwordError("--cache on needs a transform without random crops; --crop resize")
        if wanted == "off" or not (fits or wanted == "on"):
            return
        with console.status("") as status:
            self.cached = cache_images(
                self.source,
                indices,
                self.transform,
                workers=self.workers if len(indices) > 2000 else 0,
                on_bad=self.spec.data.on_bad_image,
                progress=lambda done, total: status.update(f"decoding {done:,}/{total:,} images"),
            )

    def feed(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """The training batches of positions `start` to `stop`."""
        return train_batches(
            self.source,
            self.plan,
            self.transform,
            start=start,
            stop=stop,
            workers=self.workers,
            seed=self.spec.seed,
            on_bad=self.spec.data.on_bad_image,
            cached=self.cached,
        )

    def prepare(self, batch: Batch, position: int) -> tuple[Tensor, Tensor]:
        """Normalised, augmented images and their targets, on the device."""
        images = batch.images.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        generator = torch.Generator().manual_seed(derived_seed(self.spec.seed, "batch", position))
        return self.augment(to_input(images, self.model.preprocess), labels, generator)

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
            loss=self.spec.optim.loss,
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
                workers=self.workers if len(indices) > 256 else 0,
                on_bad=self.spec.data.on_bad_image,
                cached=cached,
            ):
                self.note_bad(batch)
                yield batch

        return batches

    def to_input(self, images: Tensor) -> Tensor:
        """uint8 images `[B, C, H, W]` as the model takes them, on the device."""
        return to_input(images.to(self.device), self.model.preprocess)
