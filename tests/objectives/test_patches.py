"""Patches and colours against slow loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patchword.data.transforms import to_input
from patchword.models.layers import PatchEmbedding
from patchword.objectives import patches
from patchword.spec.model import PreprocessSpec


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    channels=st.integers(1, 4),
)
def test_cutting_and_assembling_are_inverse(
    rows: int, columns: int, size: tuple[int, int], channels: int
):
    images = torch.randn(2, channels, rows * size[0], columns * size[1])
    tiles = patches.cut(images, size)
    assert tiles.shape == (2, rows * columns, *size, channels)
    assert torch.equal(patches.assembled(tiles, (rows, columns)), images)


def test_a_patch_is_flattened_as_the_embedding_takes_it():
    """The embedding with the identity as weights gives the patches themselves."""
    embedding = PatchEmbedding((2, 3), 3, 18)
    with torch.no_grad():
        embedding.weight.copy_(torch.eye(18))
        embedding.bias.zero_()
    images = torch.randn(2, 3, 6, 6)
    assert torch.equal(embedding(images), patches.cut(images, (2, 3)).flatten(2))


def slow_class(colour: np.ndarray) -> int:
    """One colour, channel by channel."""
    found = 0
    for value in colour:
        level = 0
        while level < 7 and value >= (level + 1) / 8:
            level += 1
        found = found * 8 + level
    return found


@given(channels=st.integers(1, 4), seed=st.integers(0, 999))
def test_colours_are_quantised_as_by_a_slow_loop(channels: int, seed: int):
    rng = np.random.default_rng(seed)
    colours = rng.random((20, channels))
    colours[0], colours[1], colours[2] = 0.0, 1.0, 0.5
    wanted = [slow_class(colour) for colour in colours]
    found = patches.quantised(torch.from_numpy(colours))
    assert found.tolist() == wanted
    assert max(wanted) == patches.colour_classes(channels) - 1
    middle = patches.colour_of(found, channels)
    assert patches.quantised(middle).tolist() == wanted
    assert (middle - torch.from_numpy(colours)).abs().max() <= 1 / 16 + 1e-12


@pytest.mark.parametrize("size", [1, 4])
def test_the_classes_of_patches_equal_a_slow_loop(size: int):
    """The mean over a block of uint8 pixels, in exact arithmetic, through normalisation and back.
    Means that lie on a border between two levels, to 1e-5, may fall on either side."""
    spec = PreprocessSpec(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    images = torch.randint(0, 256, (3, 3, 16, 24), dtype=torch.uint8)
    pixels = patches.to_pixels(to_input(images, spec), spec)
    found = patches.quantised(patches.pooled(patches.cut(pixels, (8, 8)), size))
    assert found.shape == (3, 6, size * size)
    side, compared = 8 // size, 0
    for b in range(3):
        for patch in range(6):
            top, left = patch // 3 * 8, patch % 3 * 8
            for place in range(size * size):
                y, x = top + place // size * side, left + place % size * side
                mean = images[b, :, y : y + side, x : x + side].double().mean((1, 2)) / 255
                if ((mean * 8 - (mean * 8).round()).abs() > 1e-4).all():
                    assert found[b, patch, place] == slow_class(mean.numpy())
                    compared += 1
    assert compared > 0.9 * 18 * size * size


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_come_back(channels: int):
    """1e-6, also for a grey image under three values."""
    spec = PreprocessSpec(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    images = torch.randint(0, 256, (2, channels, 4, 4), dtype=torch.uint8)
    back = patches.to_pixels(to_input(images, spec), spec)
    torch.testing.assert_close(back, images / 255, rtol=0, atol=1e-6)


def test_rows_are_taken_and_put():
    values, places = torch.randn(2, 5, 3, 2), torch.tensor([[4, 0], [1, 2]])
    rows = patches.taken(values, places)
    assert torch.equal(rows, torch.stack([values[0, [4, 0]], values[1, [1, 2]]]))
    changed = patches.put(values, places, -rows)
    assert torch.equal(patches.taken(changed, places), -rows)
    assert int((changed != values).any(-1).any(-1).sum()) == 4
