"""Learning the labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from patchword.objectives.base import Objective
from patchword.spec.batch import Forward
from patchword.spec.train import OptimSpec


class LabelLoss(Objective):
    """The mean loss of the model's own logits; `weights` float `[K]` is what an image counts by its
    class."""

    def __init__(self, optim: OptimSpec, weights: Tensor | None = None) -> None:
        self.optim = optim
        self.weights = weights

    def loss(self, network: Forward, images: Tensor, targets: Tensor) -> Tensor:
        return classification_loss(network(images), targets, self.optim, self.weights)


def classification_loss(
    logits: Tensor, targets: Tensor, optim: OptimSpec, weights: Tensor | None = None
) -> Tensor:
    """Mean loss of a batch, a scalar.

    `logits` float `[B, K]`; `targets` int64 `[B]` class indices, or float `[B, K]` shares that sum
    to 1. `softmax`: cross-entropy. `sigmoid`: binary cross-entropy summed over the classes, each
    on its own, as the authors' public code has it for JFT, ImageNet-21k and AugReg. Label
    smoothing mixes the targets with 1 / K.

    With `weights` float `[K]` the loss of an image of class k counts `weights[k]` times, that of a
    mixed one what its shares add up to, so that mixing stays linear: the sum of the shares' losses.
    """
    if weights is not None:
        return _weighted_loss(logits, targets, optim, weights)
    if optim.loss == "softmax":
        return F.cross_entropy(logits, targets, label_smoothing=optim.label_smoothing)
    if targets.ndim == 1:
        targets = F.one_hot(targets, logits.shape[1]).to(logits.dtype)
    if optim.label_smoothing:
        targets = torch.lerp(
            targets, torch.full_like(targets, 1 / logits.shape[1]), optim.label_smoothing
        )
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(logits)


def _weighted_loss(logits: Tensor, targets: Tensor, optim: OptimSpec, weights: Tensor) -> Tensor:
    classes = logits.shape[1]
    if targets.ndim == 1:
        targets = F.one_hot(targets, classes)
    shares = targets * weights.to(logits.dtype)
    total = shares.sum(1, keepdim=True)  # [b, 1]
    shares = shares.lerp((total / classes).expand_as(shares), optim.label_smoothing)
    if optim.loss == "softmax":
        parts = -shares * logits.log_softmax(1)
    else:
        parts = total * F.softplus(logits) - shares * logits
    return parts.sum() / len(logits)
