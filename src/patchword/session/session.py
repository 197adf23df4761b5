"""A model, and what it takes to look at images with it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from rich.console import Console
from torch import Tensor

from patchword.data.class_names import ClassNames
from patchword.data.loader import OnBad, eval_batches
from patchword.data.sources import Source
from patchword.data.transforms import to_input
from patchword.data.unlabelled import find_images, image_source
from patchword.evaluation.classify import Classification, Classify
from patchword.evaluation.matching import match_classes, match_positions
from patchword.models.model import Model
from patchword.session.classifier import Classifier, torch_classifier
from patchword.session.device import (
    Working,
    eval_workers,
    evaluation_twin,
    resolve_device,
    resolve_precision,
)
from patchword.session.features import Features, Layer, eval_batch_size, eval_transform, extract
from patchword.session.parts import known_parts, run_of
from patchword.spec.batch import Batch
from patchword.spec.parse import PatchwordError, UsageError, nearest
from patchword.spec.train import Device, Precision
from patchword.weights.load import load_model

logger = logging.getLogger("patchword")
Images = str | Path | Sequence[str | Path]
"""Image files, folders (searched through) and glob patterns, one or several."""


class Loading(TypedDict, total=False):
    """How a model is loaded and fed with images; what is left out is as `Session` has it."""

    image_size: int | tuple[int, int] | None
    device: Device
    batch_size: int | None
    workers: int | None
    trust_pickle: bool
    classes: ClassNames | None
    console: Console | None


class Running(Loading, total=False):
    """The same, and how it runs, where any precision and policy will do."""

    precision: Precision
    on_bad_image: OnBad


@dataclass(frozen=True)
class Prediction:
    """What a model says of an image."""

    path: str
    label: str | None
    """None where the model abstains"""
    probability: float
    """of the most probable class"""
    top: list[tuple[str, float]]
    """(label, probability), most probable first"""
    abstained: bool = False
    """the probability is below the threshold that was asked for"""

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `patchword predict --json`."""
        top = [{"label": label, "probability": p} for label, p in self.top]
        return vars(self) | {"top": top}


