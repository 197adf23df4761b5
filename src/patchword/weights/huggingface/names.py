"""The names of Hugging Face transformers: ViT, DeiT, DINOv2, ViT-MAE and SigLIP's vision tower.

Version 5 renamed the parts of its blocks in memory; files, on the hub and from its own
`save_pretrained`, keep the older names. Both are read, the older ones are written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from patchword.spec.model import ViTSpec
from patchword.weights.mapping import (
    JOINED,
    SAME,
    Op,
    Rule,
    joined,
    layer,
    patches,
    prefixed,
    repeated,
    rule,
    viewed,
)


@dataclass(frozen=True, kw_only=True)
class PartNames:
    """What a family calls its parts, each a layer with weight and bias unless it says otherwise."""

    block: str
    norms: tuple[str, str]
    attention: tuple[str, ...]
    """query, key, value, projection"""
    hidden: tuple[str, ...]
    """two where SwiGLU's gate and value are apart"""
    output: str
    scales: tuple[str, ...] = ()
    """tensors"""
    activation: str | None = None
    """where no other is possible"""
    patch: str = "embeddings.patch_embeddings.projection"
    position: str = "embeddings.position_embeddings"
    """a tensor"""
    norm: str = "layernorm"


_ATTENTION = (
    *(f"attention.attention.{n}" for n in ("query", "key", "value")),
    "attention.output.dense",
)
_5: dict[str, Any] = {"attention": tuple(f"attention.{n}_proj" for n in "qkvo")}
_VIT = PartNames(
    block="encoder.layer.{i}.",
    norms=("layernorm_before", "layernorm_after"),
    attention=_ATTENTION,
    hidden=("intermediate.dense",),
    output="output.dense",
)
_DINO = PartNames(
    block="encoder.layer.{i}.",
    norms=("norm1", "norm2"),
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    attention=_ATTENTION,
    hidden=("mlp.fc1",),
    output="mlp.fc2",
)
_SWIGLU = replace(_DINO, activation="swiglu", hidden=("mlp.weights_in",), output="mlp.weights_out")
_SWIGLU_5: dict[str, Any] = {"hidden": ("mlp.gate_proj", "mlp.up_proj"), "output": "mlp.down_proj"}
PARTS = {
    "vit": _VIT,
    "vit, version 5": replace(
        _VIT, **_5, block="layers.{i}.", hidden=("mlp.fc1",), output="mlp.fc2"
    ),
    "dinov2": _DINO,
    "dinov2, version 5": replace(_DINO, **_5),
    "dinov2 swiglu": _SWIGLU,
    "dinov2 swiglu, version 5": replace(_SWIGLU, **_5, **_SWIGLU_5),
    "siglip": PartNames(
        block="encoder.layers.{i}.",
        norms=("layer_norm1", "layer_norm2"),
        attention=tuple(f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "out_proj")),
        hidden=("mlp.fc1",),
        output="mlp.fc2",
        patch="embeddings.patch_embedding",
        position="embeddings.position_embedding.weight",
        norm="post_layernorm",
    ),
}

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
}
"""Their names of activations; of each of ours, the first is written."""

QUERY_FIRST = Op(
    lambda ts: list(ts[0].split([len(ts[0]) // 3, len(ts[0]) // 3 * 2])),
    lambda ts: [torch.cat(ts)],
)
"""q, k and v joined in theirs; ours has the query apart."""
NO_BIAS = Op(
    lambda ts: [torch.cat(ts), torch.cat(ts).new_zeros(sum(map(len, ts)))],
    lambda ts: list(ts[0].chunk(3)),
)
"""Weights of q, k and v without biases: ours are zero."""
MASK_TOKEN = Op(lambda ts: ts[:1], lambda ts: [ts[0], torch.zeros_like(ts[0][0])])
"""DINOv2 has one for pre-training; we write zeros."""

POOL = [
    rule("pool.probe", "head.probe"),
    rule(
        ("pool.query.weight", "pool.key_value.weight"), "head.attention.in_proj_weight", QUERY_FIRST
    ),
    rule(("pool.query.bias", "pool.key_value.bias"), "head.attention.in_proj_bias", QUERY_FIRST),
    *layer("pool.projection", "head.attention.out_proj"),
    *layer("pool.norm", "head.layernorm"),
    *layer("pool.mlp.hidden", "head.mlp.fc1"),
    *layer("pool.mlp.output", "head.mlp.fc2"),
]


def block_rules(parts: PartNames, *, qkv_bias: bool = True) -> list[Rule]:
    """The rules of block `{i}`, without its prefix."""
    ours, theirs = "blocks.{i}.", parts.block
    *qkv, projection = parts.attention
    weights, biases = (tuple(f"{theirs}{n}.{kind}" for n in qkv) for kind in ("weight", "bias"))
    to = f"{ours}attention.qkv"
    rules = (
        [rule(f"{to}.weight", weights, JOINED), rule(f"{to}.bias", biases, JOINED)]
        if qkv_bias
        else [rule((f"{to}.weight", f"{to}.bias"), weights, NO_BIAS)]
    )
    rules += layer(f"{ours}attention.projection", f"{theirs}{projection}")
    rules += layer(f"{ours}mlp.output", f"{theirs}{parts.output}")
    for kind in ("weight", "bias"):
        names = tuple(f"{theirs}{name}.{kind}" for name in parts.hidden)
        op = joined(2) if len(names) == 2 else SAME
        rules.append(rule(f"{ours}mlp.hidden.{kind}", names, op))
    for number, norm in enumerate(parts.norms, 1):
        rules += layer(f"{ours}norm{number}", f"{theirs}{norm}")
    for number, scale in enumerate(parts.scales, 1):
        rules.append(rule(f"{ours}scale{number}", f"{theirs}{scale}"))
    return rules


def rules_for(
    spec: ViTSpec, parts: PartNames, prefix: str, *, qkv_bias: bool = True, mask_token: bool = False
) -> list[Rule]:
    """The rules of a model whose parts are named so, after `prefix`."""
    table = (spec.leading + math.prod(spec.grid), spec.width)
    flat = viewed((1, *table), table)
    conv = patches(spec.patch_size, spec.in_channels)
    body = [
        rule("patch_embedding.weight", f"{parts.patch}.weight", conv),
        rule("patch_embedding.bias", f"{parts.patch}.bias"),
        rule(
            "positions.0.table",
            parts.position,
            flat if parts.position.endswith(".weight") else SAME,
        ),
        *repeated(block_rules(parts, qkv_bias=qkv_bias), spec.depth),
        *layer("norm", parts.norm),
    ]
    if spec.pool in ("token", "token+gap"):
        tokens = ("embeddings.cls_token", "embeddings.mask_token")
        body.append(
            rule("class_token", tokens, MASK_TOKEN)
            if mask_token
            else rule("class_token", tokens[0])
        )
    if spec.distillation != "none":
        body.append(rule("distillation_token", "embeddings.distillation_token"))
    if spec.registers:
        body.append(rule("registers", "embeddings.register_tokens"))
    if spec.pool == "map":
        body += POOL
    rules = prefixed(body, prefix)
    if spec.num_classes:
        teacher = spec.distillation == "head"
        rules += layer("head", "cls_classifier" if teacher else "classifier")
        if teacher:
            rules += layer("distillation_head", "distillation_classifier")
    return rules
