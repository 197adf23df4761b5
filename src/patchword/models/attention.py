"""Attention (Eq. 5-8): plain, fast, and as a layer of the model.

Shapes: b images, n tokens, h heads, d values a head, D = h * d model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchword.models.model import init_linear

Rule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]
"""Queries `[b, h, q, d]` of the first q tokens and keys `[b, h, n, d]` to both with what tells them
where they are, and a bias `[b, h, q, n]` for the scaled logits, or None."""


def attention_reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Eq. 6 and 7 as they stand: softmax(q k^T / sqrt(d) + bias) v, all `[b, h, n, d]`, the bias
    `[b, h, n, n]`."""
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return (logits if bias is None else logits + bias).softmax(-1) @ v


def attention_matmul(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """The reference with the scale moved to the queries, as batched products over b * h."""
    b, h, n, d = q.shape
    scaled = (q * d**-0.5).reshape(b * h, n, d)
    keys, values = k.reshape(b * h, -1, d), v.reshape(b * h, -1, d)
    logits = torch.bmm(scaled, keys.transpose(1, 2))
    if bias is not None:
        logits = logits + bias.reshape(b * h, n, -1)
    return torch.bmm(logits.softmax(-1), values).view(b, h, n, d)


MATMUL_TOKENS = 2048
"""Beyond this the n x n weights cost more memory than the products save time."""


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """The fastest exact attention for this device and dtype; `[b, h, n, d]` each.

    PyTorch's fused CPU kernel gains nothing from bfloat16, so there the products are explicit. So
    they are on other devices for a single query: there is little to fuse, and cuDNN's backward
    pass, PyTorch's choice on an H100, has failed on it (pytorch 138529, cudnn-frontend 1071).
    """
    if q.device.type == "cpu":
        explicit = q.dtype is torch.bfloat16 and k.shape[2] <= MATMUL_TOKENS
    else:
        explicit = q.shape[2] == 1
    if explicit:
        return attention_matmul(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `attention` weighs the values with: softmax(q k^T / sqrt(d) + bias) (Eq. 6), of
    `[b, h, q, d]` and `[b, h, n, d]`: `[b, h, q, n]`, float32, or float64 if q is; differentiable.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(exact) * q.shape[-1] ** -0.5) @ k.to(exact).transpose(-2, -1)
    return (logits if bias is None else logits + bias.to(exact)).softmax(-1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`[b, n, D]` to `[b, h, n, d]`."""
    b, n, _ = x.shape
    return x.view(b, n, heads, -1).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """`[b, h, n, d]` to `[b, n, D]`, the heads side by side."""
    return x.transpose(1, 2).flatten(2)


def drop(x: Tensor, rate: float, training: bool) -> Tensor:
    """Dropout that adds no node to the graph when it is off."""
    return F.dropout(x, rate) if training and rate else x


class SelfAttention(nn.Module):
    """Multi-head self-attention (Eq. 5-8) over `[b, n, D]`, with q, k and v in one product, and
    dropout after the projection.

    The rows of `qkv.weight` are all queries, all keys, all values, each head by head. `forward`
    never holds the weights of Eq. 6; `weights` does, and `applied(weights(x), x)` is `forward(x)`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qk_norm: bool = False,
        dropout: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.query_norm = nn.LayerNorm(width // heads, eps=eps) if qk_norm else None
        self.key_norm = nn.LayerNorm(width // heads, eps=eps) if qk_norm else None
        self.projection = nn.Linear(width, width)
        self.dropout = dropout

    def forward(self, x: Tensor, rule: Rule | None = None, first: int | None = None) -> Tensor:
        """`[b, n, D]` to `[b, n, D]`, or to `[b, first, D]`, the first tokens alone."""
        return self._projected(attention(*self.heads_of(x, rule, first)))

    def weights(self, x: Tensor, rule: Rule | None = None) -> Tensor:
        """`attention_weights` of all tokens, `[b, h, n, n]`, rows are queries."""
        q, k, _, bias = self.heads_of(x, rule)
        return attention_weights(q, k, bias)

    def applied(self, weights: Tensor, x: Tensor) -> Tensor:
        """Weights `[b, h, q, n]` times the values of x `[b, n, D]`, projected (Eq. 7 and 8):
        `[b, q, D]`."""
        _, _, v, _ = self.heads_of(x)
        return self._projected(weights.to(v.dtype) @ v)

    def heads_of(
        self, x: Tensor, rule: Rule | None = None, first: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q of the first tokens, k and v of all, `[b, h, n, d]`, and the bias of their logits."""
        width = x.shape[-1]
        if first is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            weight, offset = self.qkv.weight, self.qkv.bias
            q = F.linear(x[:, :first], weight[:width], offset[:width])
            k, v = F.linear(x, weight[width:], offset[width:]).chunk(2, dim=-1)
        q, k, v = (split_heads(part, self.heads) for part in (q, k, v))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, bias = (q, k, None) if rule is None else rule(q, k)
        return q, k, v, bias

    def _projected(self, heads: Tensor) -> Tensor:
        return drop(self.projection(join_heads(heads)), self.dropout, self.training)

    def init_weights(self) -> None:
        for part in self.qkv.weight.chunk(3):
            nn.init.xavier_uniform_(part)
        nn.init.zeros_(self.qkv.bias)
        init_linear(self.projection)

    def macs(self, tokens: int, first: int | None = None) -> int:
        """Multiply-accumulates for one image of so many tokens, all or the first of them computed:
        queries and projection, keys and values, logits and weighted sums."""
        first, width = tokens if first is None else first, self.projection.out_features
        return 2 * (first + tokens) * width * width + 2 * first * tokens * width