class Session:
    """A model, its device and precision, its batches, its features and the images it could not
    read. Hold on to it to look at images again and again; several threads may.

    `model` is what `load_model` takes, or a `Model`, which stays as it is, in its mode and on its
    device: the session works with a twin that shares the tensors which lie on `device`.
    `image_size` (pixels, one side or (height, width)), `classes` and `trust_pickle` are those of
    `load_model`. `batch_size`, images at a time, changes speed and memory only. `workers`:
    processes that read images; by default one a core, none for up to 256 images. Raises
    `PatchwordError` if the model is missing or damaged, or the device not there, and `UsageError`
    for an `image_size` or `classes` of a `Model`, which has its own.
    """

    def __init__(
        self,
        model: str | Path | Model,
        *,
        image_size: int | tuple[int, int] | None = None,
        device: Device = "auto",
        precision: Precision = "float32",
        batch_size: int | None = None,
        workers: int | None = None,
        trust_pickle: bool = False,
        classes: ClassNames | None = None,
        on_bad_image: OnBad = "skip",
        console: Console | None = None,
    ) -> None:
        self.device = resolve_device(device)
        self.dtype = resolve_precision(precision, self.device)
        self.run: Path | None = None
        """the run directory that the weights lie in, if any"""
        self.origin: str | None = None
        if isinstance(model, Model):
            for name, value in (("image_size", image_size), ("classes", classes)):
                if value is not None:
                    raise UsageError(
                        f"{name} is for weights to load, a model has its own; leave it out"
                    )
            self.net = evaluation_twin(model, self.device)
        else:
            self.run, self.origin = run_of(Path(model)), str(model)
            self.net = load_model(
                model,
                image_size=image_size,
                device=self.device,
                trust_pickle=trust_pickle,
                classes=classes,
            )
        self.batch_size, self.workers = batch_size, workers
        self.on_bad: OnBad = on_bad_image
        self.console = console or Console(stderr=True, markup=False, emoji=False)
        self.transform = eval_transform(self.net)
        self.bad: dict[str, str] = {}
        """what could not be read, path or other location -> reason"""
        self._shown = threading.Lock()
        """held by the pass whose progress is on the console"""

    @cached_property
    def classifier(self) -> Classifier:
        """The model as one. Raises `PatchwordError` if it has no head."""
        if not self.net.spec.num_classes:
            raise PatchwordError(
                "the model has no head: it gives features, not classes; give one trained on classes"
            )
        return torch_classifier(Working(self.net, self.dtype), self.device, self.net, self.origin)

    def inputs(self, images: Tensor) -> Tensor:
        """uint8 `[B, C, H, W]`, normalised, on the device."""
        return to_input(images.to(self.device), self.net.preprocess)

    def part(self, source: Source, split: str | None) -> tuple[str, str, np.ndarray]:
        """(name, where it comes from, positions) of the part of a source to look at.

        `split` None: test, else val, as the data divide themselves or the run divided them, else
        everything. Raises `UsageError` if a named part does not exist.
        """
        parts = known_parts(source, self.run)
        if split is None:
            split = next((name for name in ("test", "val") if name in parts), "all")
        parts["all"] = (np.arange(len(source), dtype=np.int64), "all images of the data")
        if split not in parts:
            raise UsageError(f"the data have no {split!r} part{nearest(split, parts)}")
        at, why = parts[split]
        return split, why, at

    def images(self, images: Images) -> Source:
        """The image files that paths, folders and patterns name, as a source without labels. What
        names nothing is `bad`. Raises `PatchwordError` if nothing is found at all."""
        missing: dict[str, str] = {}
        patterns = [images] if isinstance(images, str | Path) else images
        source = image_source(find_images(patterns, missing))
        self.bad |= missing
        return source

    def batches(
        self,
        source: Source,
        indices: np.ndarray,
        what: str | None = None,
        *,
        batch_size: int | None = None,
    ) -> Iterator[Batch]:
        """The images at `indices`, cut as in evaluation, in order, as `eval_batches` gives them;
        with `what`, how they are called, progress is on the console. Unreadable ones are `bad`.
        Raises `PatchwordError` if none can be read, with `on_bad_image="fail"` if one cannot."""
        done = 0
        with self.progress(what, len(indices)) as tell:
            for batch in eval_batches(
                source,
                indices,
                self.transform,
                batch_size=batch_size or self.batch_size or eval_batch_size(self.net),
                workers=eval_workers(self.workers, len(indices)),
                on_bad=self.on_bad,
            ):
                self._note(source, batch.bad)
                yield batch
                done += len(batch.labels)
                tell(done)

    def readable(
        self,
        source: Source,
        indices: np.ndarray,
        what: str | None = None,
        *,
        batch_size: int | None = None,
    ) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Those of `batches` that can be read, uint8 `[b, C, H, W]`, and their positions."""
        for batch in self.batches(source, indices, what, batch_size=batch_size):
            if batch.mask.any():
                yield batch.images[batch.mask], batch.indices[batch.mask].numpy()

    def features(
        self,
        source: Source,
        indices: np.ndarray,
        name: str,
        *,
        layer: Layer = "pooled",
        cache: bool | Path = True,
    ) -> Features:
        """`extract` of images that are called `name`, with progress on the console."""
        with self.progress(f"features of {name}", len(indices)) as tell:
            found = extract(
                self.net,
                source,
                indices,
                device=self.device,
                batch_size=self.batch_size or eval_batch_size(self.net),
                workers=eval_workers(self.workers, len(indices)),
                precision=str(self.dtype).removeprefix("torch."),
                layer=layer,
                cache=cache,
                on_bad=self.on_bad,
                progress=lambda done, _: tell(done),
            )
        self._note(source, found.bad)
        return found

    def evaluator(self, source: Source, indices: np.ndarray, name: str = "evaluation") -> Classify:
        """What measures logits of the images at `indices`, at the model's own temperature. Raises
        `PatchwordError` if the model does not know the classes."""
        model = self.classifier
        if model.classes:
            label_map = match_classes(source.classes, model.classes)
        else:
            label_map = match_positions(source.classes, model.num_classes)
        return Classify(
            lambda: self.batches(source, indices, name),
            model.names,
            lambda images: images,
            label_map=label_map,
            loss=model.probability,
            data_classes=source.classes,
            temperature=model.temperature,
        )

    def measure(
        self, source: Source, indices: np.ndarray, name: str = "evaluation"
    ) -> Classification:
        """Accuracy, loss and calibration on the images at `indices`. Raises `PatchwordError` if the
        model does not know the classes, and if no image can be read."""
        return self.evaluator(source, indices, name).measure(self.classifier.logits)

    def predict(
        self, images: Images, *, top: int = 5, abstain: float | None = None
    ) -> Iterator[Prediction]:
        """The `top` classes of image files, in order; those that cannot be read are left out, and
        `bad`. Images whose top probability is below `abstain` get no label. Raises as `images` and
        `batches` do."""
        model, source = self.classifier, self.images(images)
        names = model.names
        for batch in self.batches(source, np.arange(len(source))):
            logits = model.logits(batch.images)
            order = logits.sort(dim=1, descending=True, stable=True).indices
            values = model.probabilities(logits).gather(1, order)
            for row in batch.mask.nonzero()[:, 0].tolist():
                pairs = zip(order[row, :top].tolist(), values[row, :top].tolist(), strict=True)
                best = [(names[k], p) for k, p in pairs]
                label, probability = best[0]
                unsure = abstain is not None and probability < abstain
                path = source.keys[int(batch.indices[row])]
                yield Prediction(path, None if unsure else label, probability, best, unsure)

    @contextmanager
    def progress(self, what: str | None, total: int) -> Iterator[Callable[[int], None]]:
        """What to call with the number of images done. It is shown unless there is no name for it,
        or another pass is shown."""
        if not what or not self._shown.acquire(blocking=False):
            yield lambda done: None
            return
        start = time.perf_counter()
        try:
            with self.console.status("") as status:

                def tell(done: int) -> None:
                    rate = done / max(time.perf_counter() - start, 1e-9)
                    status.update(f"{what}: {done:,}/{total:,} images, {rate:,.1f} a second")

                yield tell
        finally:
            self._shown.release()

    def _note(self, source: Source, bad: Sequence[tuple[int, str]]) -> None:
        """Remember what could not be read; the log names each once."""
        for index, reason in bad:
            where = source.location(index)
            if where not in self.bad:
                self.bad[where] = reason
                what = "skipped an unreadable image:" if source.labelled else "cannot read"
                logger.warning("%s %s: %s", what, where, reason)
