"""Batches: a pure function of (seed, step, world layout), with any number of worker processes."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from patchword.data.balance import balanced_order
from patchword.data.images import BadImage
from patchword.data.seeding import derived_seed
from patchword.data.sources import Source
from patchword.data.transforms import Transform
from patchword.data.workers import serve
from patchword.spec.batch import Batch
from patchword.spec.parse import PatchwordError

OnBad = Literal["skip", "fail"]
CACHE_BATCH = 256


@dataclass(frozen=True, eq=False)
class Plan:
    """Which images make up each step.

    The epochs, each a permutation of `indices` seeded by (seed, "order", epoch), form one endless
    stream; with `labels`, each is a draw of as many in which all classes are equally frequent. Step
    s takes its positions from s x batch_size on, across the borders of epochs, and rank r of
    `world` a contiguous share of them.
    """

    indices: np.ndarray
    """int64 `[N]`, positions in the source"""
    batch_size: int
    """images per step over all ranks"""
    seed: int
    rank: int = 0
    world: int = 1
    labels: np.ndarray | None = None
    """int64 `[N]`, the classes of `indices`, to draw them equally often"""
    _orders: dict[int, np.ndarray] = field(default_factory=dict, repr=False, init=False)

    def __post_init__(self) -> None:
        if not len(self.indices):
            raise PatchwordError("no images to train on; give data with a train part")

    def __call__(self, step: int) -> list[tuple[int, int]]:
        """(draw, position in the source) of this rank's images of `step`. No two are the same: the
        draw is the epoch, or where an epoch has images twice, the place in the stream."""
        first = step * self.batch_size
        start = first + self.rank * self.batch_size // self.world
        stop = first + (self.rank + 1) * self.batch_size // self.world
        size = len(self.indices)
        chosen: list[tuple[int, int]] = []
        while start < stop:
            epoch, offset = divmod(start, size)
            taken = self._order(epoch)[offset : offset + stop - start].tolist()
            draws = [epoch] * len(taken) if self.labels is None else range(start, stop)
            chosen += zip(draws, taken, strict=False)
            start += len(taken)
        return chosen

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            if len(self._orders) > 1:
                del self._orders[min(self._orders)]
            rng = np.random.default_rng(derived_seed(self.seed, "order", epoch))
            indices = np.asarray(self.indices, np.int64)
            self._orders[epoch] = (
                rng.permutation(indices)
                if self.labels is None
                else balanced_order(indices, self.labels, rng)
            )
        return self._orders[epoch]


@dataclass(frozen=True, eq=False)
class ImageCache:
    """Images decoded once, for transforms that draw no random numbers."""

    images: np.ndarray
    """uint8 `[M, C, H, W]`; zeros where the image is bad"""
    rows: np.ndarray
    """int64 `[len(source)]`, the row of each image, -1 for those not kept"""
    bad: dict[int, str]
    """position in the source -> reason"""


def train_batches(
    source: Source,
    plan: Plan,
    transform: Transform,
    *,
    start: int,
    stop: int,
    workers: int,
    seed: int,
    on_bad: OnBad,
    cached: ImageCache | None = None,
) -> Generator[Batch, None, None]:
    """The batches of steps `start` to `stop` (exclusive), the same with any number of workers.

    Closing or forgetting the generator ends the workers.

    A bad image is replaced by the next good one of `plan.indices` and reported in `Batch.bad`, or,
    with `on_bad="fail"`, raises `PatchwordError`; so does a plan without a good image.
    """
    fetch = _Fetch(source, transform, on_bad, cached)
    steps = _TrainSteps(fetch, plan, seed)
    yield from serve(steps, range(start, stop), 0 if cached else workers)


def eval_batches(
    source: Source,
    indices: np.ndarray,
    transform: Transform,
    *,
    batch_size: int,
    workers: int,
    on_bad: OnBad,
    cached: ImageCache | None = None,
) -> Generator[Batch, None, None]:
    """`indices` in order; the last batch may be smaller.

    A bad image keeps its row: zeros, mask False, reported in `Batch.bad`; with `on_bad="fail"` it
    raises `PatchwordError`. So does a pass without a good image.
    """
    fetch = _Fetch(source, transform, on_bad, cached)
    chunks = _EvalChunks(fetch, np.asarray(indices, np.int64), batch_size)
    good, bad = 0, None
    for batch in serve(chunks, range(len(chunks)), 0 if cached else workers):
        good += int(batch.mask.sum())
        bad = bad or next(iter(batch.bad), None)
        yield batch
    if bad and not good:
        raise PatchwordError(_none_readable(source, len(indices), *bad))


def worth_caching(
    source: Source, indices: np.ndarray, transform: Transform, limit_bytes: int = 1 << 30
) -> bool:
    """Whether `cache_images` pays: the transform is not random, and all results fit the limit."""
    height, width = transform.image_size
    size = len(indices) * transform.channels * height * width
    return not transform.random and size <= limit_bytes


def cache_images(
    source: Source,
    indices: np.ndarray,
    transform: Transform,
    *,
    workers: int = 0,
    on_bad: OnBad = "skip",
    progress: Callable[[int, int], None] | None = None,
) -> ImageCache:
    """Decode `indices` once. `progress` is called with (images done, images in all)."""
    if transform.random:
        raise ValueError("the results of a random transform cannot be kept")
    images = np.zeros((len(indices), transform.channels, *transform.image_size), np.uint8)
    rows = np.full(len(source), -1, np.int64)
    rows[indices] = np.arange(len(indices))
    bad: dict[int, str] = {}
    done = 0
    for batch in eval_batches(
        source, indices, transform, batch_size=CACHE_BATCH, workers=workers, on_bad=on_bad
    ):
        images[done : done + len(batch.labels)] = batch.images.numpy()
        bad |= dict(batch.bad)
        done += len(batch.labels)
        if progress is not None:
            progress(done, len(indices))
    return ImageCache(images, rows, bad)


# What the workers do -----------------------------------------------------------------------------


def _none_readable(source: Source, count: int, index: int, reason: str) -> str:
    return (
        f"none of {count} images can be read; the first: {source.location(index)}: {reason}. "
        "Check that the files are whole"
    )


@dataclass(eq=False)
class _Fetch:
    """One image at a time; what is bad is remembered."""

    source: Source
    transform: Transform
    on_bad: OnBad
    cached: ImageCache | None
    bad: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.cached:
            self.bad = dict(self.cached.bad)

    def __call__(self, index: int, rng: random.Random | None) -> np.ndarray | None:
        """uint8 `[C, H, W]`, or None for a bad image, by then in `bad`."""
        if index not in self.bad:
            try:
                if self.cached is not None and self.cached.rows[index] >= 0:
                    return self.cached.images[self.cached.rows[index]]
                return self.transform(self.source.read(index), rng)
            except BadImage as error:
                self.bad[index] = str(error)
        if self.on_bad == "fail":
            raise PatchwordError(
                f"{self.source.location(index)}: {self.bad[index]}; remove or replace the file, or "
                "skip such files with --on-bad-image skip"
            )
        return None


class _TrainSteps(Dataset[Batch]):
    def __init__(self, fetch: _Fetch, plan: Plan, seed: int) -> None:
        self.fetch, self.plan, self.seed = fetch, plan, seed

    def __getitem__(self, step: int) -> Batch:
        chosen = self.plan(step)
        cached = self.fetch.cached
        if cached is not None and not self.fetch.bad:
            indices = np.array([index for _, index in chosen])
            rows = cached.rows[indices]
            if (rows >= 0).all():
                return _batch(self.fetch.source, cached.images[rows], indices)
        images = np.empty((len(chosen), *_shape(self.fetch.transform)), np.uint8)
        indices = np.empty(len(chosen), np.int64)
        bad: list[tuple[int, str]] = []
        for row, (draw, index) in enumerate(chosen):
            images[row], indices[row] = self._image(draw, index, bad)
        return _batch(self.fetch.source, images, indices, bad=tuple(bad))

    def _image(self, draw: int, index: int, bad: list[tuple[int, str]]) -> tuple[np.ndarray, int]:
        """Image `index`, or the next good one of the plan after it, and its position."""
        for candidate in self._candidates(index):
            rng = random.Random(derived_seed(self.seed, "augment", draw, index))
            image = self.fetch(candidate, rng)
            if image is not None:
                return image, candidate
            bad.append((candidate, self.fetch.bad[candidate]))
        raise PatchwordError(_none_readable(self.fetch.source, len(self.plan.indices), *bad[0]))

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        indices = self.plan.indices
        place = int(np.flatnonzero(indices == index)[0])
        for after in range(1, len(indices)):
            yield int(indices[(place + after) % len(indices)])


class _EvalChunks(Dataset[Batch]):
    def __init__(self, fetch: _Fetch, indices: np.ndarray, batch_size: int) -> None:
        self.fetch, self.indices, self.batch_size = fetch, indices, batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        indices = self.indices[number * self.batch_size :][: self.batch_size]
        images = np.zeros((len(indices), *_shape(self.fetch.transform)), np.uint8)
        mask = np.ones(len(indices), np.bool_)
        for row, index in enumerate(indices.tolist()):
            image = self.fetch(index, None)
            if image is None:
                mask[row] = False
            else:
                images[row] = image
        bad = tuple((i, self.fetch.bad[i]) for i in indices[~mask].tolist())
        return _batch(self.fetch.source, images, indices, mask, bad)


def _shape(transform: Transform) -> tuple[int, int, int]:
    return (transform.channels, *transform.image_size)


def _batch(
    source: Source,
    images: np.ndarray,
    indices: np.ndarray,
    mask: np.ndarray | None = None,
    bad: tuple[tuple[int, str], ...] = (),
) -> Batch:
    mask = np.ones(len(indices), np.bool_) if mask is None else mask
    return Batch(
        images=torch.from_numpy(images),
        labels=torch.from_numpy(source.labels[indices]),
        mask=torch.from_numpy(mask),
        indices=torch.from_numpy(indices),
        bad=bad,
    )
