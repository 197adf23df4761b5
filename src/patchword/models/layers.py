"""The parts of a Vision Transformer: patch embedding, MLP, block, pooling head.

Shapes: b images, n tokens, h heads, d values a head, D = h * d model width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchword.models.attention import (
    Rule,
    SelfAttention,
    attention,
    attention_weights,
    drop,
    join_heads,
    split_heads,
)
from patchword.models.model import init_lecun, init_linear
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

    def init_weights(self) -> None:
        init_lecun(self.weight)
        nn.init.zeros_(self.bias)

    def macs(self, patches: int) -> int:
        """Multiply-accumulates of so many patches."""
        return patches * self.weight.numel()


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

    def init_weights(self) -> None:
        for layer in (self.hidden, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def macs(self, tokens: int) -> int:
        """Multiply-accumulates of so many tokens."""
        return tokens * (self.hidden.weight.numel() + self.output.weight.numel())


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
        self.attention = SelfAttention(width, heads, qk_norm=qk_norm, dropout=dropout, eps=eps)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, mlp_width, activation, dropout)
        self.scale1 = _layer_scale(width, layer_scale)
        self.scale2 = _layer_scale(width, layer_scale)
        self.drop_path = drop_path

    def forward(self, x: Tensor, rule: Rule | None = None, first: int | None = None) -> Tensor:
        """`[b, n, D]` to `[b, n, D]`; with `first`, only the first so many tokens, `[b, first, D]`,
        at the cost of those: the others are looked at, not computed. `rule` acts in attention."""
        x = x[:, :first] + self.branch(self.attention(self.norm1(x), rule, first), self.scale1)
        return x + self.branch(self.mlp(self.norm2(x)), self.scale2)

    def branch(self, y: Tensor, scale: Tensor | None) -> Tensor:
        """What a branch adds to the tokens: `y` by LayerScale, or nothing by stochastic depth."""
        return drop_path(y if scale is None else y * scale, self.drop_path, self.training)

    def init_weights(self) -> None:
        self.attention.init_weights()
        self.mlp.init_weights()

    def macs(self, tokens: int, first: int | None = None) -> int:
        """Multiply-accumulates for one image of so many tokens, all or the first ones computed."""
        mlp = self.mlp.macs(tokens if first is None else first)
        return self.attention.macs(tokens, first) + mlp


def _layer_scale(width: int, value: float | None) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(torch.full((width,), float(value)))


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
        return self._pooled(attention(*self.heads_of(x)))

    def weights(self, x: Tensor) -> Tensor:
        """`attention_weights` of the probe, `[b, h, 1, n]`."""
        q, k, _ = self.heads_of(x)
        return attention_weights(q, k)

    def applied(self, weights: Tensor, x: Tensor) -> Tensor:
        """What `forward(x)` returns, `[b, D]`, if the weights `[b, h, 1, n]` are `weights(x)`."""
        _, _, v = self.heads_of(x)
        return self._pooled(weights.to(v.dtype) @ v)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The probe's q, `[b, h, 1, d]`, and k and v of all tokens, `[b, h, n, d]`."""
        q = split_heads(self.query(self.probe), self.heads).expand(x.shape[0], -1, -1, -1)
        k, v = (split_heads(part, self.heads) for part in self.key_value(x).chunk(2, dim=-1))
        return q, k, v

    def _pooled(self, heads: Tensor) -> Tensor:
        pooled = self.projection(join_heads(heads))[:, 0]
        return pooled + self.mlp(self.norm(pooled))

    def init_weights(self) -> None:
        nn.init.xavier_uniform_(self.probe[0])
        for part in self.key_value.weight.chunk(2):
            nn.init.xavier_uniform_(part)
        nn.init.zeros_(self.key_value.bias)
        init_linear(self.query)
        init_linear(self.projection)
        self.mlp.init_weights()

    def macs(self, tokens: int) -> int:
        """Multiply-accumulates for one image of so many tokens: k and v of all, q and projection of
        the probe, its attention and MLP."""
        square = self.query.weight.numel()
        return 2 * (tokens + 1) * square + 2 * tokens * self.query.out_features + self.mlp.macs(1)
