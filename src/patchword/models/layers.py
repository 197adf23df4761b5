"""The parts of a Vision Transformer: patch embedding, attention, MLP, block, pooling head.

Shapes: b images, n tokens, h heads, d values a head, D = h * d model width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchword.models.position import PositionRule
from patchword.spec.model import Activation


class PatchEmbedding(nn.Module):
    """Images to patch vectors by one matrix product (Eq. 1): float `[B, C, H, W]` to `[B, N, D]`.

    `weight` is `[D, Ph * Pw * C]`: a patch is flattened row by row, pixel by pixel, channels last.
    """

    def __init__(self, patch_size: tuple[int, int], in_channels: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.weight = nn.Parameter(torch.empty(width, math.prod(patch_size) * in_channels))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, images: Tensor) -> Tensor:
        b, c, height, width = images.shape
        ph, pw = self.patch_size
        rows, columns = height // ph, width // pw
        patches = images.view(b, c, rows, ph, columns, pw).permute(0, 2, 4, 3, 5, 1)
        patches = patches.reshape(b, rows * columns, ph * pw * c)
        return F.linear(patches, self.weight, self.bias)


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


class SelfAttention(nn.Module):
    """Multi-head self-attention (Eq. 5-8) over `[b, n, D]`, with q, k and v in one product.

    The rows of `qkv.weight` are all queries, all keys, all values, each head by head.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.query_norm = nn.LayerNorm(width // heads, eps=eps) if qk_norm else None
        self.key_norm = nn.LayerNorm(width // heads, eps=eps) if qk_norm else None
        self.projection = nn.Linear(width, width)

    def forward(
        self, x: Tensor, wanted: int | None = None, position: PositionRule | None = None
    ) -> Tensor:
        """`[b, n, D]` to `[b, n, D]`, or to `[b, wanted, D]`, the first tokens alone."""
        b, n, width = x.shape
        if wanted is None:
            qkv = self.qkv(x).view(b, n, 3, self.heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [b, h, n, d]
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(x[:, :wanted], weight[:width], bias[:width])
            q = q.view(b, -1, self.heads, width // self.heads)
            q = q.transpose(1, 2)  # [b, h, wanted, d]
            kv = F.linear(x, weight[width:], bias[width:]).view(b, n, 2, self.heads, -1)
            k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # [b, h, n, d]
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        bias = None
        if position is not None:
            q, k, bias = position(q, k)
        return self.projection(attention(q, k, v, bias).transpose(1, 2).reshape(b, -1, width))


class Mlp(nn.Module):
    """Two dense layers with GELU between, each followed by dropout (section 3.1).

    With `swiglu` (arXiv 2002.05202) the first is twice as wide: SiLU of its first half times its
    second half go on.
    """

    def __init__(
        self, width: int, hidden: int, activation: Activation = "gelu", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.activation = activation
        self.hidden = nn.Linear(width, hidden * (2 if activation == "swiglu" else 1))
        self.output = nn.Linear(hidden, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(x)
        if self.activation == "swiglu":
            gate, value = x.chunk(2, dim=-1)
            x = F.silu(gate) * value
        else:
            x = F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return drop(self.output(drop(x, self.dropout, self.training)), self.dropout, self.training)


def drop(x: Tensor, rate: float, training: bool) -> Tensor:
    """Dropout that adds no node to the graph when it is off."""
    return F.dropout(x, rate) if training and rate else x


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: zero the branch `[b, ...]` of whole images with probability `rate`, scale
    the others by 1 / (1 - rate)."""
    if not (training and rate):
        return x
    keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - rate).div_(1 - rate)
    return x * keep


def kept_patches(patches: int, rate: float) -> int:
    """How many of an image's patches are left when a share of them is dropped, one at least."""
    return max(1, round(patches * (1 - rate)))


def drop_patches(x: Tensor, prefix: int, rate: float) -> Tensor:
    """A random choice of `kept_patches` of each image's patches, in order, after the first `prefix`
    tokens: `[b, prefix + n, D]` to `[b, prefix + m, D]` (arXiv 2212.00794)."""
    b, tokens, width = x.shape
    patches = tokens - prefix
    kept = kept_patches(patches, rate)
    order = torch.rand(b, patches, device=x.device).argsort(1)[:, :kept].sort(1).values + prefix
    chosen = x.gather(1, order[:, :, None].expand(b, kept, width))
    return torch.cat([x[:, :prefix], chosen], dim=1)


class Block(nn.Module):
    """One encoder block (Eq. 2 and 3), pre-norm, over `[b, n, D]`."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        *,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        qk_norm: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = SelfAttention(width, heads, qk_norm=qk_norm, eps=eps)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, mlp_width, activation, dropout)
        self.scale1 = None if layer_scale is None else nn.Parameter(torch.empty(width))
        self.scale2 = None if layer_scale is None else nn.Parameter(torch.empty(width))
        self.dropout = dropout
        self.drop_path = drop_path

    def forward(
        self, x: Tensor, wanted: int | None = None, position: PositionRule | None = None
    ) -> Tensor:
        """`[b, n, D]` to `[b, n, D]`; with `wanted`, only the first so many tokens, `[b, wanted,
        D]`, at the cost of those: the others are looked at, not computed."""
        y = drop(self.attention(self.norm1(x), wanted, position), self.dropout, self.training)
        x = x[:, :wanted] + self._branch(y, self.scale1)
        return x + self._branch(self.mlp(self.norm2(x)), self.scale2)

    def _branch(self, y: Tensor, scale: Tensor | None) -> Tensor:
        return drop_path(y if scale is None else y * scale, self.drop_path, self.training)


class AttentionPool(nn.Module):
    """Multi-head attention pooling: a learned probe attends to all tokens, then a residual MLP
    (Lee et al., Set Transformer; the MAP head of big_vision). `[b, n, D]` to `[b, D]`."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        activation: Activation = "gelu",
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.projection = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, mlp_width, activation)

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q = self.query(self.probe).view(1, 1, self.heads, -1).transpose(1, 2).expand(b, -1, -1, -1)
        kv = self.key_value(x).view(b, n, 2, self.heads, width // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # [b, h, n, d]
        pooled = self.projection(attention(q, k, v).transpose(1, 2).reshape(b, width))
        return pooled + self.mlp(self.norm(pooled))
