"""MLP-Mixer (arXiv 2105.01601): a ViT whose attention is an MLP over the patches."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn

from patchword.models.layers import Mlp, PatchEmbedding, drop_path
from patchword.models.model import Model, init_head, init_lecun
from patchword.spec.batch import Outputs
from patchword.spec.model import MixerSpec, PreprocessSpec


class MixerBlock(nn.Module):
    """One Mixer layer (Eq. 1) over `[b, n, D]`, pre-norm: `tokens` is the MLP along the n patches,
    `channels` the one along the D channels."""

    def __init__(
        self,
        patches: int,
        width: int,
        tokens_mlp_width: int,
        channels_mlp_width: int,
        *,
        activation: Literal["gelu", "gelu_tanh"] = "gelu",
        drop_path: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.tokens = Mlp(patches, tokens_mlp_width, activation)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.channels = Mlp(width, channels_mlp_width, activation)
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + drop_path(y, self.drop_path, self.training)
        return x + drop_path(self.channels(self.norm2(x)), self.drop_path, self.training)


class Mixer(Model[MixerSpec]):
    """An MLP-Mixer; see `Model` for what it takes and returns. Its weights are for one number of
    patches, in one order: it takes images of one size only.

    Parameters: `patch_embedding` as a ViT's, `blocks.{i}.norm1`, `tokens`, `norm2` and `channels`
    (`hidden` and `output` each), `norm`, `head`.
    """

    def __init__(
        self,
        spec: MixerSpec,
        *,
        preprocess: PreprocessSpec | None = None,
        classes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(spec, preprocess, classes)
        self.patch_embedding = PatchEmbedding(spec.patch_size, spec.in_channels, spec.width)
        self.blocks = nn.ModuleList(
            MixerBlock(
                math.prod(spec.grid),
                spec.width,
                spec.tokens_mlp_width,
                spec.channels_mlp_width,
                activation=spec.activation,
                drop_path=spec.drop_path * layer / max(spec.depth - 1, 1),
                eps=spec.norm_eps,
            )
            for layer in range(spec.depth)
        )
        self.norm = nn.LayerNorm(spec.width, eps=spec.norm_eps)
        self.head = nn.Linear(spec.width, spec.num_classes) if spec.num_classes else None
        init_weights(self)

    def features(self, images: Tensor) -> Outputs:
        self.check(images)
        x = self.patch_embedding(images)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return Outputs(x.mean(1), x, self.spec.grid)


def init_weights(model: Mixer) -> None:
    """Initialise as the authors' public code does (google-research/vision_transformer,
    models_mixer): every matrix but the head normal truncated at two standard deviations, variance
    1 / fan-in ("LeCun"), biases and head 0, LayerNorm's scale 1."""
    init_lecun(model.patch_embedding.weight)
    nn.init.zeros_(model.patch_embedding.bias)
    for module in model.modules():
        if isinstance(module, Mlp):
            for layer in (module.hidden, module.output):
                init_lecun(layer.weight)
                nn.init.zeros_(layer.bias)
    init_head(model.head)


def part_macs(spec: MixerSpec) -> list[int]:
    """Multiply-accumulates of one image's forward pass, of the patch embedding, each block, and the
    head: the matrix products, not norms, GELU or additions."""
    patches, width = math.prod(spec.grid), spec.width
    embedding = patches * math.prod(spec.patch_size) * spec.in_channels * width
    block = 2 * patches * width * (spec.tokens_mlp_width + spec.channels_mlp_width)
    return [embedding, *[block] * spec.depth, width * spec.num_classes]
