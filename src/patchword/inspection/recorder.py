"""Attention, layer by layer, of a ViT that knows nothing of it.

The model's fused attention never holds its weights. They are computed a second time, beside the
ordinary pass, from what goes into each block: one layer's `[B, h, T, T]` is in memory at a time.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from patchword.models.attention import Rule, SelfAttention
from patchword.models.layers import Block
from patchword.models.vit import ViT
from patchword.spec.parse import PatchwordError

BUDGET = 2**28
"""Bytes of one layer's attention, float32, that a batch of `batched` may take; one image may take
more: 120 MB at 16 heads and 1370 tokens (ViT-H/14 at 518 pixels)"""
Network = TypeVar("Network", bound=nn.Module)


def require_vit(model: nn.Module) -> ViT:
    """The model itself, if it is a ViT or a hybrid. Raises `PatchwordError` for others, which have
    no self-attention."""
    if isinstance(model, ViT):
        return model
    raise PatchwordError(
        f"a {type(model).__name__} has no attention to look into; choose a ViT or a hybrid"
    )


def twin(model: Network) -> Network:
    """A copy of a model in evaluation mode that shares every tensor with it. Its hooks and modes
    are its own, so that other threads may use the model meanwhile. Its parameters are the model's:
    take gradients by `torch.autograd.grad`, not by `backward`."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()


def attention_layers(model: nn.Module, images: Tensor) -> Iterator[Tensor]:
    """The attention of one layer after another, `[B, h, T, T]` as `SelfAttention.weights` has it; T
    is the spec's `prefix` (class token, distillation token, registers, in this order) + N patches.

    `images`: normalised, `[B, C, H, W]`, moved to the model's device and dtype. No gradients, no
    dropout. Memory: one layer's attention, and what the caller keeps. Raises `PatchwordError` if
    the model is no ViT and if it does not take the images.
    """
    # no generator under torch.no_grad(): that one holds what it has yielded until the next
    return itertools.starmap(torch.no_grad()(_weights), attention_inputs(model, images))


def _weights(attention: SelfAttention, x: Tensor, rule: Rule | None) -> Tensor:
    return attention.weights(x, rule)


@torch.no_grad()
def attention_inputs(
    model: nn.Module, images: Tensor
) -> Iterator[tuple[SelfAttention, Tensor, Rule | None]]:
    """The attention of one layer after another, what it takes, `[B, T, D]` (after the block's
    LayerNorm), and the rule that acts in it, if any."""
    for block, x, rule in block_inputs(twin(require_vit(model)), images):
        yield block.attention, block.norm1(x), rule


@torch.no_grad()
def block_inputs(vit: ViT, images: Tensor) -> Iterator[tuple[Block, Tensor, Rule | None]]:
    """One block after another of a model in evaluation mode, what it takes, `[B, T, D]`, and the
    rule that acts in its attention."""
    vit.check(images)
    grid = vit.grid_of(images)
    x = vit.embed(images.to(vit.patch_embedding.weight))
    for layer, module in enumerate(vit.blocks):
        block = cast(Block, module)
        table, rule = vit.positions_of(layer, grid)
        x = x if table is None else x + table
        yield block, x, rule
        if layer + 1 < vit.spec.depth:
            x = block(x, rule)


def batched(model: nn.Module, images: Tensor) -> Iterator[Tensor]:
    """The images in batches whose attention fits `BUDGET`, at least one image each."""
    vit = require_vit(model)
    vit.check(images)
    rows, columns = vit.grid_of(images)
    tokens = vit.spec.prefix + rows * columns
    yield from images.split(max(1, BUDGET // (4 * vit.spec.heads * tokens**2)))
