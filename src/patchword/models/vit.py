"""The Vision Transformer (paper section 3.1, Eq. 1-8)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from patchword.models.layers import AttentionPool, Block, Mlp, PatchEmbedding, SelfAttention, drop
from patchword.models.position import sincos_2d
from patchword.parsing import PatchwordError
from patchword.specs import PreprocessSpec, ViTSpec
from patchword.types import Outputs


class ViT(nn.Module):
    """A Vision Transformer as its `spec` describes it.

    `model(images)`: float `[B, C, H, W]`, normalised by `preprocess.mean` and `.std`, to logits
    `[B, K]`, or to the pooled features `[B, D]` if the spec has no classes. `classes` names the
    logits; it is empty if nobody has named them.
    """

    def __init__(
        self,
        spec: ViTSpec,
        *,
        preprocess: PreprocessSpec | None = None,
        classes: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.spec = spec
        self.preprocess = preprocess or PreprocessSpec()
        self.classes = classes
        width, patches = spec.width, math.prod(spec.grid)
        token = spec.pool == "token"
        self.patch_embedding = PatchEmbedding(spec.patch_size, spec.in_channels, width)
        self.class_token = nn.Parameter(torch.empty(1, 1, width)) if token else None
        self.registers = (
            nn.Parameter(torch.empty(1, spec.registers, width)) if spec.registers else None
        )
        learned = spec.position == "learned"
        self.position_embedding = (
            nn.Parameter(torch.empty(1, token + patches, width)) if learned else None
        )
        fixed = sincos_2d(spec.grid, width) if spec.position == "sincos2d" else None
        self.register_buffer("fixed_position", fixed, persistent=False)
        self.fixed_position: Tensor | None
        self.blocks = nn.ModuleList(
            Block(
                width,
                spec.heads,
                spec.mlp_width,
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
            AttentionPool(width, spec.heads, spec.mlp_width, spec.norm_eps)
            if spec.pool == "map"
            else None
        )
        classified = spec.num_classes > 0
        self.pre_logits = nn.Linear(width, width) if classified and spec.head == "mlp" else None
        self.head = nn.Linear(width, spec.num_classes) if classified else None
        init_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        self._check(images)
        x = self.embed(images)
        if self.spec.pool == "token":  # no other token of the last block is used
            return self.classify(self.encode(x, wanted=1)[:, 0])
        return self.classify(self._pooled(self.encode(x)))

    def features(self, images: Tensor) -> Outputs:
        """Pooled features `[B, D]`, tokens `[B, N, D]`, and the grid, of images `[B, C, H, W]`.

        Raises `PatchwordError` if the images are not of the size the model is for.
        """
        self._check(images)
        x = self.encode(self.embed(images))
        return Outputs(self._pooled(x), x[:, self.spec.prefix :], self.spec.grid)

    def _check(self, images: Tensor) -> None:
        spec = self.spec
        if tuple(images.shape[1:]) != (spec.in_channels, *spec.image_size):
            raise PatchwordError(
                f"images are {list(images.shape)}, the model takes [B, {spec.in_channels}, "
                f"{spec.image_size[0]}, {spec.image_size[1]}]; resize them, or load the model "
                "with image_size=(height, width)"
            )

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            return self.pool(x)
        if self.spec.pool == "gap":
            return x[:, self.spec.prefix :].mean(1)
        return x[:, 0]  # Eq. 4

    def embed(self, images: Tensor) -> Tensor:
        """Eq. 1: `[B, C, H, W]` to `[B, prefix + N, D]`, the class token first, then registers."""
        x = self.patch_embedding(images)
        b = x.shape[0]
        if self.fixed_position is not None:
            x = x + self.fixed_position.to(x.dtype)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(b, -1, -1), x], dim=1)
        if self.position_embedding is not None:
            x = x + self.position_embedding
        if self.registers is not None:
            first = x.shape[1] - math.prod(self.spec.grid)
            x = torch.cat([x[:, :first], self.registers.expand(b, -1, -1), x[:, first:]], dim=1)
        return drop(x, self.spec.dropout, self.training)

    def encode(self, x: Tensor, wanted: int | None = None) -> Tensor:
        """Eq. 2-4: the blocks and the last LayerNorm, `[B, T, D]` to `[B, T, D]`, or with `wanted`
        to the first so many tokens, for which the last block computes no others."""
        for block in self.blocks[:-1]:
            x = block(x)
        return self.norm(self.blocks[-1](x, wanted))

    def classify(self, pooled: Tensor) -> Tensor:
        """The head: `[B, D]` to logits `[B, K]`; the identity if the spec has no classes."""
        if self.pre_logits is not None:
            pooled = torch.tanh(self.pre_logits(pooled))
        return pooled if self.head is None else self.head(pooled)


def init_weights(model: ViT) -> None:
    """Initialise as the authors' public code does (google-research/vision_transformer, models_vit).

    Patch embedding and pre-logits layer: normal truncated at two standard deviations, variance
    1 / fan-in ("LeCun"), biases 0. Attention: Xavier uniform, variance 1 / D, for q, k, v and the
    projection each on their own, biases 0. MLP: Xavier uniform, variance 2 / (D + hidden), biases
    normal with standard deviation 1e-6. Position table and registers: normal, 0.02. Class token
    and head: 0. LayerNorm: scale 1, bias 0. LayerScale: its initial value.
    """
    for module in model.modules():
        if isinstance(module, SelfAttention):
            for part in module.qkv.weight.chunk(3):
                nn.init.xavier_uniform_(part)
            nn.init.zeros_(module.qkv.bias)
            _xavier(module.projection)
        elif isinstance(module, AttentionPool):
            nn.init.xavier_uniform_(module.probe[0])
            for part in module.key_value.weight.chunk(2):
                nn.init.xavier_uniform_(part)
            nn.init.zeros_(module.key_value.bias)
            _xavier(module.query)
            _xavier(module.projection)
        elif isinstance(module, Mlp):
            for layer in (module.hidden, module.output):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.normal_(layer.bias, std=1e-6)
        elif isinstance(module, Block):
            for scale in (module.scale1, module.scale2):
                if scale is not None:
                    nn.init.constant_(scale, model.spec.layer_scale or 0.0)
    _lecun(model.patch_embedding.weight)
    nn.init.zeros_(model.patch_embedding.bias)
    if model.class_token is not None:
        nn.init.zeros_(model.class_token)
    for table in (model.position_embedding, model.registers):
        if table is not None:
            nn.init.normal_(table, std=0.02)
    if model.pre_logits is not None:
        _lecun(model.pre_logits.weight)
        nn.init.zeros_(model.pre_logits.bias)
    if model.head is not None:
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)


def _xavier(layer: nn.Linear) -> None:
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)


def _lecun(weight: Tensor) -> None:
    """Truncated normal whose standard deviation after truncation is 1 / sqrt(fan-in)."""
    std = 1 / (0.87962566103423978 * math.sqrt(weight.shape[1]))
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def macs(spec: ViTSpec) -> int:
    """Multiply-accumulates of one image's forward pass: the matrix products of Eq. 1-8 and of the
    head, not norms, softmax, GELU or additions. `forward` needs fewer with a class token: it leaves
    out what the last block would compute for the other tokens."""
    patches, width, hidden = math.prod(spec.grid), spec.width, spec.mlp_width
    tokens = patches + spec.prefix
    stem = patches * math.prod(spec.patch_size) * spec.in_channels * width
    block = tokens * (4 * width * width + 2 * width * hidden) + 2 * tokens * tokens * width
    pool = 0
    if spec.pool == "map":
        pool = 2 * tokens * width * width + 2 * width * width  # k and v, q and projection
        pool += 2 * tokens * width + 2 * width * hidden
    head = width * spec.num_classes
    if spec.head == "mlp" and spec.num_classes:
        head += width * width
    return stem + spec.depth * block + pool + head


def exaflops(spec: ViTSpec, images: int) -> float:
    """Training cost: 6 x MACs x images / 1e18, for forward and backward, two operations a MAC
    (section 4.4)."""
    return 6 * macs(spec) * images / 1e18
