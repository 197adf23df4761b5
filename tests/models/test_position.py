"""Resampling of position tables for any grid, and the sine-cosine table."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from patchword import resample_position_embedding
from patchword.models.position import (
    Relative,
    Rotary,
    resample_offsets,
    resample_positions,
    sincos_2d,
)
from patchword.models.vit import ViT
from patchword.models.zoo import create_model, resized
from patchword.spec.model import Position, PositionAt, ViTSpec

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
        plane = Image.fromarray(table[0, prefix:, channel].view(old).numpy(), mode="F")
        wanted = np.array(plane.resize((new[1], new[0]), Image.Resampling.BICUBIC))
        torch.testing.assert_close(
            found[0, prefix:, channel].view(new), torch.from_numpy(wanted), rtol=1e-4, atol=1e-5
        )


def test_it_is_what_torch_does_where_torch_is_right():
    """With antialiasing; torch 2.13 on the CPU goes wrong only where the new width is 1."""
    table = table_for((7, 5), 1)
    for new in ((14, 10), (3, 4), (1, 9), (24, 24)):
        found = resample_position_embedding(table, (7, 5), new)[:, 1:]
        planes = table[:, 1:].view(1, 7, 5, 3).permute(0, 3, 1, 2).contiguous()
        wanted = F.interpolate(planes, size=new, mode="bicubic", antialias=True)
        torch.testing.assert_close(found.view(1, *new, 3), wanted.permute(0, 2, 3, 1))


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


# Relative offsets --------------------------------------------------------------------------------


def test_relative_logits_against_a_loop():
    rule = Relative(prefix=1, grid=(2, 2), head_width=3).double()
    torch.nn.init.normal_(rule.offsets)
    q, k = torch.randn(2, 2, 4, 5, 3, dtype=torch.float64).unbind(0)
    same_q, same_k, bias = rule(q, k)
    assert same_q is q
    assert same_k is k
    assert bias is not None
    for i in range(5):
        for j in range(5):
            wanted = (q[:, :, i] * rule.offsets[i - j + 4]).sum(-1) / math.sqrt(3)
            torch.testing.assert_close(bias[:, :, i, j], wanted)
    first = rule(q[:, :, :2], k)[2]
    assert first is not None
    torch.testing.assert_close(first, bias[:, :, :2])


@given(grids, prefixes)
def test_offsets_of_the_same_grid_are_the_same(grid: tuple[int, int], prefix: int):
    table = torch.randn(2 * (prefix + math.prod(grid)) - 1, 2)
    assert torch.equal(resample_offsets(table, prefix, grid, grid), table)


@settings(max_examples=60)
@given(grids, grids, prefixes)
def test_offsets_to_any_grid(old: tuple[int, int], new: tuple[int, int], prefix: int):
    """No offset stays none, and a new entry lies between old ones."""
    tokens, after = prefix + math.prod(old), prefix + math.prod(new)
    table = torch.randn(2 * tokens - 1, 2, dtype=torch.float64)
    found = resample_offsets(table, prefix, old, new)
    assert found.shape == (2 * after - 1, 2)
    torch.testing.assert_close(found[after - 1], table[tokens - 1])
    assert (found <= table.max(0).values + 1e-12).all()
    assert (found >= table.min(0).values - 1e-12).all()


def test_offsets_keep_their_direction():
    """A table that holds how far down and across an offset points, in shares of the image: after
    doubling both sides, one step of the old grid is two of the new one."""
    old, new = (4, 6), (8, 12)
    tokens = math.prod(old)
    offset = torch.arange(1 - tokens, tokens, dtype=torch.float64)
    down = torch.floor((offset + old[1] / 2) / old[1])
    table = torch.stack([down / old[0], (offset - down * old[1]) / old[1]], dim=1)
    found = resample_offsets(table, 0, old, new)
    middle = math.prod(new) - 1
    for rows, columns in ((2, 0), (0, 4), (2, -4), (-4, 2), (6, 0)):
        entry = found[middle + rows * new[1] + columns]
        torch.testing.assert_close(
            entry, torch.tensor([rows / 8, columns / 12], dtype=torch.float64)
        )


# Rotary ------------------------------------------------------------------------------------------


def test_rotary_keeps_lengths_and_depends_on_the_offset_alone():
    rule = Rotary((6, 6), 8)
    q, k = torch.randn(2, 1, 1, 1, 8).unbind(0)
    turned_q, turned_k, bias = rule(q.expand(1, 1, 36, 8), k.expand(1, 1, 36, 8))
    assert bias is None
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(1, 1, 36))
    logits = (turned_q @ turned_k.transpose(-2, -1))[0, 0].view(6, 6, 6, 6)
    torch.testing.assert_close(logits[1, 2, 3, 1], logits[2, 4, 4, 3], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits[1, 2, 3, 1], logits[1, 2, 1, 3])


def test_rotary_leaves_the_leading_tokens_alone():
    rule = Rotary((2, 3), 4)
    q, k = torch.randn(2, 2, 2, 8, 4).unbind(0)
    turned_q, turned_k, _ = rule(q, k)
    assert torch.equal(turned_q[:, :, :2], q[:, :, :2])
    assert not torch.isclose(turned_k[:, :, 2:], k[:, :, 2:]).all(-1).any()
    assert torch.equal(rule(q[:, :, :2], k)[0], q[:, :, :2])


# Whole models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("position_at", ["stem", "every", "every-shared"])
@pytest.mark.parametrize("position", ["learned-1d", "learned-2d", "relative", "rotary", "sincos2d"])
def test_models_move_to_another_grid(position: Position, position_at: PositionAt):
    """All position parameters of a model fit the new grid, and a constant one stays as it is."""

    def spec(size: tuple[int, int]) -> ViTSpec:
        return ViTSpec(
            depth=2,
            width=16,
            mlp_width=16,
            heads=2,
            patch_size=(4, 4),
            image_size=size,
            num_classes=3,
            registers=1,
            position=position,
            position_at=position_at,
        )

    old, new = ViT(spec((16, 24))), ViT(spec((24, 12)))
    tensors = {name: torch.full_like(value, 0.5) for name, value in old.state_dict().items()}
    before = dict(tensors)
    resample_positions(tensors, old.spec, new.spec)
    changed = any(tensors[name] is not value for name, value in before.items())
    assert changed == position.startswith(("learned", "relative"))
    new.load_state_dict(tensors)
    for parameter in new.positions.parameters():
        torch.testing.assert_close(parameter, torch.full_like(parameter, 0.5))
    assert new(torch.randn(1, 3, 24, 12)).shape == (1, 3)


def test_tables_of_two_axes_are_resampled_each_on_its_own():
    tensors = {
        "positions.0.rows": torch.linspace(-1, 1, 8).view(1, 8, 1).expand(1, 8, 2).clone(),
        "positions.0.columns": torch.linspace(3, 5, 4).view(1, 4, 1).expand(1, 4, 2).clone(),
    }
    small = create_model("ViT-mu/2", 3, (16, 8), position="learned-2d").spec
    old, new = small, resized(small, (32, 8))
    assert isinstance(old, ViTSpec)
    assert isinstance(new, ViTSpec)
    columns = tensors["positions.0.columns"]
    resample_positions(tensors, old, new)
    assert tensors["positions.0.columns"] is columns
    rows = tensors["positions.0.rows"]
    assert rows.shape == (1, 16, 2)
    assert (rows[0, 1:-1].diff(dim=0) > 0).all()
    torch.testing.assert_close(rows.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
