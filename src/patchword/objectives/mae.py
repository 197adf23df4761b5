"""The masked autoencoder (MAE, arXiv 2111.06377)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchword.models.layers import Block
from patchword.models.model import init_linear
from patchword.models.position import SinCos2d
from patchword.models.vit import ViT
from patchword.objectives import patches
from patchword.objectives.base import Objective
from patchword.objectives.pictures import Pictures
from patchword.spec.batch import Forward
from patchword.spec.model import Activation, ViTSpec
from patchword.spec.train import PretrainSpec

RATE = 0.75
MLP_RATIO = 4
"""Hidden units of the decoder's MLPs relative to its width."""
EPSILON = 1e-6
"""Added to the variance of a patch's pixels."""


class Hidden(NamedTuple):
    """Which patches of each image the encoder sees, and which are to be predicted."""

    visible: Tensor
    """int64 `[B, v]`, in random order"""
    masked: Tensor
    """int64 `[B, m]`, the others"""


def draw_hidden(batch: int, count: int, rate: float, device: torch.device | str = "cpu") -> Hidden:
    """round(`rate` * count) of the `count` patches of each image are masked, drawn at random, one
    at least and all but one at most."""
    number = min(max(1, round(rate * count)), count - 1)
    order = torch.rand(batch, count).to(device).argsort(1)
    return Hidden(order[:, number:], order[:, :number])


class Decoder(nn.Module):
    """The light decoder: normalised images `[B, C, H, W]` and a `Hidden` to predictions
    `[B, m, Ph * Pw * C]` for the masked patches, of pixels normalised by patch.

    The model encodes the visible patches alone, with its class token and registers. What it puts
    out, in the decoder's width, and a learned [mask] token for each masked patch get the fixed
    sin-cos positions and go through the blocks; the last of them computes the masked patches alone.
    Initialised as MAE's public code (models_mae): matrices Xavier uniform, variance 2 / (in + out),
    q, k and v as the one of 3 D rows that they are in, so 1 / (2 D), half of what the model itself
    has; biases 0, [mask] normal with a standard deviation of 0.02.
    """

    def __init__(self, model: ViTSpec, spec: PretrainSpec) -> None:
        super().__init__()
        width = spec.decoder_width
        self.embedding = nn.Linear(model.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.position = SinCos2d(model.grid, width)
        self.blocks = nn.ModuleList(
            Block(width, spec.decoder_heads, MLP_RATIO * width) for _ in range(spec.decoder_depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, math.prod(model.patch_size) * model.in_channels)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)

    def forward(self, model: ViT, images: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        prefix = model.spec.prefix
        x = model.embed(images)  # [b, prefix + N, D]
        seen = patches.taken(x, visible + prefix)
        seen = torch.cat([x[:, :prefix], seen], dim=1) if prefix else seen
        seen = model.encode(seen, model.grid_of(images))
        y = self.embedding(seen)
        table = self.position().expand(len(y), -1, -1)
        hidden = self.mask_token + patches.taken(table, masked)
        shown = y[:, prefix:] + patches.taken(table, visible)
        y = torch.cat([hidden, y[:, :prefix], shown], dim=1)  # attention minds no order
        count = masked.shape[1]
        for block in self.blocks[:-1]:
            y = block(y)
        return self.head(self.norm(self.blocks[-1](y, first=count)))


class MaskedAutoencoder(Objective):
    """Predicts the pixels of the patches that the encoder did not see, each patch's normalised by
    their own mean and variance."""

    def __init__(self, model: ViT, spec: PretrainSpec) -> None:
        self.rate = spec.mask_rate or RATE
        self.preprocess = model.preprocess
        self.grid, self.patch_size = model.spec.grid, model.spec.patch_size
        self.parts: nn.Module | None = Decoder(model.spec, spec)

    def draw(self, images: Tensor) -> Hidden:
        """Which patches of a batch of images are hidden."""
        return draw_hidden(len(images), math.prod(self.grid), self.rate, images.device)

    def targets(self, images: Tensor) -> Tensor:
        """Of `[B, C, H, W]`, the pixels of each patch less their mean, over their standard
        deviation: `[B, N, Ph * Pw * C]`."""
        pixels = patches.cut(images, self.patch_size).flatten(2)
        variance, mean = torch.var_mean(pixels, dim=2, keepdim=True)
        return (pixels - mean) * (variance + EPSILON).rsqrt()

    def loss(self, network: Forward, images: Tensor, targets: Tensor) -> Tensor:
        draws = self.draw(images)
        predictions = network(images, *draws)
        return F.mse_loss(predictions, patches.taken(self.targets(images), draws.masked))

    def pictures(self, network: Forward, images: Tensor) -> Pictures:
        """Images, what the encoder saw of them (the rest is grey), and the reconstruction: to each
        patch the mean and the variance of the true one are given, which nothing predicts."""
        draws = self.draw(images)
        predictions = network(images, *draws)
        true = patches.cut(images, self.patch_size)
        variance, mean = torch.var_mean(true.flatten(2), dim=2, keepdim=True)
        rows = predictions * patches.taken((variance + EPSILON).sqrt(), draws.masked)
        rows = (rows + patches.taken(mean, draws.masked)).view(*draws.masked.shape, *true.shape[2:])
        filled = patches.assembled(patches.put(true, draws.masked, rows), self.grid)
        original = patches.to_pixels(images, self.preprocess)
        grey = torch.full_like(original, 0.5)
        tiles, blank = patches.cut(original, self.patch_size), patches.cut(grey, self.patch_size)
        seen = patches.put(blank, draws.visible, patches.taken(tiles, draws.visible))
        shown = patches.to_pixels(filled, self.preprocess).clamp(0, 1)
        return Pictures(original, patches.assembled(seen, self.grid), shown)


def macs(model: ViTSpec, spec: PretrainSpec) -> int:
    """Multiply-accumulates of one image's forward pass: the patch embedding of all patches, the
    encoder over the visible ones, the decoder over all."""
    count, width = math.prod(model.grid), spec.decoder_width
    masked = min(max(1, round((spec.mask_rate or RATE) * count)), count - 1)
    tokens, pixels = model.prefix + count - masked, math.prod(model.patch_size) * model.in_channels
    total = count * pixels * model.width
    total += model.depth * _block(tokens, model.width, model.mlp_width, model.activation)
    total += tokens * model.width * width
    all_tokens, hidden = model.prefix + count, MLP_RATIO * width
    total += (spec.decoder_depth - 1) * _block(all_tokens, width, hidden)
    total += _block(all_tokens, width, hidden, first=masked)
    return total + masked * width * pixels


def _block(
    tokens: int, width: int, hidden: int, activation: Activation = "gelu", first: int | None = None
) -> int:
    """Of a block that computes the first of its tokens, by default all."""
    with torch.device("meta"):
        return Block(width, 1, hidden, activation=activation).macs(tokens, first)
