"""Why a model gives an image its class: two maps of the patches, and how far they can be trusted.

Gradient-weighted rollout looks inside a ViT (arXiv 2103.15679), occlusion asks any model from
outside; deletion and insertion (arXiv 1806.07421) measure either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.autograd import grad

from patchword.inspection.recorder import block_inputs, require_vit, twin
from patchword.inspection.removal import (
    STEPS,
    Curves,
    checked_classes,
    log_odds,
    occlusion,
    removal_curves,
)
from patchword.models.attention import Rule
from patchword.models.layers import Block
from patchword.models.model import Model
from patchword.models.vit import ViT

RANDOM_ORDERS = 2
"""Random orders of an image's patches; forwards and backwards each"""


def gradient_rollout(model: nn.Module, images: Tensor, classes: Tensor) -> NDArray[np.float64]:
    """Relevance of each patch for a class, `[B, rows, columns]`, 0 or more (Chefer, Gur and Wolf
    2021, arXiv 2103.15679, Eq. 5 and 6, on self-attention).

    `images`: normalised, `[B, C, H, W]`; `classes`: int64 `[B]`. In each layer the attention
    weights are multiplied by the gradient of the class's log-odds with respect to them; the mean
    over the heads of what is positive, with the identity added, makes the layer's matrix, and the
    layers are multiplied. Of the product, the row of the class token (averaged with that of a
    distillation token that has a head); with attention pooling, the row of its probe, as a last
    layer; with average pooling, the mean over the patches' rows. Registers are left out.

    Two departures from the paper. Log-odds instead of the logit: what is added to all logits alike
    says nothing. And the gradient takes LayerNorm's standard deviation as a constant (Ali et al.
    2022, arXiv 2202.07304): a token that is made up of one patch does not change when it takes more
    of that patch, LayerNorm scales it back, so that the full gradient misses the patch that matters
    most.

    The layers are gone through from the last to the first with the row alone, computed again one by
    one: memory is that of one layer. The model, its gradients and its mode are left as they were.
    Raises `PatchwordError` if the model has no attention, or images or classes do not fit it.
    """
    vit = require_vit(model)
    vit.check(images)
    classes = checked_classes(vit, classes, len(images))
    return _rollout(_with_constant_scale(vit), images, classes)


def _rollout(vit: ViT, images: Tensor, classes: Tensor) -> NDArray[np.float64]:
    """`gradient_rollout`, of a model whose LayerNorms have a constant scale."""
    inputs = list(block_inputs(vit, images))
    block, x, rule = inputs[-1]
    with torch.no_grad():
        last = block(x, rule, vit.read)  # where the graph begins
    with torch.enable_grad():
        logits, probe = _read(vit, last.requires_grad_())
        score = log_odds(vit, logits.cpu(), classes).sum()
        gradient, *of_probe = grad(score, [last, *probe])
        row = _relevance(probe[0], of_probe[0]) if probe else _first_row(vit, x)
        for block, x, rule in reversed(inputs):
            first = vit.read if block is vit.blocks[-1] else None
            output, weights = _explicit(block, x.requires_grad_(), rule, first)
            gradient, of_weights = grad(output, [x, weights], gradient)
            row = row + row @ _relevance(weights, of_weights)
            del weights, of_weights, output  # before the next layer's are computed
    patches = row[:, 0, vit.spec.prefix :]
    return patches.reshape(-1, *vit.grid_of(images)).cpu().double().numpy()


def _relevance(weights: Tensor, gradient: Tensor) -> Tensor:
    """Eq. 5: `[B, h, q, T]` to `[B, q, T]`."""
    return (weights.detach() * gradient).clamp(min=0).float().mean(1)


def _first_row(vit: ViT, tokens: Tensor) -> Tensor:
    """How much the head looks at each of the tokens `[B, T, D]`: `[B, 1, T]`."""
    row = tokens.new_zeros(len(tokens), 1, tokens.shape[1], dtype=torch.float32)
    if vit.class_token is None:
        row[..., vit.spec.prefix :] = 1 / (tokens.shape[1] - vit.spec.prefix)
    else:
        read = 1 if vit.distillation_head is None else 2
        row[..., :read] = 1 / read
    return row


def _with_constant_scale(vit: ViT) -> ViT:
    """A twin of the model, in whose gradients the LayerNorms' standard deviation is a constant."""
    vit = twin(vit)
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(_constant_scale)
    return vit


def _constant_scale(norm: nn.LayerNorm, arguments: tuple[Tensor], output: Tensor) -> Tensor:
    """The same output, with a gradient in which the standard deviation is a constant."""
    (x,) = arguments
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.detach().square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    return centred * scale * norm.weight + norm.bias


