"""What the heads attend to: distance, entropy, maps and rollout, as arrays.

Paper section 4.5, D.7 and D.8: figures 6, 7 right, 11 and 14. Images are normalised float
`[B, C, H, W]` of a size that the model takes, on any device; the grid is theirs. They are taken in
batches that fit memory. Everything here raises `PatchwordError` for models without attention
(`require_vit`) and for images that the model does not take.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from patchword.inspection.recorder import attention_layers, batched, require_vit
from patchword.spec.model import ViTSpec
from patchword.spec.parse import PatchwordError, UsageError

Array = NDArray[np.float64]
Result = TypeVar("Result")


# Of attention that is given ----------------------------------------------------------------------


def distance_of(
    weights: Tensor, prefix: int, grid: tuple[int, int], patch_size: tuple[int, int]
) -> Tensor:
    """Mean attention distance in pixels (D.7), of softmax weights `[..., T, T]`, rows queries:
    `[...]`.

    The first `prefix` tokens are left out as queries and as keys, and the rest of each row is
    renormalised; a query that puts no weight on patches does not count, and without any other the
    distance is NaN. A patch is as far from another as their centres: `patch_size` (height, width)
    pixels times the steps on the grid; its distance to itself is 0.
    """
    patches = weights[..., prefix:, prefix:]
    total = patches.sum(-1)
    far = (patches * _distances(grid, patch_size).to(weights)).sum(-1)
    return torch.where(total > 0, far / total, math.nan).nanmean(-1)


def uniform_distance(spec: ViTSpec) -> float:
    """`distance_of` a head that attends to all patches alike, in pixels of an image of the spec's
    size: the mean over all pairs of patches."""
    return float(_distances(spec.grid, spec.patch_size).mean())


def entropy_of(weights: Tensor) -> Tensor:
    """Entropy in nats, from 0 to log T, of softmax weights `[..., T, T]`: `[...]`, the mean over
    all queries."""
    return torch.special.entr(weights).sum(-1).mean(-1)


def rollout_of(layers: Iterable[Tensor]) -> Tensor:
    """Attention rollout (Abnar and Zuidema, arXiv 2005.00928): softmax weights `[B, h, T, T]` of
    each layer, the first first, to `[B, T, T]`, whose rows sum to 1.

    Each layer's mean over the heads has the identity added, for the residual connection, and its
    rows renormalised; the matrices are multiplied, the last layer's on the left. Row i says how
    much the output token i holds of each input token. Raises `PatchwordError` without layers.
    """
    product = None
    for weights in layers:
        mean = weights.mean(1)
        del weights  # before the next layer's are computed
        mean.diagonal(dim1=-2, dim2=-1).add_(1)
        mean = mean / mean.sum(-1, keepdim=True)
        product = mean if product is None else mean @ product
    if product is None:
        raise PatchwordError("rollout of no layers; give the attention of one at least")
    return product


def _distances(grid: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """Pixels between the centres of all patches, float64 `[N, N]`."""
    axes = [torch.arange(n, dtype=torch.float64) * p for n, p in zip(grid, patch_size, strict=True)]
    centres = torch.cartesian_prod(*axes)
    return torch.linalg.vector_norm(centres[:, None] - centres, dim=-1)


# Of a model --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AttentionMeasures:
    """What many images say about each head, in the mean."""

    distance: Array
    """`[layers, heads]`, pixels of the model's input, from 0 to the diagonal of the patch centres
    (`distance_of`)"""
    entropy: Array
    """`[layers, heads]`, nats, from 0 to log T (`entropy_of`)"""
    images: int


def attention_distance(model: nn.Module, images: Tensor) -> Array:
    """Mean attention distance of each head over the images (figures 7 right and 11), in pixels of
    the model's input: `[layers, heads]`. Of a hybrid, a patch is `spec.patch_size` pixels wide. See
    `distance_of`."""
    return _means(model, [images], [_distance])[0][0]


def attention_entropy(model: nn.Module, images: Tensor) -> Array:
    """Mean entropy of each head's attention over queries and images, in nats: `[layers, heads]`.
    Every token is a query and a key, the class token and registers too. See `entropy_of`."""
    return _means(model, [images], [_entropy])[0][0]


def measure_attention(model: nn.Module, batches: Iterable[Tensor]) -> AttentionMeasures:
    """`attention_distance` and `attention_entropy` in one pass over batches of images, of any
    number and size: the mean over all images."""
    (distance, entropy), images = _means(model, batches, [_distance, _entropy])
    return AttentionMeasures(distance, entropy, images)


def attention_maps(model: nn.Module, images: Tensor, query: tuple[int, int] | None = None) -> Array:
    """How much a query attends to each patch: `[B, layers, heads, rows, cols]`.

    `query`: a patch (row, column), from 0; by default the class token, or without one the mean over
    all patches as queries. The weights are those of the softmax, as they are: where there are class
    token, distillation token or registers, what is missing to 1 goes to them. Raises `UsageError`
    if the query is not on the grid.
    """
    spec = _spec_for(model, images)
    asked = query_token(spec, query)

    def ask(weights: Tensor) -> Array:
        return _array(_row(weights, spec, asked))

    maps = [np.stack(_each(ask, model, part), axis=1) for part in batched(model, images)]
    return np.concatenate(maps)


def rollout(model: nn.Module, images: Tensor) -> Array:
    """Attention rollout on each image (figures 6 and 14): `[B, rows, cols]`, how much the output's
    class token holds of each patch, or without a class token the mean over the output's patches.

    The shares of class token, distillation token and registers are left out, so that the sum is
    below 1 where there are any. See `rollout_of`.
    """
    spec = _spec_for(model, images)
    asked = query_token(spec, None)
    parts = [rollout_of(attention_layers(model, part)) for part in batched(model, images)]
    return np.concatenate([_array(_row(part, spec, asked)) for part in parts])


def _spec_for(model: nn.Module, images: Tensor) -> ViTSpec:
    """The model's spec, were it made for images of this size."""
    vit = require_vit(model)
    vit.check(images)
    return dataclasses.replace(vit.spec, image_size=(images.shape[2], images.shape[3]))


