"""timm's names for the tensors of Vision Transformers, DeiTs and hybrids
(timm/models/vision_transformer.py, deit.py, vision_transformer_hybrid.py)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchword.spec.model import StemSpec, ViTSpec
from patchword.weights.mapping import SAME, Op, Rule, Tensors, each, layer, patches, repeated, rule

BLOCK = [
    *layer("blocks.{i}.norm1", "blocks.{i}.norm1"),
    rule("blocks.{i}.attention.qkv.weight", "blocks.{i}.attn.qkv.weight"),
    *layer("blocks.{i}.attention.projection", "blocks.{i}.attn.proj"),
    *layer("blocks.{i}.norm2", "blocks.{i}.norm2"),
    *layer("blocks.{i}.mlp.hidden", "blocks.{i}.mlp.fc1"),
    *layer("blocks.{i}.mlp.output", "blocks.{i}.mlp.fc2"),
]
QKV_BIAS = rule("blocks.{i}.attention.qkv.bias", "blocks.{i}.attn.qkv.bias")
QK_NORM = [
    *layer("blocks.{i}.attention.query_norm", "blocks.{i}.attn.q_norm"),
    *layer("blocks.{i}.attention.key_norm", "blocks.{i}.attn.k_norm"),
]
LAYER_SCALE = [
    rule("blocks.{i}.scale1", "blocks.{i}.ls1.gamma"),
    rule("blocks.{i}.scale2", "blocks.{i}.ls2.gamma"),
]
POOL = [
    rule("pool.probe", "attn_pool.latent"),
    *layer("pool.query", "attn_pool.q"),
    *layer("pool.key_value", "attn_pool.kv"),
    *layer("pool.projection", "attn_pool.proj"),
    *layer("pool.norm", "attn_pool.norm"),
    *layer("pool.mlp.hidden", "attn_pool.mlp.fc1"),
    *layer("pool.mlp.output", "attn_pool.mlp.fc2"),
]
LEFTOVERS = (r"mask_token", r"decoder_.*")
"""of masked pre-training"""

LAYER_EPS, GROUP_EPS, CONV_EPS = 1e-6, 1e-5, 1e-8
"""of most of timm's LayerNorms, of its GroupNorms, and of its weight standardisation, added to the
variance"""
STEM = "patch_embed.backbone."


@dataclass(frozen=True)
class TokenLayout:
    """What timm's tensors hold beyond what the spec says."""

    tokens: tuple[tuple[str, int], ...]
    """the tokens before the patches, by name, and how many each is"""
    embedded: bool
    """the position table begins with those tokens"""
    norm: str = "norm"
    qkv_bias: bool = True

    @property
    def prefix(self) -> int:
        return sum(number for _, number in self.tokens)


