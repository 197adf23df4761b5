"""What a model says of images with patches taken away: occlusion, deletion and insertion.

A ViT that bears any number of tokens is not shown these patches at all: their tokens are left out
before the first block, so that nothing stands in their place (a grey patch says something itself:
arXiv 2204.08945). For all others the patches are painted over in the image's mean colour.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchword.inspection.recorder import twin
from patchword.models.model import Model
from patchword.models.vit import ViT
from patchword.spec.batch import Grid
from patchword.spec.model import MixerSpec, ViTSpec
from patchword.spec.parse import PatchwordError

Maps = NDArray[np.float64]

CELLS = 14
"""Patches along a side of the image for a ResNet, which itself has none"""
WINDOWS = 256
"""As many windows at most are taken away from an image where no size is asked for"""
STEPS = 20
"""Points of a deletion or insertion curve after the first"""
BATCHES = {"cpu": 16}
"""Images with patches taken away, at a time, by device; elsewhere 64"""


def patch_grid(model: Model, images: Tensor) -> Grid:
    """(rows, columns) of the patches that are taken away from images `[B, C, H, W]`: the model's
    own, or for a ResNet 14 x 14 of the image, fewer if it has fewer pixels."""
    if isinstance(model.spec, ViTSpec | MixerSpec):
        return model.grid_of(images)
    return min(CELLS, images.shape[2]), min(CELLS, images.shape[3])


def drops_tokens(model: Model) -> bool:
    """Whether patches are taken away as tokens: of a ViT whose positions are added at the stem, and
    which has no ResNet stem, since its patches know of their neighbours."""
    return (
        isinstance(model, ViT)
        and model.stem is None
        and model.spec.position not in ("relative", "rotary")
        and (model.spec.position_at == "stem" or model.spec.position == "none")
    )


class Removal:
    """A model's logits for images `[B, C, H, W]`, normalised, of which it sees some patches only.
    No gradients, no dropout."""

    def __init__(self, model: Model, images: Tensor, batch_size: int | None = None) -> None:
        model.check(images)
        self.model = twin(model)
        self.images = images.to(next(model.parameters()))
        self.batch_size = batch_size or BATCHES.get(self.images.device.type, 64)
        self.grid = patch_grid(model, images)
        self.patches = math.prod(self.grid)

    @torch.no_grad()
    def __call__(self, which: Tensor, seen: Tensor) -> Tensor:
        """Logits `[V, K]`, float64 on the CPU, of the images at `which`, int64 `[V]`, of which the
        patches at `seen`, int64 `[V, m]`, are there (row by row, from 0, none twice; m may be 0).
        Raises `PatchwordError` if a logit is not finite."""
        parts = zip(which.split(self.batch_size), seen.split(self.batch_size), strict=True)
        device = self.images.device
        logits = torch.cat(
            [self._logits(some.to(device), kept.to(device)).cpu().double() for some, kept in parts]
        )
        if not logits.isfinite().all():
            raise PatchwordError("the model answers NaN or Inf; use an earlier checkpoint")
        return logits

    def _logits(self, which: Tensor, seen: Tensor) -> Tensor:
        model, images = self.model, self.images[which]
        whole = seen.shape[1] == self.patches
        # an average over no tokens at all does not exist: it is that of the blank image
        blank = not seen.shape[1] and not (isinstance(model, ViT) and model.spec.pool == "token")
        if whole or blank or not drops_tokens(model):
            return model(images if whole else self._painted(images, seen))
        vit = cast(ViT, model)
        prefix = vit.spec.prefix
        x = vit.embed(images)
        place = (seen + prefix).sort(1).values[:, :, None].expand(-1, -1, x.shape[2])
        x = torch.cat([x[:, :prefix], x.gather(1, place)], dim=1)
        return vit.logits(vit.encode(x, self.grid, vit.read))

    def _painted(self, images: Tensor, seen: Tensor) -> Tensor:
        """The images, but for the seen patches in the mean colour of each."""
        rows, columns = self.grid
        height, width = images.shape[2:]
        there = torch.zeros(len(images), self.patches, dtype=torch.bool, device=images.device)
        there = there.scatter(1, seen, True).view(-1, 1, rows, columns)
        down = torch.arange(height, device=images.device) * rows // height
        across = torch.arange(width, device=images.device) * columns // width
        mean = images.mean((2, 3), keepdim=True)
        return torch.where(there[:, :, down[:, None], across], images, mean)


def log_odds(model: Model, logits: Tensor, classes: Tensor) -> Tensor:
    """log(p / (1 - p)) of the classes' probabilities p, `[V]` in nats, from logits `[V, K]`: what
    all other classes leave unchanged together, and what does not saturate."""
    scaled = logits.double() / model.temperature
    own = scaled.gather(1, classes[:, None])
    if model.spec.probability == "softmax":
        own = own - scaled.scatter(1, classes[:, None], -math.inf).logsumexp(1, keepdim=True)
    return own[:, 0]


def windows(grid: Grid, size: int) -> Tensor:
    """The patches, bool `[M, rows, columns]`, of windows of `size` x `size` patches that cover the
    grid, half a window apart; smaller only where the grid is."""
    starts: list[list[int]] = []
    sides = [min(size, n) for n in grid]
    for n, side in zip(grid, sides, strict=True):
        starts.append([*range(0, n - side, max(1, size // 2)), n - side])
    covered = torch.zeros(len(starts[0]), len(starts[1]), *grid, dtype=torch.bool)
    for i, top in enumerate(starts[0]):
        for j, left in enumerate(starts[1]):
            covered[i, j, top : top + sides[0], left : left + sides[1]] = True
    return covered.flatten(0, 1)


def choose_window(grid: Grid) -> int:
    """The side, in patches, of the smallest windows of which `WINDOWS` cover the grid."""
    return next(n for n in range(1, max(grid) + 1) if len(windows(grid, n)) <= WINDOWS)


def occlusion(
    model: Model,
    images: Tensor,
    classes: Tensor,
    *,
    window: int | None = None,
    batch_size: int | None = None,
) -> Maps:
    """How much the log-odds of a class fall when a patch is taken away, `[B, rows, columns]` in
    nats (occlusion, arXiv 1311.2901); below 0 where the patch speaks against the class.

    `images`: normalised, `[B, C, H, W]`; `classes`: int64 `[B]`. With a `window` above 1, squares
    of that many patches a side are taken away, half a window apart, and a patch's value is the mean
    over those that hold it; None takes the smallest for which an image needs at most 256 passes: 1
    up to 16 x 16 patches. `batch_size`: so many of them at a time, which changes speed and memory
    only. Raises `PatchwordError` if images or classes do not fit the model.
    """
    classes = checked_classes(model, classes, len(images))
    remove = Removal(model, images, batch_size)
    grid = remove.grid
    away = windows(grid, choose_window(grid) if window is None else window)
    seen = (~away).flatten(1).nonzero()[:, 1].view(len(away), -1)
    which = torch.arange(len(images))
    whole = log_odds(model, remove(which, _all(remove, len(images))), classes)
    which = which.repeat_interleave(len(away))
    rest = log_odds(model, remove(which, seen.repeat(len(images), 1)), classes[which])
    fall = whole[:, None] - rest.view(len(images), len(away))
    masks = away.flatten(1).double()
    return ((fall @ masks) / masks.sum(0)).view(len(images), *grid).numpy()


def _all(remove: Removal, images: int) -> Tensor:
    return torch.arange(remove.patches).expand(images, -1)


def checked_classes(model: Model, classes: Tensor, images: int) -> Tensor:
    """The classes on the CPU. Raises `PatchwordError` unless there is one of the model's classes
    for each image, and two to choose from."""
    count = model.spec.num_classes
    if count < 2 and model.spec.probability == "softmax":
        raise PatchwordError("a model of one class or none chooses nothing that could be explained")
    if classes.shape != (images,) or not ((classes >= 0) & (classes < count)).all():
        raise PatchwordError(f"give {images} classes from 0 to {count - 1}, one for each image")
    return classes.cpu()


@dataclass(frozen=True, kw_only=True)
class Curves:
    """The probability of a class while patches go and come, most important first."""

    shares: Maps
    """`[S]`, of the patches taken away or put in, from 0 to 1"""
    deletion: Maps
    """`[..., S]`, probability with so many taken from the image; falls soon for a good order"""
    insertion: Maps
    """`[..., S]`, probability with so many put into the blank; rises soon for a good order"""

    @property
    def deletion_score(self) -> np.float64 | Maps:
        """`[...]`, area under the deletion curve, 0 to 1: small is good (arXiv 1806.07421)."""
        return np.trapezoid(self.deletion, self.shares)

    @property
    def insertion_score(self) -> np.float64 | Maps:
        """`[...]`, area under the insertion curve, 0 to 1: large is good (arXiv 1806.07421)."""
        return np.trapezoid(self.insertion, self.shares)


def removal_curves(
    model: Model,
    images: Tensor,
    classes: Tensor,
    orders: Tensor,
    *,
    steps: int = STEPS,
    batch_size: int | None = None,
) -> Curves:
    """Deletion and insertion (RISE, arXiv 1806.07421, section 4.2) for orders of the patches.

    `images`: normalised, `[B, C, H, W]`; `classes`: int64 `[B]`; `orders`: int64 `[B, O, N]`, for
    each image O permutations of its patches, most important first. Taken away is as in `occlusion`;
    the blank is the image without any. Curves of `steps` + 1 points, or N + 1 if fewer, `[B, O,
    S]`. Raises `PatchwordError` as `occlusion` does.
    """
    classes = checked_classes(model, classes, len(images))
    remove = Removal(model, images, batch_size)
    count, kinds, patches = orders.shape
    gone = np.unique(np.linspace(0, patches, min(steps, patches) + 1).round().astype(int))
    which = torch.arange(count)
    each = which.repeat_interleave(kinds)

    def probability(which: Tensor, seen: Tensor) -> NDArray[np.float64]:
        probabilities = model.probabilities(remove(which, seen))
        return probabilities.gather(1, classes[which][:, None])[:, 0].numpy()

    ends = [probability(which, _all(remove, count)[:, :n])[:, None] for n in (patches, 0)]
    deletion = np.empty((count, kinds, len(gone)))
    insertion = np.empty_like(deletion)
    deletion[..., 0] = insertion[..., -1] = ends[0]
    deletion[..., -1] = insertion[..., 0] = ends[1]
    for at, n in enumerate(gone[1:-1].tolist(), 1):
        deletion[..., at] = probability(each, orders[:, :, n:].flatten(0, 1)).reshape(count, kinds)
        insertion[..., at] = probability(each, orders[:, :, :n].flatten(0, 1)).reshape(count, kinds)
    return Curves(shares=gone / patches, deletion=deletion, insertion=insertion)
