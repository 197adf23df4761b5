"""MLP-Mixer (arXiv 2105.01601): a ViT whose attention is an MLP over the patches."""

from __future__ import annotations

import math
from typing import Literal, cast

from torch import Tensor, nn

from patchword.models.layers import Mlp, PatchEmbedding, drop_path
from patchword.models.model import Model, init_head, init_lecun
from patchword.spec.batch import Outputs
from patchword.spec.model import MixerSpec, PreprocessSpec
from patchword.spec.parse import PatchwordError


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

    def init_weights(self) -> None:
        for mlp in (self.tokens, self.channels):
            for layer in (mlp.hidden, mlp.output):
                init_lecun(layer.weight)
                nn.init.zeros_(layer.bias)

    def macs(self, patches: int) -> int:
        """Multiply-accumulates for one image of so many patches."""
        return self.tokens.macs(self.norm1.normalized_shape[0]) + self.channels.macs(patches)


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
        self.init_weights()

    def features(self, images: Tensor) -> Outputs:
        self.check(images)
        x = self.patch_embedding(images)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return Outputs(x.mean(1), x, self.spec.grid)

    def check(self, images: Tensor) -> None:
        """Raises `PatchwordError` unless `images` are `[B, C, H, W]` of the spec's size."""
        size = (self.spec.in_channels, *self.spec.image_size)
        if tuple(images.shape[1:]) != size:
            raise PatchwordError(
                f"images are {list(images.shape)}, the model takes [B, {size[0]}, {size[1]}, "
                f"{size[2]}], a Mixer no other size; resize or convert them"
            )

    def init_weights(self) -> None:
        """Initialise as the authors' public code does (google-research/vision_transformer,
        models_mixer): every matrix but the head normal truncated at two standard deviations,
        variance 1 / fan-in ("LeCun"), biases and head 0, LayerNorm's scale 1."""
        self.patch_embedding.init_weights()
        for block in self.blocks:
            cast(MixerBlock, block).init_weights()
        init_head(self.head)

    def part_macs(self, training: bool = False) -> list[int]:
        """Of the products of patch embedding, MLPs and head, not norms, GELU or additions."""
        patches = math.prod(self.spec.grid)
        blocks = [cast(MixerBlock, block).macs(patches) for block in self.blocks]
        head = 0 if self.head is None else self.head.weight.numel()
        return [self.patch_embedding.macs(patches), *blocks, head]
