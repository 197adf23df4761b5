"""Position embeddings: fixed sin-cos, and 2-D resampling of learned tables to any grid."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def resample_position_embedding(
    table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> Tensor:
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
    planes = grid.reshape(-1, *old_grid, width).permute(0, 3, 1, 2).float()
    planes = planes.contiguous()  # channels last, torch goes wrong where the new width is 1
    planes = F.interpolate(planes, size=new_grid, mode="bicubic", antialias=True)
    resampled = planes.permute(0, 2, 3, 1).reshape(*grid.shape[:-2], math.prod(new_grid), width)
    return torch.cat([prefix, resampled.to(table.dtype)], dim=-2)


def sincos_2d(grid: tuple[int, int], width: int, temperature: float = 10_000.0) -> Tensor:
    """The fixed 2-D sine-cosine table, float32 `[1, N, D]` ("Better plain ViT baselines").

    A quarter of the width each for sin x, cos x, sin y, cos y. Raises `ValueError` unless 4 divides
    D and D is 8 or more."""
    if width % 4 or width < 8:
        raise ValueError(f"sincos2d needs a width of 8 or more that 4 divides, not {width}")
    quarter = width // 4
    frequencies = temperature ** -(torch.arange(quarter, dtype=torch.float64) / (quarter - 1))
    rows, columns = torch.meshgrid(
        *(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij"
    )
    x, y = columns.reshape(-1, 1) * frequencies, rows.reshape(-1, 1) * frequencies
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()[None]
