"""Attention, layer by layer, of a ViT that knows nothing of it.

The model's fused attention never holds its weights. They are computed a second time, beside the
ordinary pass, from what goes into each block: one layer's `[B, h, T, T]` is in memory at a time.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchword.models.layers import Block, SelfAttention
from patchword.models.position import PositionRule
from patchword.models.vit import ViT
from patchword.spec.parse import PatchwordError

BUDGET = 2**28
"""Bytes of one layer's attention, float32, that a batch of `batched` may take; one image may take
more: 120 MB at 16 heads and 1370 tokens (ViT-H/14 at 518 pixels)"""


def require_vit(model: nn.Module) -> ViT:
    """The model itself, if it is a ViT or a hybrid. Raises `PatchwordError` for others, which have
    no self-attention."""
    if isinstance(model, ViT):
        return model
    raise PatchwordError(
        f"a {type(model).__name__} has no attention to look into; choose a ViT or a hybrid"
    )


def attention_weights(attention: SelfAttention, x: Tensor, position: PositionRule | None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) (Eq. 6), `[B, h, T, T]`, rows are queries; differentiable.

    `x` is what the attention of a block takes, `[B, T, D]` (after its LayerNorm), `position` the
    rule that acts in the layer, if any. Float32, or float64 if `x` is.
    """
    (q, k), bias = queries_and_keys(attention, x), None
    if position is not None:
        q, k, bias = position(q, k)
    exact = torch.promote_types(x.dtype, torch.float32)
    logits = (q.to(exact) * q.shape[-1] ** -0.5) @ k.to(exact).transpose(-2, -1)
    return (logits if bias is None else logits + bias.to(exact)).softmax(-1)


def queries_and_keys(attention: SelfAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of `x`, `[B, T, D]`: `[B, h, T, d]` each, normalised where the model does so, before a
    position rule acts on them."""
    b, n, width = x.shape
    weight, bias = attention.qkv.weight[: 2 * width], attention.qkv.bias[: 2 * width]
    qk = F.linear(x, weight, bias).view(b, n, 2, attention.heads, -1)
    q, k = qk.permute(2, 0, 3, 1, 4).unbind(0)  # [b, h, n, d]
    if attention.query_norm is not None and attention.key_norm is not None:
        q, k = attention.query_norm(q), attention.key_norm(k)
    return q, k


def attend(attention: SelfAttention, weights: Tensor, x: Tensor) -> Tensor:
    """Weights `[B, h, T, T]` times the values of `x`, `[B, T, D]`, projected (Eq. 7 and 8): what
    `attention(x)` returns, `[B, T, D]`, if the weights are its own."""
    b, n, width = x.shape
    v = F.linear(x, attention.qkv.weight[2 * width :], attention.qkv.bias[2 * width :])
    v = v.view(b, n, attention.heads, -1).transpose(1, 2)  # [b, h, n, d]
    mixed = (weights.to(v.dtype) @ v).transpose(1, 2)
    return attention.projection(mixed.reshape(b, weights.shape[2], width))


def attention_layers(model: nn.Module, images: Tensor) -> Iterator[Tensor]:
    """The attention of one layer after another, each `[B, h, T, T]` as in `attention_weights`; T is
    the spec's `prefix` (class token, distillation token, registers, in this order) + N patches.

    `images`: normalised, `[B, C, H, W]` of the model's size, moved to the model's device and dtype.
    No gradients; dropout is off until the last layer has been taken. Memory: one layer's attention,
    and what the caller keeps. Raises `PatchwordError` if the model is no ViT and if the images are
    of another size.
    """
    # no generator under torch.no_grad(): that one holds what it has yielded until the next
    return itertools.starmap(torch.no_grad()(attention_weights), attention_inputs(model, images))


@torch.no_grad()
def attention_inputs(
    model: nn.Module, images: Tensor
) -> Iterator[tuple[SelfAttention, Tensor, PositionRule | None]]:
    """The three arguments of `attention_weights` for one layer after another."""
    vit = require_vit(model)
    vit.check(images)
    with evaluating(vit):
        x = vit.embed(images.to(vit.patch_embedding.weight))
        for layer, module in enumerate(vit.blocks):
            block = cast(Block, module)
            x, position = vit.positioned(x, layer)
            yield block.attention, block.norm1(x), position
            if layer + 1 < vit.spec.depth:
                x = block(x, None, position)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards each module in the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def batched(model: nn.Module, images: Tensor) -> Iterator[Tensor]:
    """The images in batches whose attention fits `BUDGET`, at least one image each."""
    spec = require_vit(model).spec
    tokens = spec.prefix + spec.grid[0] * spec.grid[1]
    yield from images.split(max(1, BUDGET // (4 * spec.heads * tokens**2)))
