"""Features of a data set: one pass of a model over its images, kept on disk for the next time."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import PIL
import torch
from torch import Tensor

from patchword.data.images import BadImage
from patchword.data.loader import OnBad, eval_batches
from patchword.data.sources import Source
from patchword.data.transforms import EvalTransform, to_input
from patchword.models.model import Model
from patchword.models.vit import ViT
from patchword.models.zoo import spec_to_dict
from patchword.session.device import evaluation_twin
from patchword.spec.batch import Batch
from patchword.spec.parse import PatchwordError, UsageError, nearest, to_dict
from patchword.weights.native import load_tensors, save_tensors

logger = logging.getLogger("patchword")
VERSION = 2
"""Raised when the same model and images come to give other features."""
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Layer = Literal["pooled", "pre-logits"]
"""Where features are taken: before the head, or what its last layer takes, which differs after a
hidden layer (`ViTSpec.head` is `mlp`)."""
HEAD_FIELDS = frozenset({"num_classes", "head", "head_width", "probability"})
"""Fields of a model's spec that its features do not depend on."""


@dataclass(frozen=True, eq=False)
class Features:
    """What a model makes of N images that could be read."""

    pooled: Tensor
    """float32 `[N, D]`, on the CPU: `Model.features(images).pooled`, before the head, or what
    `Model.represent` makes of it (`Layer`)"""
    labels: Tensor
    """int64 `[N]`, as the source numbers its classes"""
    indices: Tensor
    """int64 `[N]`, positions in the source, in the order asked for"""
    bad: tuple[tuple[int, str], ...] = ()
    """(position in the source, reason) of the images that could not be read"""
    cached: Path | None = None
    """the file that the features were read from; None if they were computed"""

    @property
    def skipped(self) -> int:
        """Images that could not be read."""
        return len(self.bad)


