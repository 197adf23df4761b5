"""Resampling of position tables for any grid, and the sine-cosine table."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from patchword import resample_position_embedding
from patchword.models.position import sincos_2d

sides = st.integers(1, 9)
grids = st.tuples(sides, sides)
prefixes = st.integers(0, 3)


def table_for(grid: tuple[int, int], prefix: int, width: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, prefix + math.prod(grid), width, generator=generator)


@given(grids, prefixes)
def test_same_grid_is_the_identity(grid: tuple[int, int], prefix: int):
    table = table_for(grid, prefix)
    assert torch.equal(resample_position_embedding(table, grid, grid), table)


@settings(max_examples=60)
@given(grids, grids, prefixes, st.integers(0, 99))
def test_any_grid_to_any_grid(old: tuple[int, int], new: tuple[int, int], prefix: int, seed: int):
    """The prefix stays bit for bit; the rest is interpolated channel by channel in 2-D."""
    table = table_for(old, prefix, seed=seed)
    found = resample_position_embedding(table, old, new)
    assert found.shape == (1, prefix + math.prod(new), 3)
    assert torch.equal(found[:, :prefix], table[:, :prefix])
    if old == new:
        return
    for channel in range(3):
        plane = table[0, prefix:, channel].reshape(1, 1, *old)
        wanted = F.interpolate(plane, size=new, mode="bicubic", antialias=True)
        torch.testing.assert_close(found[0, prefix:, channel], wanted.flatten())


@given(grids, grids, st.floats(-3, 3))
def test_constant_tables_stay_constant(old: tuple[int, int], new: tuple[int, int], value: float):
    table = torch.full((1, math.prod(old), 2), value)
    found = resample_position_embedding(table, old, new)
    assert (found - value).abs().max() < 1e-5


@pytest.mark.parametrize(("old", "new"), [((4, 6), (8, 12)), ((8, 12), (4, 6)), ((5, 7), (9, 3))])
def test_rows_and_columns_are_not_mixed_up(old: tuple[int, int], new: tuple[int, int]):
    """A ramp along one axis stays a rising ramp along it, and constant along the other."""
    down, across = torch.meshgrid(*map(torch.arange, old), indexing="ij")
    table = torch.stack([down.flatten(), across.flatten()], dim=1).float()[None]
    found = resample_position_embedding(table, old, new)[0].reshape(*new, 2)
    assert (found[1:, :, 0] > found[:-1, :, 0]).all()
    assert (found[:, 1:, 1] > found[:, :-1, 1]).all()
    assert found[:, :, 0].std(dim=1).max() < 1e-5
    assert found[:, :, 1].std(dim=0).max() < 1e-5


def test_there_and_back_is_near_the_smooth_original():
    grid = (7, 7)
    smooth = sincos_2d(grid, 32)
    bigger = resample_position_embedding(smooth, grid, (14, 14))
    back = resample_position_embedding(bigger, (14, 14), grid)
    assert (back - smooth).abs().mean() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dtype_and_leading_axes_are_kept(dtype: torch.dtype):
    table = torch.randn(2, 5, 1 + 12, 4).to(dtype)
    found = resample_position_embedding(table, (3, 4), (2, 6))
    assert found.dtype is dtype
    assert found.shape == (2, 5, 13, 4)
    one = resample_position_embedding(table[1, 3], (3, 4), (2, 6))
    torch.testing.assert_close(found[1, 3], one)


def test_gradients_reach_the_table():
    table = torch.randn(1, 10, 2, requires_grad=True)
    resample_position_embedding(table, (3, 3), (4, 4)).sum().backward()
    assert table.grad is not None
    assert table.grad.all()


def test_a_table_too_small_is_refused():
    with pytest.raises(ValueError, match=r"5 entries cannot hold a grid of \(2, 3\)"):
        resample_position_embedding(torch.zeros(1, 5, 4), (2, 3), (4, 4))


@pytest.mark.parametrize(("grid", "width"), [((1, 1), 8), ((3, 5), 16), ((14, 14), 192)])
def test_sincos_against_numpy(grid: tuple[int, int], width: int):
    found = sincos_2d(grid, width)
    assert found.dtype is torch.float32
    assert found.shape == (1, math.prod(grid), width)
    quarter = width // 4
    for row in range(grid[0]):
        for column in range(grid[1]):
            wanted = [
                f(at * 10_000.0 ** (-i / (quarter - 1)))
                for at, f in ((column, np.sin), (column, np.cos), (row, np.sin), (row, np.cos))
                for i in range(quarter)
            ]
            np.testing.assert_allclose(found[0, row * grid[1] + column], wanted, atol=1e-6)


@pytest.mark.parametrize("width", [4, 6, 30])
def test_sincos_refuses_widths_it_cannot_fill(width: int):
    with pytest.raises(ValueError, match="width"):
        sincos_2d((2, 2), width)
