"""Images as patches of pixels, and the colours of patches: what self-supervised models predict."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from patchword.data.transforms import to_input
from patchword.spec.model import PreprocessSpec

LEVELS = 8
"""Of a channel: 3 bits (section B.1.2)."""


def to_pixels(images: Tensor, preprocess: PreprocessSpec) -> Tensor:
    """Normalised images `[B, C, H, W]` back to pixel values, 0 to 1 (the inverse of `to_input`)."""
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    black, white = to_input(ends.expand(2, images.shape[1], 1, 1), preprocess).to(images)
    return (images - black) / (white - black)


def cut(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """`[B, C, H, W]` to patches `[B, N, Ph, Pw, C]`, row by row."""
    b, c, height, width = images.shape
    ph, pw = patch_size
    tiles = images.reshape(b, c, height // ph, ph, width // pw, pw)
    return tiles.permute(0, 2, 4, 3, 5, 1).flatten(1, 2)


def assembled(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of `cut` for a grid of (rows, columns)."""
    b, _, ph, pw, c = patches.shape
    rows, columns = grid
    tiles = patches.view(b, rows, columns, ph, pw, c).permute(0, 5, 1, 3, 2, 4)
    return tiles.reshape(b, c, rows * ph, columns * pw)


def pooled(patches: Tensor, size: int) -> Tensor:
    """Patches `[B, N, Ph, Pw, C]` down-sized by averaging to `[B, N, size * size, C]`."""
    b, n, _, _, c = patches.shape
    flat = patches.flatten(0, 1).permute(0, 3, 1, 2)  # [b n, c, ph, pw]
    small = F.adaptive_avg_pool2d(flat, size)
    return small.permute(0, 2, 3, 1).reshape(b, n, size * size, c)


def colour_classes(channels: int) -> int:
    """How many colours there are in 3 bits a channel: 512 in RGB."""
    return LEVELS**channels


def quantised(colours: Tensor) -> Tensor:
    """Colours `[..., C]`, 0 to 1, as int64 classes `[...]` in [0, 8^C): 3 bits a channel, the first
    channel the highest."""
    levels = (colours * LEVELS).floor().clamp(0, LEVELS - 1).long()
    weights = LEVELS ** torch.arange(colours.shape[-1] - 1, -1, -1, device=colours.device)
    return (levels * weights).sum(-1)


def colour_of(classes: Tensor, channels: int) -> Tensor:
    """The middle of each class's range, `[..., C]`, 0 to 1."""
    weights = LEVELS ** torch.arange(channels - 1, -1, -1, device=classes.device)
    return ((classes[..., None] // weights) % LEVELS + 0.5) / LEVELS


def taken(values: Tensor, places: Tensor) -> Tensor:
    """The rows of `[B, N, ...]` at int64 `places` `[B, n]`: `[B, n, ...]`."""
    index = places.view(*places.shape, *[1] * (values.ndim - 2))
    return values.gather(1, index.expand(*places.shape, *values.shape[2:]))


def put(values: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    """`values` `[B, N, ...]` with those at `places` `[B, n]` replaced by `rows` `[B, n, ...]`."""
    index = places.view(*places.shape, *[1] * (values.ndim - 2))
    return values.scatter(1, index.expand_as(rows), rows)