def eval_batch_size(model: Model) -> int:
    """Images per batch where nothing depends on it but speed and memory."""
    return max(16, min(512, 2**22 // math.prod(model.spec.image_size)))


def eval_transform(model: Model) -> EvalTransform:
    """What cuts images for a model as in evaluation."""
    return EvalTransform(model.spec.image_size, model.spec.in_channels, model.preprocess)


def extract(
    model: Model,
    source: Source,
    indices: np.ndarray,
    *,
    device: torch.device | str,
    batch_size: int = 64,
    workers: int = 0,
    precision: str = "float32",
    layer: Layer = "pooled",
    cache: bool | Path = True,
    quiet: bool = False,
    on_bad: OnBad = "skip",
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Features of the images `indices` of `source`, cut as in evaluation (`EvalTransform`), at
    `layer` of the model.

    The model stays as it is: a twin in evaluation mode computes, on `device`. Memory: the result,
    4 N D bytes, and one batch. `progress` is called with (images done, images in all) after each
    batch.

    With `cache`, a folder or True for `cache_folder()`, the result is kept in a file named after
    all that it depends on (`cache_key`), and read from there if it is there, whole and of the right
    shape; the log says so, unless `quiet`. A damaged file is computed anew and replaced; a disk
    that cannot be written costs a warning. An image whose bytes could not be read (a fault of the
    disk, a missing file) is tried again each time, and all is computed anew once it can be; one
    that does not decode stays bad, as its bytes are part of the key.

    `precision`, float32 or bfloat16, is that of the forward pass. Raises `UsageError` on others,
    and `PatchwordError` if no image can be read, with `on_bad="fail"` if one cannot, and if a
    feature is not finite.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}{nearest(precision, PRECISIONS)}")
    if layer not in get_args(Layer):
        raise UsageError(f"unknown layer {layer!r}{nearest(layer, get_args(Layer))}")
    indices = np.ascontiguousarray(indices, np.int64)
    if not len(indices):
        raise PatchwordError("no images to compute features of; choose another part of the data")
    path = None
    if cache is not False:
        folder = cache_folder() if cache is True else cache
        path = folder / f"{cache_key(model, source, indices, precision, layer)}.safetensors"
        found = _read(path, source, indices)
        if found is not None and not (found.bad and on_bad == "fail"):
            if not quiet:
                logger.info("features of %s images read from %s", f"{len(indices):,}", path)
            return found
    transform = eval_transform(model)
    batches = eval_batches(
        source, indices, transform, batch_size=batch_size, workers=workers, on_bad=on_bad
    )
    features = _features_on(model, torch.device(device), PRECISIONS[precision], layer)
    rows, bad = _compute(features, batches, source, len(indices), progress)
    if path is not None:
        unread = [index for index in bad if not _decodes_badly(source, index, transform)]
        _write(path, rows, bad, unread)
    return _features(rows, source, indices, bad, None)


def cache_folder() -> Path:
    """Where features are kept: `$PATCHWORD_CACHE/features`, by default
    `~/.cache/patchword/features`."""
    root = os.environ.get("PATCHWORD_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "patchword") / "features"


def known_layer(model: Model, layer: Layer) -> Layer:
    """`layer`, or `pooled` if the model's head has no hidden layer: they are the same then."""
    hidden = isinstance(model, ViT) and model.pre_logits is not None
    return layer if hidden else "pooled"


def cache_key(
    model: Model,
    source: Source,
    indices: np.ndarray,
    precision: str,
    layer: Layer = "pooled",
) -> str:
    """SHA-256 (hex) of what features depend on: the body's weights and spec, the preprocessing,
    the data's fingerprint (`Source.digests`: names, labels, classes, and the contents of files, or
    for a data set of the hub its name and versions), the positions, the precision, and the versions
    of this code and Pillow.

    The head counts for nothing: a model with new classes has the same features; but its hidden
    layer does, for features after it. Nor does the device, whose rounding differs by parts in a
    million.
    """
    hidden = known_layer(model, layer) == "pre-logits"
    spec = spec_to_dict(model.spec)
    about = {
        "version": VERSION,
        "pillow": PIL.__version__,
        "spec": {name: value for name, value in spec.items() if name not in HEAD_FIELDS},
        "preprocess": to_dict(model.preprocess),
        "data": source.fingerprint,
        "precision": precision,
    } | ({"layer": layer} if hidden else {})
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    digest.update(indices.astype("<i8").tobytes())
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith(model.HEADS) or (hidden and name.startswith("pre_logits.")):
            digest.update(f"\0{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(plain.view(torch.uint8).numpy())
    return digest.hexdigest()


def _features_on(
    model: Model, device: torch.device, dtype: torch.dtype, layer: Layer
) -> Callable[[Tensor], Tensor]:
    """What makes float32 features `[B, D]`, on the CPU, of uint8 images `[B, C, H, W]`."""
    module = evaluation_twin(model, device)
    if dtype is not torch.float32:
        module = copy.deepcopy(module).to(dtype)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        pooled = module.pooled_features(to_input(images.to(device), model.preprocess, dtype))
        return (module.represent(pooled) if layer == "pre-logits" else pooled).float().cpu()

    return features


def _compute(
    features: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    source: Source,
    total: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[Tensor, dict[int, str]]:
    """float32 `[total - bad, D]`, and why images are bad."""
    rows: Tensor | None = None
    done, seen, bad = 0, 0, dict[int, str]()
    for batch in batches:
        bad.update(batch.bad)
        images = batch.images if batch.mask.all() else batch.images[batch.mask]
        if len(images):
            pooled = features(images)
            _check(pooled, source, batch.indices[batch.mask])
            if rows is None:
                rows = torch.empty(total, pooled.shape[1])
            rows[done : done + len(pooled)] = pooled
            done += len(pooled)
        seen += len(batch.labels)
        if progress is not None:
            progress(seen, total)
    assert rows is not None, "eval_batches raises where no image can be read"
    return rows[:done], bad


def _check(pooled: Tensor, source: Source, indices: Tensor) -> None:
    finite = pooled.isfinite().all(dim=1)
    if not finite.all():
        image = source.location(int(indices[~finite][0]))
        raise PatchwordError(
            f"the model's features of {image} are not finite; use --precision float32, or other "
            "weights"
        )


def _features(
    rows: Tensor, source: Source, indices: np.ndarray, bad: dict[int, str], cached: Path | None
) -> Features:
    good = indices[~np.isin(indices, list(bad))] if bad else indices
    return Features(
        pooled=rows,
        labels=torch.from_numpy(source.labels[good].astype(np.int64)),
        indices=torch.from_numpy(good.copy()),
        bad=tuple(sorted(bad.items())),
        cached=cached,
    )


def _read(path: Path, source: Source, indices: np.ndarray) -> Features | None:
    """What `_write` wrote, None if it is not there or not to be trusted."""
    if not path.exists():
        return None
    try:
        tensors, header = load_tensors(path)
        bad = {int(index): str(reason) for index, reason in header["bad"]}
        rows = tensors["pooled"]
        known = set(bad) <= set(indices.tolist()) and header["key"] == path.stem
        good = len(indices) - int(np.isin(indices, list(bad)).sum())
        unread = [int(index) for index in header["unread"]]
        if not known or rows.dtype != torch.float32 or rows.ndim != 2 or len(rows) != good:
            raise PatchwordError("not the features that its name says")
    except (PatchwordError, OSError, KeyError, TypeError, ValueError) as error:
        logger.warning("%s cannot be used, the features are computed anew: %s", path, error)
        return None
    if back := sum(_read_of(source, index) is not None for index in unread):
        logger.info(
            "%d of the images that could not be read can be by now: the features in %s are "
            "computed anew",
            back,
            path,
        )
        return None
    return _features(rows, source, indices, bad, path)


def _read_of(source: Source, index: int) -> bytes | np.ndarray | None:
    """What is read of an image, None if it cannot be."""
    try:
        return source.read(index)
    except BadImage:
        return None


def _decodes_badly(source: Source, index: int, transform: EvalTransform) -> bool:
    """Whether an image can be read and it is what it holds that is bad."""
    data = _read_of(source, index)
    if data is None:
        return False
    try:
        transform(data)
    except BadImage:
        return True
    return False


def _write(path: Path, rows: Tensor, bad: dict[int, str], unread: list[int]) -> None:
    """Put the features at `path` in one step, with a SHA-256 over all of them; of the bad images,
    `unread` may be good another time."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{time.monotonic_ns()}")
    header: dict[str, Any] = {"key": path.stem, "bad": sorted(bad.items()), "unread": unread}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(temporary, {"pooled": rows}, header)
        temporary.replace(path)
    except OSError as error:
        logger.warning("the features are not kept for the next time: %s", error)
        with contextlib.suppress(OSError):
            temporary.unlink()
