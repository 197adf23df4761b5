"""The Vision Transformer (paper section 3.1, Eq. 1-8) and the hybrid, a ViT with a ResNet stem."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from patchword.models.layers import (
    AttentionPool,
    Block,
    Mlp,
    PatchEmbedding,
    SelfAttention,
    drop,
    drop_patches,
    kept_patches,
)
from patchword.models.model import Model, init_head, init_lecun, init_linear
from patchword.models.position import PositionRule, PositionTable, create_position
from patchword.models.resnet import ResNetStem, stem_macs
from patchword.spec.batch import Outputs
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
        init_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        self.check(images)
        x = self.embed(images)
        if self.spec.pool == "token":  # no patch's token of the last block is used
            x = self.encode(x, wanted=self.spec.leading)
            logits = self.classify(x[:, 0])
            if self.distillation_head is not None:
                logits = (logits + self.distillation_head(x[:, 1])) / 2
            return logits
        return self.classify(self._pooled(self.encode(x)))

    def features(self, images: Tensor) -> Outputs:
        self.check(images)
        x = self.encode(self.embed(images))
        return Outputs(self._pooled(x), x[:, self.spec.prefix :], self.spec.grid)

    def pooled_features(self, images: Tensor) -> Tensor:
        self.check(images)
        if self.spec.pool == "token":  # as in `forward`
            return self.encode(self.embed(images), wanted=self.spec.leading)[:, 0]
        return self._pooled(self.encode(self.embed(images)))

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
        return self.placed(self.patches(images))

    def patches(self, images: Tensor) -> Tensor:
        """The patch embeddings alone, `[B, C, H, W]` to `[B, N, D]`, without positions."""
        return self.patch_embedding(images if self.stem is None else self.stem(images))

    def placed(self, x: Tensor) -> Tensor:
        """Patch embeddings `[B, N, D]` with the tokens before them and the positions added, `[B,
        prefix + N, D]`."""
        firsts = [
            tokens.expand(len(x), -1, -1)
            for tokens in (self.class_token, self.distillation_token, self.registers)
            if tokens is not None
        ]
        x = torch.cat([*firsts, x], dim=1) if firsts else x
        position = self.positions[0] if len(self.positions) else None
        if isinstance(position, PositionTable):
            x = x + self._placed(position())
        if self.training and self.spec.patch_dropout:
            x = drop_patches(x, self.spec.prefix, self.spec.patch_dropout)
        return drop(x, self.spec.dropout, self.training)

    def encode(self, x: Tensor, wanted: int | None = None) -> Tensor:
        """Eq. 2-4: the blocks and the last LayerNorm, `[B, T, D]` to `[B, T, D]`, or with `wanted`
        to the first so many tokens, for which the last block computes no others."""
        for layer, block in enumerate(self.blocks):
            x, rule = self.positioned(x, layer)
            x = block(x, wanted if layer == self.spec.depth - 1 else None, rule)
        return x if self.spec.pool_norm else self.norm(x)

    def positioned(self, x: Tensor, layer: int) -> tuple[Tensor, PositionRule | None]:
        """What a block (0 first) takes: the tokens `[B, T, D]` with the position table added that
        acts there, and the position rule for its attention, or None."""
        position = self.position_in(layer)
        if isinstance(position, PositionTable) and layer:  # that of layer 0 is in Eq. 1
            x = x + self._placed(position())
        return x, position if isinstance(position, PositionRule) else None

    def position_in(self, layer: int) -> nn.Module | None:
        """The position embedding that acts in a layer (0 first), or None."""
        spec = self.spec
        everywhere = spec.position_at != "stem" or spec.position == "rotary"
        if not len(self.positions) or (layer and not everywhere):
            return None
        return self.positions[layer if len(self.positions) > 1 else 0]

    def _placed(self, table: Tensor) -> Tensor:
        """A position table `[1, t, D]` with zeros for the tokens before the patches that it leaves
        out: `[1, prefix + N, D]`."""
        patches = math.prod(self.spec.grid)
        missing = self.spec.prefix + patches - table.shape[1]
        if not missing:
            return table
        first = table.shape[1] - patches
        zeros = table.new_zeros(1, missing, table.shape[2])
        return torch.cat([table[:, :first], zeros, table[:, first:]], dim=1)

    def represent(self, pooled: Tensor) -> Tensor:
        return pooled if self.pre_logits is None else torch.tanh(self.pre_logits(pooled))


def _tokens(count: int, width: int) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(1, count, width)) if count else None


def _hidden(spec: ViTSpec) -> int:
    """Units of the hidden layer of a head that has one."""
    return spec.width if spec.head_width is None else spec.head_width


def init_weights(model: ViT) -> None:
    """Initialise as the authors' public code does (google-research/vision_transformer, models_vit).

    Patch embedding and pre-logits layer: normal truncated at two standard deviations, variance
    1 / fan-in ("LeCun"), biases 0. Attention: Xavier uniform, variance 1 / D, for q, k, v and the
    projection each on their own, biases 0. MLP: Xavier uniform, variance 2 / (D + hidden), biases
    normal with standard deviation 1e-6. Position parameters, registers and distillation token:
    normal, 0.02. Class token and heads: 0. LayerNorm: scale 1, bias 0. LayerScale: its initial
    value. A hybrid's stem: as `ResNetStem` says.
    """
    for module in model.modules():
        if isinstance(module, SelfAttention):
            for part in module.qkv.weight.chunk(3):
                nn.init.xavier_uniform_(part)
            nn.init.zeros_(module.qkv.bias)
            init_linear(module.projection)
        elif isinstance(module, AttentionPool):
            nn.init.xavier_uniform_(module.probe[0])
            for part in module.key_value.weight.chunk(2):
                nn.init.xavier_uniform_(part)
            nn.init.zeros_(module.key_value.bias)
            init_linear(module.query)
            init_linear(module.projection)
        elif isinstance(module, Mlp):
            for layer in (module.hidden, module.output):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.normal_(layer.bias, std=1e-6)
        elif isinstance(module, Block):
            for scale in (module.scale1, module.scale2):
                if scale is not None:
                    nn.init.constant_(scale, model.spec.layer_scale or 0.0)
    init_lecun(model.patch_embedding.weight)
    nn.init.zeros_(model.patch_embedding.bias)
    if model.class_token is not None:
        nn.init.zeros_(model.class_token)
    for table in (*model.positions.parameters(), model.registers, model.distillation_token):
        if table is not None:
            nn.init.normal_(table, std=0.02)
    if model.pre_logits is not None:
        init_lecun(model.pre_logits.weight)
        nn.init.zeros_(model.pre_logits.bias)
    init_head(model.head)
    init_head(model.distillation_head)


def part_macs(spec: ViTSpec, training: bool = False) -> list[int]:
    """Multiply-accumulates of one image's forward pass, of the embedding with a hybrid's stem, each
    block, and the head with its pooling; in `training` without the patches that are dropped.

    The matrix products of Eq. 1-8 and of the head, not norms, softmax, GELU or additions; of a
    hybrid, its convolutions too. `forward` needs fewer with a class token: it leaves out what the
    last block would compute for the patches.
    """
    patches, width, hidden = math.prod(spec.grid), spec.width, spec.mlp_width
    if spec.stem is None:
        stem = patches * math.prod(spec.patch_size) * spec.in_channels * width
    else:
        pixels = math.prod(spec.patch_size) // spec.stem.stride**2
        stem = stem_macs(spec.stem, spec.image_size, spec.in_channels)
        stem += patches * pixels * spec.stem.channels * width
    tokens = spec.prefix + (kept_patches(patches, spec.patch_dropout) if training else patches)
    mlp = (3 if spec.activation == "swiglu" else 2) * width * hidden
    blocks = [tokens * (4 * width * width + mlp) + 2 * tokens * tokens * width] * spec.depth
    if spec.position == "relative":
        for layer in range(1 if spec.position_at == "stem" else spec.depth):
            blocks[layer] += tokens * (2 * tokens - 1) * width
    return [stem, *blocks, _head_macs(spec, tokens, mlp)]


def _head_macs(spec: ViTSpec, tokens: int, mlp: int) -> int:
    """Of attention pooling over so many tokens, `mlp` for each that it gives, and the heads."""
    width, pool = spec.width, 0
    if spec.pool == "map":
        pool = 2 * tokens * width * width + 2 * width * width  # k and v, q and projection
        pool += 2 * tokens * width + mlp
    pooled = 2 * width if spec.pool == "token+gap" else width
    head = (_hidden(spec) if spec.head == "mlp" else pooled) * spec.num_classes
    if spec.head == "mlp" and spec.num_classes:
        head += pooled * _hidden(spec)
    if spec.distillation == "head":
        head += width * spec.num_classes
    return pool + head
