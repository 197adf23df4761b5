"""Masked patch prediction (section 4.6 and B.1.2), after BERT's masked words."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchword.models.vit import ViT
from patchword.objectives import patches
from patchword.objectives.base import Objective
from patchword.objectives.pictures import Pictures
from patchword.spec.batch import Forward
from patchword.spec.model import ViTSpec
from patchword.spec.train import PretrainSpec

RATE = 0.5
MASKED, SWAPPED = 0.8, 0.1
"""Shares of the corrupted patches that become [mask], or another patch; the rest stays."""
SMALL = 4
"""Side of the down-sized patch."""


class Corruption(NamedTuple):
    """What is done to the patch embeddings of a batch."""

    source: Tensor
    """int64 `[B, N]`: the patch whose embedding stands at each place, N for [mask]"""
    corrupted: Tensor
    """int64 `[B, n]`, rising: the places that are predicted, whatever stands there"""


def draw_corruption(
    batch: int, count: int, rate: float, device: torch.device | str = "cpu"
) -> Corruption:
    """Of each image's `count` patches round(`rate` * count), one at least, are corrupted. Each of
    those becomes [mask] with probability 0.8, another patch of the same image, any of them equally
    often, with 0.1, and else stays as it is."""
    number = min(max(1, round(rate * count)), count)
    noise = torch.rand(batch, count).to(device)
    kind = torch.rand(batch, number).to(device)
    away = torch.randint(1, count, (batch, number)).to(device)
    corrupted = noise.argsort(1)[:, :number].sort(1).values
    other = (corrupted + away) % count
    kept = torch.where(kind < MASKED + SWAPPED, other, corrupted)
    replaced = torch.where(kind < MASKED, count, kept)
    source = torch.arange(count, device=device).repeat(batch, 1).scatter(1, corrupted, replaced)
    return Corruption(source, corrupted)


class Predictor(nn.Module):
    """The [mask] embedding and a linear head: normalised images `[B, C, H, W]` and a `Corruption`
    to predictions `[B, n, outputs]` for the corrupted patches.

    The corruption acts on the patch embeddings, before the position embeddings are added: the model
    knows where a patch is missing. [mask] starts normal with a standard deviation of 0.02, the head
    at zero.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.head = nn.Linear(width, outputs)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, model: ViT, images: Tensor, source: Tensor, corrupted: Tensor) -> Tensor:
        x = model.patches(images)  # [b, N, D]
        x = torch.cat([x, self.mask_token.expand(len(x), 1, -1)], dim=1)
        grid = model.grid_of(images)
        x = model.encode(model.assemble(patches.taken(x, source), grid), grid)
        return self.head(patches.taken(x, corrupted + model.spec.prefix))


class MaskedPatch(Objective):
    """Predicts what is at the corrupted patches from what the model makes of the whole."""

    def __init__(self, model: ViT, spec: PretrainSpec) -> None:
        self.spec = spec
        self.preprocess = model.preprocess
        self.grid, self.patch_size = model.spec.grid, model.spec.patch_size
        self.channels = model.spec.in_channels
        self.parts: nn.Module | None = Predictor(model.spec.width, outputs(model.spec, spec))

    def draw(self, images: Tensor) -> Corruption:
        """A corruption for a batch of images."""
        count = self.grid[0] * self.grid[1]
        return draw_corruption(len(images), count, self.spec.mask_rate or RATE, images.device)

    def targets(self, images: Tensor) -> Tensor:
        """What is to be predicted of the patches of images `[B, C, H, W]`: colour classes, int64
        `[B, N, 1]` (`mean`) or `[B, N, 16]` (`4x4`), or normalised pixels `[B, N, Ph * Pw * C]`."""
        if self.spec.predict == "pixels":
            return patches.cut(images, self.patch_size).flatten(2)
        pixels = patches.cut(patches.to_pixels(images, self.preprocess), self.patch_size)
        size = SMALL if self.spec.predict == "4x4" else 1
        return patches.quantised(patches.pooled(pixels, size))

    def compared(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Mean over patches and predictions of the cross-entropy, or of a pixel's squared
        error; predictions `[B, n, outputs]`, targets `[B, n, ...]` as `targets` gives them."""
        if self.spec.predict == "pixels":
            return F.mse_loss(predictions, targets)
        logits = predictions.view(-1, patches.colour_classes(self.channels))
        return F.cross_entropy(logits, targets.flatten())

    def loss(self, network: Forward, images: Tensor, targets: Tensor) -> Tensor:
        draws = self.draw(images)
        predictions = network(images, *draws)
        wanted = patches.taken(self.targets(images), draws.corrupted)
        return self.compared(predictions, wanted)

    def pictures(self, network: Forward, images: Tensor) -> Pictures:
        """What the network saw of images, and what it predicts: [mask] is grey; of `mean` and `4x4`
        the most probable colours are shown."""
        draws = self.draw(images)
        predictions = network(images, *draws)
        true = patches.cut(patches.to_pixels(images, self.preprocess), self.patch_size)
        grey = torch.full_like(true[:, :1], 0.5)
        seen = patches.taken(torch.cat([true, grey], dim=1), draws.source)
        shape = (*draws.corrupted.shape, *true.shape[2:])
        if self.spec.predict == "pixels":
            normalised = patches.cut(images, self.patch_size)
            filled = patches.put(normalised, draws.corrupted, predictions.view(shape))
            shown = patches.to_pixels(patches.assembled(filled, self.grid), self.preprocess)
        else:
            rows = _colours(predictions, self.channels, shape)
            shown = patches.assembled(patches.put(true, draws.corrupted, rows), self.grid)
        return Pictures(
            patches.assembled(true, self.grid),
            patches.assembled(seen, self.grid),
            shown.clamp(0, 1),
        )


def _colours(logits: Tensor, channels: int, shape: tuple[int, ...]) -> Tensor:
    """Patches `shape` `[B, n, Ph, Pw, C]` of the most probable colours."""
    b, n, ph, pw, _ = shape
    classes = logits.view(b * n, -1, patches.colour_classes(channels)).argmax(2)
    colours = patches.colour_of(classes, channels)  # [b n, 1 or 16, c]
    side = SMALL if colours.shape[1] > 1 else 1
    tiles = colours.view(b * n, side, side, channels).permute(0, 3, 1, 2)
    return F.interpolate(tiles, (ph, pw), mode="nearest").permute(0, 2, 3, 1).reshape(shape)


def outputs(model: ViTSpec, spec: PretrainSpec) -> int:
    """Numbers that the head gives for a patch."""
    if spec.predict == "pixels":
        return model.patch_size[0] * model.patch_size[1] * model.in_channels
    colours = patches.colour_classes(model.in_channels)
    return colours * (SMALL**2 if spec.predict == "4x4" else 1)
