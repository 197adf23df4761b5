"""Where a patch is: the position embeddings of table 8, sin-cos and rotary, and their resampling.

Two kinds of module: tables that are added to tokens, and rules that act inside attention.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from patchword.spec.batch import Grid
from patchword.spec.model import ViTSpec

Placed = tuple[Tensor, Tensor, Tensor | None]
"""Queries, keys, and a bias for their logits or None."""


class PositionTable(nn.Module):
    """Calling it with a grid, by default its own, gives `[1, T, D]` to add to the leading tokens
    (not all kinds have entries for them) and the patches of that grid."""

    def forward(self, grid: Grid | None = None) -> Tensor:
        raise NotImplementedError


class Learned1d(PositionTable):
    """One vector for each leading token and patch, row by row (the paper's choice). For another
    grid it is interpolated in 2-D (section 3.2)."""

    def __init__(self, leading: int, grid: Grid, width: int) -> None:
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.empty(1, leading + math.prod(grid), width))

    def forward(self, grid: Grid | None = None) -> Tensor:
        return resample_position_embedding(self.table, self.grid, grid or self.grid)


class Learned2d(PositionTable):
    """Half of a patch's vector for its column (x), half for its row (y), D.4; the leading tokens
    have none, as they are learned themselves. For another grid each axis is interpolated."""

    def __init__(self, grid: Grid, width: int) -> None:
        super().__init__()
        self.grid = grid
        self.columns = nn.Parameter(torch.empty(1, grid[1], width // 2))
        self.rows = nn.Parameter(torch.empty(1, grid[0], width // 2))

    def forward(self, grid: Grid | None = None) -> Tensor:
        rows, columns = grid or self.grid
        x = resample_axis(self.columns, self.grid[1], columns)[:, None]
        y = resample_axis(self.rows, self.grid[0], rows)[:, :, None]
        half = x.shape[-1]
        x, y = x.expand(1, rows, columns, half), y.expand(1, rows, columns, half)
        return torch.cat([x, y], dim=-1).flatten(1, 2)


class SinCos2d(PositionTable):
    """The fixed table of `sincos_2d`."""

    def __init__(self, grid: Grid, width: int) -> None:
        super().__init__()
        self.grid = grid
        with torch.device("cpu"):  # also where the model itself is built without memory
            self.register_buffer("table", sincos_2d(grid, width), persistent=False)
        self.table: Tensor

    def forward(self, grid: Grid | None = None) -> Tensor:
        if grid in (None, self.grid):
            return self.table
        return sincos_2d(grid, self.table.shape[-1]).to(self.table)


class PositionRule(nn.Module):
    """Acts on queries `[b, h, q, d]` (the first q of the tokens) and keys `[b, h, T, d]` of a grid,
    by default its own: returns both, and a bias `[b, h, q, T]` for the scaled logits, or None."""

    def forward(self, q: Tensor, k: Tensor, grid: Grid | None = None) -> Placed:
        raise NotImplementedError


class Relative(PositionRule):
    """D.4's relative embeddings: the query times an embedding of the 1-D offset from query to key,
    over all tokens in sequence, scaled as the logits are and added to them. For another grid the
    embeddings are interpolated (`resample_offsets`)."""

    def __init__(self, prefix: int, grid: Grid, head_width: int) -> None:
        super().__init__()
        self.prefix, self.grid = prefix, grid
        tokens = prefix + math.prod(grid)
        self.offsets = nn.Parameter(torch.empty(2 * tokens - 1, head_width))

    def forward(self, q: Tensor, k: Tensor, grid: Grid | None = None) -> Placed:
        queries, keys = q.shape[2], k.shape[2]
        offsets = resample_offsets(self.offsets, self.prefix, self.grid, grid or self.grid)
        logits = q @ offsets.t() * q.shape[-1] ** -0.5  # [b, h, q, 2 T - 1]
        place = torch.arange(keys, device=q.device)
        offset = place[:queries, None] - place + keys - 1
        return q, k, logits.gather(-1, offset.expand(*q.shape[:2], queries, keys))

    def macs(self, tokens: int, heads: int) -> int:
        """Multiply-accumulates for one image of so many tokens."""
        return heads * tokens * self.offsets.numel()


class Rotary(PositionRule):
    """Rotary 2-D positions as in DINOv3 (arXiv 2508.10104; RoPE, arXiv 2104.09864).

    Patch centres along each axis, from -1 to 1, times 2 pi / period, for d / 4 periods from 1 up to
    `base`; half of a head's pairs of channels turn with the row, half with the column. Tokens
    before the patches do not turn.
    """

    def __init__(self, grid: Grid, head_width: int, base: float = 100.0) -> None:
        super().__init__()
        self.grid, self.base = grid, base
        with torch.device("cpu"):
            cos, sin = rotary_2d(grid, head_width, base)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.cos: Tensor
        self.sin: Tensor

    def forward(self, q: Tensor, k: Tensor, grid: Grid | None = None) -> Placed:
        cos, sin = self.cos, self.sin
        if grid not in (None, self.grid):
            cos, sin = (t.to(q.device) for t in rotary_2d(grid, q.shape[-1], self.base))
        first = k.shape[2] - cos.shape[0]
        return _turned(q, first, cos, sin), _turned(k, first, cos, sin), None


def _turned(x: Tensor, first: int, cos: Tensor, sin: Tensor) -> Tensor:
    patches = x[:, :, first:]
    seen = patches.shape[2]  # 0 where only leading tokens ask
    if not seen:
        return x
    low, high = patches.chunk(2, dim=-1)
    cos, sin = cos[:seen].to(x.dtype), sin[:seen].to(x.dtype)
    turned = patches * cos + torch.cat([-high, low], dim=-1) * sin
    return torch.cat([x[:, :, :first], turned], dim=2)


def create_position(spec: ViTSpec) -> PositionTable | PositionRule:
    """A freshly made module of the spec's kind, its parameters not yet initialised."""
    head_width = spec.width // spec.heads
    match spec.position:
        case "learned-1d":
            return Learned1d(spec.leading, spec.grid, spec.width)
        case "learned-2d":
            return Learned2d(spec.grid, spec.width)
        case "sincos2d":
            return SinCos2d(spec.grid, spec.width)
        case "relative":
            return Relative(spec.prefix, spec.grid, head_width)
        case "rotary":
            return Rotary(spec.grid, head_width)
        case "none":
            raise ValueError("position none has no module")


def sincos_2d(grid: Grid, width: int, temperature: float = 10_000.0) -> Tensor:
    """The fixed 2-D sine-cosine table, float32 `[1, N, D]` ("Better plain ViT baselines").

    A quarter of the width each for sin x, cos x, sin y, cos y. Raises `ValueError` unless 4 divides
    D and D is 8 or more."""
    if width % 4 or width < 8:
        raise ValueError(f"sincos2d needs a width of 8 or more that 4 divides, not {width}")
    quarter = width // 4
    frequencies = temperature ** -(torch.arange(quarter, dtype=torch.float64) / (quarter - 1))
    y, x = (torch.arange(n, dtype=torch.float64)[:, None] * frequencies for n in grid)
    y = y[:, None]  # [rows, 1, D / 4], and x is [columns, D / 4]
    parts = [part.expand(*grid, quarter) for part in (x.sin(), x.cos(), y.sin(), y.cos())]
    return torch.cat(parts, dim=-1).flatten(0, 1).float()[None]


def rotary_2d(grid: Grid, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles of `Rotary`, float32 `[N, d]` each."""
    quarter = head_width // 4
    rate = 2 * math.pi * base ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    centres = ((torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1 for n in grid)
    y, x = (centre[:, None] * rate for centre in centres)
    angles = [y[:, None].expand(*grid, quarter), x.expand(*grid, quarter)]
    turns = torch.cat(angles * 2, dim=-1).flatten(0, 1)
    return turns.cos().float(), turns.sin().float()


# Resampling --------------------------------------------------------------------------------------


def resample_position_embedding(table: Tensor, old_grid: Grid, new_grid: Grid) -> Tensor:
    """A position table for another grid of patches, interpolated in 2-D (section 3.2).

    `table` is float `[..., T + N, D]` with N = rows * columns of `old_grid`, row by row; the
    first T entries (class token, registers) stay as they are. Bicubic with antialiasing, computed
    in float32. Returns `[..., T + N', D]` of the same dtype; the table itself if the grids are
    equal. Raises `ValueError` if the table is smaller than `old_grid`.
    """
    patches = math.prod(old_grid)
    entries, width = table.shape[-2:]
    if entries < patches:
        raise ValueError(f"a table of {entries} entries cannot hold a grid of {old_grid}")
    if old_grid == new_grid:
        return table
    prefix, grid = table[..., :-patches, :], table[..., -patches:, :]
    grid = grid.reshape(*grid.shape[:-2], *old_grid, width).float()
    down, across = (
        torch.as_tensor(_bicubic(old, new), device=grid.device)
        for old, new in zip(old_grid, new_grid, strict=True)
    )
    grid = torch.einsum("yr,xc,...rcd->...yxd", down, across, grid)
    return torch.cat([prefix, grid.flatten(-3, -2).to(table.dtype)], dim=-2)


@lru_cache(256)
def _bicubic(old: int, new: int) -> NDArray[np.float32]:
    """Weights `[new, old]` of bicubic interpolation along an axis, the kernel (a = -0.5) widened
    where the axis shrinks: antialiasing as Pillow and torch do it. Torch's own (2.13, CPU) goes
    wrong where the new width is 1. An array, as a tensor would keep the mode it was made in."""
    scale = old / new
    centres = (np.arange(new) + 0.5) * scale
    x = np.abs(np.arange(old) + 0.5 - centres[:, None]) / max(scale, 1.0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def resample_axis(table: Tensor, old: int, new: int) -> Tensor:
    """`resample_position_embedding` along a single axis: `[..., old, D]` to `[..., new, D]`."""
    return resample_position_embedding(table, (old, 1), (new, 1))


def resample_offsets(table: Tensor, prefix: int, old_grid: Grid, new_grid: Grid) -> Tensor:
    """A `Relative` table `[2 T - 1, d]` for another grid, T = `prefix` + N tokens.

    A new offset is taken apart into rows and columns (of the ways to do so, the one with the fewest
    columns), these are scaled to the old grid, and the table is read there, linearly.
    """
    if old_grid == new_grid:
        return table
    (old_rows, old_columns), (rows, columns) = old_grid, new_grid
    tokens, old_tokens = prefix + rows * columns, prefix + old_rows * old_columns
    offset = torch.arange(1 - tokens, tokens, dtype=torch.float64)
    down = torch.floor((offset + columns / 2) / columns)
    across = offset - down * columns
    place = down * (old_rows / rows) * old_columns + across * (old_columns / columns)
    place = (place + old_tokens - 1).clamp(0, 2 * old_tokens - 2).to(table.device)
    low = place.floor().long().clamp(max=2 * old_tokens - 3) if old_tokens > 1 else place.long()
    share = (place - low).to(table.dtype)[:, None]
    return torch.lerp(table[low], table[(low + 1).clamp(max=len(table) - 1)], share)


def resample_positions(tensors: dict[str, Tensor], old: ViTSpec, new: ViTSpec) -> None:
    """Fit the position parameters among a ViT's `tensors`, in place, to another image size."""
    for name in [name for name in tensors if name.startswith("positions.")]:
        value, kind = tensors[name], name.rsplit(".", 1)[1]
        if kind == "table":
            fitted = resample_position_embedding(value, old.grid, new.grid)
        elif kind == "offsets":
            fitted = resample_offsets(value, old.prefix, old.grid, new.grid)
        else:
            axis = 0 if kind == "rows" else 1
            fitted = resample_axis(value, old.grid[axis], new.grid[axis])
        tensors[name] = fitted