Measure = Callable[[Tensor, ViTSpec], Tensor]
"""Of attention, `[B, h, T, T]`, and the spec for the images' size: `[B, h]`."""


def _distance(weights: Tensor, spec: ViTSpec) -> Tensor:
    return distance_of(weights, spec.prefix, spec.grid, spec.patch_size)


def _entropy(weights: Tensor, spec: ViTSpec) -> Tensor:
    return entropy_of(weights)


def _means(
    model: nn.Module, batches: Iterable[Tensor], measures: list[Measure]
) -> tuple[list[Array], int]:
    """The mean over all images of each measure, `[layers, heads]`, leaving out what is NaN; and the
    number of images."""
    sums, counts, images = 0.0, 0, 0
    for batch in batches:
        spec = _spec_for(model, batch)

        def measured(weights: Tensor, spec: ViTSpec = spec) -> list[Array]:
            return [_array(measure(weights, spec)) for measure in measures]

        for part in batched(model, batch):
            # [measures, layers, B, heads]
            values = np.stack(_each(measured, model, part), axis=1)
            sums = sums + np.nansum(values, axis=2)
            counts = counts + np.isfinite(values).sum(axis=2)
            images += len(part)
    if not images:
        raise PatchwordError("no images to measure attention on; give one at least")
    means = np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)
    return list(means), images


def _each(take: Callable[[Tensor], Result], model: nn.Module, images: Tensor) -> list[Result]:
    """What is taken of each layer's attention. A loop's own variable would hold one layer's while
    the next is computed; `map` does not."""
    return list(map(take, attention_layers(model, images)))


def query_token(spec: ViTSpec, query: tuple[int, int] | None) -> int | None:
    """The index among the tokens of a query (row, column), or of the class token; None, for all
    patches, without one. Raises `UsageError` if the query is not on the grid."""
    rows, cols = spec.grid
    if query is None:
        return 0 if spec.pool in ("token", "token+gap") else None
    row, col = query
    if not (0 <= row < rows and 0 <= col < cols):
        raise UsageError(
            f"query {row},{col} is not on the grid of {rows} x {cols} patches; "
            f"use 0,0 to {rows - 1},{cols - 1}"
        )
    return spec.prefix + row * cols + col


def _row(weights: Tensor, spec: ViTSpec, asked: int | None) -> Tensor:
    """A query's weights on the patches, `[..., T, T]` to `[..., rows, cols]`."""
    patches = weights[..., spec.prefix :]
    row = patches[..., spec.prefix :, :].mean(-2) if asked is None else patches[..., asked, :]
    return row.unflatten(-1, spec.grid)


def _array(values: Tensor) -> Array:
    return cast(Any, values.cpu().double().numpy())