def _read(vit: ViT, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The logits from what the last block puts out; and of attention pooling the weights,
    `[B, h, 1, T]`, through which they go."""
    x = vit.normed(x)
    if vit.pool is None:
        return vit.logits(x), []
    weights = vit.pool.weights(x)
    return vit.classify(vit.pool.applied(weights, x)), [weights]


def _explicit(
    block: Block, x: Tensor, rule: Rule | None, first: int | None
) -> tuple[Tensor, Tensor]:
    """`block(x, rule, first)` by way of explicit weights of its attention, `[B, h, T, T]`, which
    come with it."""
    normed = block.norm1(x)
    weights = block.attention.weights(normed, rule)
    attended = block.attention.applied(weights, normed)[:, :first]
    x = x[:, :first] + block.branch(attended, block.scale1)  # Eq. 2
    return x + block.branch(block.mlp(block.norm2(x)), block.scale2), weights  # Eq. 3


def rank_correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's correlation of two maps of the same shape, -1 to 1: do they put the patches in the
    same order? Equal values share their mean rank; NaN where all values of a map are equal."""
    ranks: list[NDArray[np.float64]] = []
    for values in (first, second):
        _, place, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[place.ravel()])
    a, b = (rank - rank.mean() for rank in ranks)
    scale = math.sqrt((a @ a) * (b @ b))
    return float(np.clip(a @ b / scale, -1, 1)) if scale else math.nan


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why an image has a class, or why not."""

    target: int
    """the class that is explained"""
    probability: float
    """of that class, 0 to 1"""
    maps: dict[str, NDArray[np.float64]]
    """`rollout` (only of a model with attention) and `occlusion`, `[rows, columns]` each, as
    `gradient_rollout` and `occlusion` make them"""
    agreement: float | None
    """Spearman's rank correlation of both, -1 to 1; None if there is one alone or one is constant
    """
    curves: dict[str, Curves]
    """for each map, and for `random` orders: deletion and insertion `[S]`"""

    @property
    def scores(self) -> dict[str, tuple[float, float]]:
        """The areas under the deletion and the insertion curve, of each of the `curves`."""
        return {
            name: (float(curves.deletion_score), float(curves.insertion_score))
            for name, curves in self.curves.items()
        }


def explain_class(
    model: Model,
    images: Tensor,
    classes: Tensor,
    *,
    window: int | None = None,
    steps: int = STEPS,
    batch_size: int | None = None,
    seed: int = 0,
) -> list[Explanation]:
    """Explain a class of each image: maps, their agreement and their curves.

    `images`: normalised, `[B, C, H, W]`; `classes`: int64 `[B]`; the options are those of
    `occlusion` and `removal_curves`. The random curves are the mean over two orders (the same for
    all images of a `seed`) and their reverses; the deletion curve of an order is the insertion
    curve of its reverse, read backwards, so that both areas are the same. Raises `PatchwordError`
    if images or classes do not fit the model.
    """
    model.check(images)
    classes = checked_classes(model, classes, len(images))
    maps = {}
    if isinstance(model, ViT):
        vit = _with_constant_scale(model)
        parts = zip(images.split(1), classes.split(1), strict=True)
        maps["rollout"] = np.concatenate([_rollout(vit, *part) for part in parts])
    maps["occlusion"] = occlusion(model, images, classes, window=window, batch_size=batch_size)
    orders = [_order(values) for values in maps.values()]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(RANDOM_ORDERS):
        order = torch.randperm(orders[0].shape[1], generator=generator)
        orders.append(order.expand(len(images), -1))
    curves = removal_curves(
        model, images, classes, torch.stack(orders, 1), steps=steps, batch_size=batch_size
    )
    explanations: list[Explanation] = []
    for at, target in enumerate(classes.tolist()):
        own = {name: values[at] for name, values in maps.items()}
        agreement = rank_correlation(*own.values()) if len(own) == 2 else math.nan
        explanations.append(
            Explanation(
                target=target,
                probability=float(curves.deletion[at, 0, 0]),
                maps=own,
                agreement=None if math.isnan(agreement) else agreement,
                curves=_named_curves(curves, at, list(own)),
            )
        )
    return explanations


def _order(values: NDArray[np.float64]) -> Tensor:
    """Maps `[B, rows, columns]` to the patches' places, int64 `[B, N]`, largest value first."""
    flat = torch.from_numpy(values).flatten(1)
    return flat.argsort(dim=1, descending=True, stable=True)


def _named_curves(curves: Curves, at: int, names: list[str]) -> dict[str, Curves]:
    """The curves of the image at `at`: one for each map, and one for the orders that follow."""
    deletion, insertion = curves.deletion[at], curves.insertion[at]
    rest = len(names)
    rising = np.concatenate([insertion[rest:], deletion[rest:, ::-1]]).mean(0)
    chance = Curves(shares=curves.shares, deletion=rising[::-1], insertion=rising)
    return {
        name: Curves(shares=curves.shares, deletion=deletion[k], insertion=insertion[k])
        for k, name in enumerate(names)
    } | {"random": chance}