def rules_for(spec: ViTSpec, layout: TokenLayout) -> list[Rule]:
    stride, channels = 1, spec.in_channels
    stem: list[Rule] = []
    if spec.stem is not None:
        stride, channels = spec.stem.stride, spec.stem.channels
        stem = stem_rules(spec.stem)
    patch = (spec.patch_size[0] // stride, spec.patch_size[1] // stride)
    block = list(BLOCK)
    block += [QKV_BIAS] if layout.qkv_bias else []
    block += QK_NORM if spec.qk_norm else []
    block += LAYER_SCALE if spec.layer_scale is not None else []
    rules = [
        *stem,
        *layer("patch_embedding", "patch_embed.proj", patches(patch, channels)),
        *token_rules(spec, layout),
        *repeated(block, spec.depth),
        *layer("norm", layout.norm),
    ]
    if not layout.qkv_bias:
        rules += repeated([_zero_bias(spec.width)], spec.depth)
    rules += POOL if spec.pool == "map" else []
    if spec.num_classes:
        rules += layer("head", "head")
        rules += layer("pre_logits", "pre_logits.fc") if spec.head == "mlp" else []
        if spec.distillation == "head":
            rules += layer("distillation_head", "head_dist")
    return rules


def _zero_bias(width: int) -> Rule:
    """Ours has a bias that theirs leaves out; read only."""
    return Rule(
        ("blocks.{i}.attention.qkv.bias",),
        (),
        Op(lambda _: [torch.zeros(3 * width)], lambda _: []),
    )


def token_rules(spec: ViTSpec, layout: TokenLayout) -> list[Rule]:
    """Tokens and their positions. Ours gives registers no position: theirs, where they have one,
    becomes part of the register. Theirs may give none to any token (`no_embed_class`)."""
    ours = [("class_token", int(spec.pool == "token"))]
    ours += [("distillation_token", int(spec.distillation != "none"))]
    ours += [("registers", spec.registers)]
    ours = [(name, number) for name, number in ours if number]
    positions = spec.position != "none"
    if not layout.tokens:
        return [rule("positions.0.table", "pos_embed")] if positions else []
    names = tuple(name for name, _ in ours), tuple(name for name, _ in layout.tokens)
    sizes = [number for _, number in ours], [number for _, number in layout.tokens]
    leading, prefix = spec.leading, layout.prefix
    last = (("positions.0.table",), ("pos_embed",)) if positions else ((), ())

    def read(tensors: Tensors) -> Tensors:
        tokens = torch.cat(tensors[: len(sizes[1])], dim=1)
        if not positions:
            return list(tokens.split(sizes[0], dim=1))
        table, at = tensors[-1], prefix if layout.embedded else 0
        positions_of = table[:, :at] if layout.embedded else torch.zeros_like(tokens)
        registers = tokens[:, leading:] + positions_of[:, leading:]
        tokens = torch.cat([tokens[:, :leading], registers], dim=1)
        whole = torch.cat([positions_of[:, :leading], table[:, at:]], dim=1)
        return [*tokens.split(sizes[0], dim=1), whole]

    def write(tensors: Tensors) -> Tensors:
        tokens = torch.cat(tensors[: len(sizes[0])], dim=1)
        parts = [part.clone() for part in tokens.split(sizes[1], dim=1)]
        if not positions:
            return parts
        first, patch = tensors[-1][:, :leading], tensors[-1][:, leading:]
        if layout.embedded:
            none = first.new_zeros(1, prefix - leading, first.shape[2])
            patch = torch.cat([first, none, patch], dim=1)
        return [*parts, patch]

    return [Rule(names[0] + last[0], names[1] + last[1], Op(read, write))]


def stem_rules(spec: StemSpec) -> list[Rule]:
    """The ResNet of a hybrid."""
    filters = same_filters(spec.weight_eps, spec.weight_eps_in)
    root = f"{STEM}stem." if spec.layers else STEM
    return [
        rule("stem.root.weight", f"{root}conv.weight", filters),
        *layer("stem.root_norm", f"{root}norm"),
        *stage_rules(spec.layers, "stem.", STEM, filters, down_norm=True),
    ]


def stage_rules(
    layers: Sequence[int], ours: str, theirs: str, filters: Op, *, down_norm: bool
) -> list[Rule]:
    """Stages of so many bottleneck blocks; the first of each has a convolution beside it, and a
    norm after that if `down_norm`."""
    rules: list[Rule] = []
    for stage, blocks in enumerate(layers):
        to, of = f"{ours}stages.{stage}.", f"{theirs}stages.{stage}.blocks."
        for i, k in itertools.product(range(blocks), (1, 2, 3)):
            rules.append(rule(f"{to}{i}.conv{k}.weight", f"{of}{i}.conv{k}.weight", filters))
            rules += layer(f"{to}{i}.norm{k}", f"{of}{i}.norm{k}")
        down = f"{of}0.downsample"
        rules.append(rule(f"{to}0.downsample.weight", f"{down}.conv.weight", filters))
        rules += layer(f"{to}0.downsample_norm", f"{down}.norm") if down_norm else []
    return rules


def same_filters(eps: float, eps_in: str) -> Op:
    """Filters whose standardisation with another eps than timm's gives the same: scaled, which
    standardisation undoes but for eps. The filters themselves if eps is timm's."""
    if (eps, eps_in) == (CONV_EPS, "variance"):
        return SAME

    def write(weight: Tensor) -> Tensor:
        flat = weight.double().flatten(1)
        std = flat.std(1, correction=0)
        added = eps if eps_in == "variance" else 2 * eps * std + eps * eps
        scale = torch.full_like(std, CONV_EPS).div(added).sqrt()
        return (flat * scale[:, None]).to(weight.dtype).view_as(weight)

    return each(lambda weight: weight, write)
