"""The Vision Transformer (paper section 3.1, Eq. 1-8) and the hybrid, a ViT with a ResNet stem."""

from __future__ import annotations

import math
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from patchword.models.attention import Rule, drop
from patchword.models.layers import AttentionPool, Block, PatchEmbedding, drop_patches, kept_patches
from patchword.models.model import Model, init_head, init_lecun
from patchword.models.position import PositionRule, Relative, create_position
from patchword.models.resnet import ResNetStem
from patchword.spec.batch import Grid, Outputs
from patchword.spec.model import PreprocessSpec, ViTSpec


class ViT(Model[ViTSpec]):
    """A Vision Transformer; see `Model` for what it takes and returns."""

    HEADS = ("head.", "pre_logits.", "distillation_head.")

    def __init__(
        self,
        spec: ViTSpec,
        *,
        preprocess: PreprocessSpec | None = None,
        classes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(spec, preprocess, classes)
        width = spec.width
        self.stem = None if spec.stem is None else ResNetStem(spec.stem, spec.in_channels)
        stride, channels = (
            (1, spec.in_channels) if spec.stem is None else (spec.stem.stride, spec.stem.channels)
        )
        patch = (spec.patch_size[0] // stride, spec.patch_size[1] // stride)
        self.patch_embedding = PatchEmbedding(patch, channels, width)
        self.class_token = _tokens(int(spec.pool in ("token", "token+gap")), width)
        self.distillation_token = _tokens(int(spec.distillation != "none"), width)
        self.registers = _tokens(spec.registers, width)
        tables = 0 if spec.position == "none" else 1
        if spec.position_at == "every" and spec.position != "rotary":
            tables *= spec.depth
        self.positions = nn.ModuleList(create_position(spec) for _ in range(tables))
        self.blocks = nn.ModuleList(
            Block(
                width,
                spec.heads,
                spec.mlp_width,
                activation=spec.activation,
                dropout=spec.dropout,
                drop_path=spec.drop_path * layer / max(spec.depth - 1, 1),
                layer_scale=spec.layer_scale,
                qk_norm=spec.qk_norm,
                eps=spec.norm_eps,
            )
            for layer in range(spec.depth)
        )
        self.norm = nn.LayerNorm(width, eps=spec.norm_eps)
        self.pool = (
            AttentionPool(width, spec.heads, spec.mlp_width, spec.activation, spec.norm_eps)
            if spec.pool == "map"
            else None
        )
        classified = spec.num_classes > 0
        pooled = 2 * width if spec.pool == "token+gap" else width
        hidden = _hidden(spec) if spec.head == "mlp" else pooled
        self.pre_logits = nn.Linear(pooled, hidden) if classified and spec.head == "mlp" else None
        self.head = nn.Linear(hidden, spec.num_classes) if classified else None
        self.distillation_head = (
            nn.Linear(width, spec.num_classes)
            if classified and spec.distillation == "head"
            else None
        )
        self.init_weights()

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self._encoded(images, self.read))

    def features(self, images: Tensor) -> Outputs:
        x = self._encoded(images)
        return Outputs(self._pooled(x), x[:, self.spec.prefix :], self.grid_of(images))

    def pooled_features(self, images: Tensor) -> Tensor:
        return self._pooled(self._encoded(images, self.read))

    def _encoded(self, images: Tensor, first: int | None = None) -> Tensor:
        self.check(images)
        return self.encode(self.embed(images), self.grid_of(images), first)

    @property
    def read(self) -> int | None:
        """The head reads so many tokens, the first ones; None for all."""
        return self.spec.leading if self.spec.pool == "token" else None

    def logits(self, x: Tensor) -> Tensor:
        """Encoded tokens `[B, T, D]`, or the `read` first of them, to logits `[B, K]`: Eq. 4 and
        the head, with a head for distillation the mean of both."""
        logits = self.classify(self._pooled(x))
        if self.distillation_head is not None:
            logits = (logits + self.distillation_head(x[:, 1])) / 2
        return logits

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            return self.pool(x)
        if self.spec.pool == "token":
            return x[:, 0]  # Eq. 4
        average = x[:, self.spec.prefix :].mean(1)
        if self.spec.pool == "token+gap":
            return torch.cat([x[:, 0], average], dim=-1)
        return self.norm(average) if self.spec.pool_norm else average

    def embed(self, images: Tensor) -> Tensor:
        """Eq. 1: `[B, C, H, W]` to `[B, prefix + N, D]`: class token, distillation token,
        registers, patches."""
        return self.assemble(self.patches(images), self.grid_of(images))

    def patches(self, images: Tensor) -> Tensor:
        """The patch embeddings alone, `[B, C, H, W]` to `[B, N, D]`, without positions."""
        return self.patch_embedding(images if self.stem is None else self.stem(images))

    def assemble(self, x: Tensor, grid: Grid) -> Tensor:
        """Patch embeddings `[B, N, D]` of a grid with the tokens before them and the positions
        added, `[B, prefix + N, D]`."""
        firsts = [
            tokens.expand(x.shape[0], -1, -1)
            for tokens in (self.class_token, self.distillation_token, self.registers)
            if tokens is not None
        ]
        x = torch.cat([*firsts, x], dim=1) if firsts else x
        table, _ = self.positions_of(None, grid)
        x = x if table is None else x + table
        if self.training and self.spec.patch_dropout:
            x = drop_patches(x, self.spec.prefix, self.spec.patch_dropout)
        return drop(x, self.spec.dropout, self.training)

    def encode(self, x: Tensor, grid: Grid, first: int | None = None) -> Tensor:
        """Eq. 2-4: the blocks and the last LayerNorm, `[B, T, D]` to `[B, T, D]`, or with `first`
        to the first so many tokens, for which the last block computes no others."""
        for layer, block in enumerate(self.blocks):
            table, rule = self.positions_of(layer, grid)
            x = x if table is None else x + table
            x = block(x, rule, first if layer == self.spec.depth - 1 else None)
        return self.normed(x)

    def normed(self, x: Tensor) -> Tensor:
        """The last LayerNorm, where it does not come after the pooling."""
        return x if self.spec.pool_norm else self.norm(x)

    def positions_of(self, layer: int | None, grid: Grid) -> tuple[Tensor | None, Rule | None]:
        """(table, rule) of a layer (0 first) for a grid of patches: what is added to the tokens
        that it takes, `[1, prefix + N, D]`, 0 for those without a position, and what acts in its
        attention; None for what is not there. Layer None is Eq. 1, which adds layer 0's table."""
        everywhere = self.spec.position_at != "stem" or self.spec.position == "rotary"
        if not len(self.positions) or (layer and not everywhere):
            return None, None
        position = self.positions[layer or 0 if len(self.positions) > 1 else 0]
        if isinstance(position, PositionRule):
            return None, partial(position, grid=grid)
        if layer == 0:
            return None, None
        table: Tensor = position(grid)
        first = table.shape[1] - math.prod(grid)
        if first == self.spec.prefix:
            return table, None
        zeros = table.new_zeros(1, self.spec.prefix - first, table.shape[2])
        return torch.cat([table[:, :first], zeros, table[:, first:]], dim=1), None

    def represent(self, pooled: Tensor) -> Tensor:
        return pooled if self.pre_logits is None else torch.tanh(self.pre_logits(pooled))

    def init_weights(self) -> None:
        """Initialise as the authors' public code does (google-research/vision_transformer,
        models_vit), layer by layer, the blocks first.

        Patch embedding and pre-logits layer: normal truncated at two standard deviations, variance
        1 / fan-in ("LeCun"), biases 0. Attention: Xavier uniform, variance 1 / D, for q, k, v and
        the projection each on their own, biases 0. MLP: Xavier uniform, variance 2 / (D + hidden),
        biases normal with standard deviation 1e-6. Position parameters, registers and distillation
        token: normal, 0.02. Class token and heads: 0. LayerNorm: scale 1, bias 0. LayerScale: its
        initial value. A hybrid's stem: as `ResNetStem` says.
        """
        for block in self.blocks:
            cast(Block, block).init_weights()
        if self.pool is not None:
            self.pool.init_weights()
        self.patch_embedding.init_weights()
        if self.class_token is not None:
            nn.init.zeros_(self.class_token)
        for table in (*self.positions.parameters(), self.registers, self.distillation_token):
            if table is not None:
                nn.init.normal_(table, std=0.02)
        if self.pre_logits is not None:
            init_lecun(self.pre_logits.weight)
            nn.init.zeros_(self.pre_logits.bias)
        init_head(self.head)
        init_head(self.distillation_head)

    def part_macs(self, training: bool = False) -> list[int]:
        """Of the matrix products of Eq. 1-8 and of the head, not norms, softmax, GELU or additions;
        of a hybrid, its convolutions too. `forward` needs fewer with a class token: it leaves out
        what the last block would compute for the patches."""
        spec, patches = self.spec, math.prod(self.spec.grid)
        kept = kept_patches(patches, spec.patch_dropout) if training else patches
        tokens = spec.prefix + kept
        stem = 0 if self.stem is None else self.stem.macs(spec.image_size)
        parts = [stem + self.patch_embedding.macs(patches)]
        parts += [cast(Block, block).macs(tokens) for block in self.blocks]
        if spec.position == "relative":
            for layer in range(1 if spec.position_at == "stem" else spec.depth):
                parts[1 + layer] += cast(Relative, self.positions[0]).macs(tokens, spec.heads)
        pool = 0 if self.pool is None else self.pool.macs(tokens)
        heads = (self.pre_logits, self.head, self.distillation_head)
        return [*parts, pool + sum(head.weight.numel() for head in heads if head is not None)]


def _tokens(count: int, width: int) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(1, count, width)) if count else None


def _hidden(spec: ViTSpec) -> int:
    """Units of the hidden layer of a head that has one."""
    return spec.width if spec.head_width is None else spec.head_width
