"""Google's npz files of google-research/big_vision, by the names of its `models/vit.py`; read only.

As vision_transformer's (`google_npz`), but for: positions are added before the class token, or are
the fixed sin-cos table and not in the file; a MAP head; the blocks of an encoder trained with scan
are stacked in one tensor each. The image tower of a two-tower model (SigLIP) is read without the
other one. Images are evaluated after a centre crop, a two-tower model's stretched.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from patchword.spec.model import ViTSpec
from patchword.weights.google import google_npz
from patchword.weights.google.flax import (
    LINEN,
    assumed_size,
    check_depth,
    classes_in,
    dense,
    encoder_block,
    head_in,
    heads_in,
    heads_out,
    ignored_for,
    image_size,
    norm,
    patch_embedding,
    prefix_of,
    preprocess,
    with_hints,
)
from patchword.weights.mapping import (
    SAME,
    Config,
    Found,
    Rule,
    Shapes,
    count,
    each,
    prefixed,
    repeated,
    rule,
    shape_of,
    stacked,
)

OURS = re.compile(r"[\w/]*?Transformer/encoderblock(_\d+)?/MultiHeadDotProductAttention_0/.*")
PATCHES_ALONE = each(
    lambda t: torch.cat([torch.zeros_like(t[:, :1]), t], dim=1), lambda t: t[:, 1:]
)
"""Their position table has no entry for the class token, ours has one of zeros."""


def recognises(shapes: Shapes, config: Config) -> bool:
    """Whether the names are those of a ViT of this format, and not of `google_npz`, where the
    positions are the encoder's."""
    return any(map(OURS.fullmatch, shapes)) and not any(map(google_npz.PLACED.fullmatch, shapes))


def find(shapes: Shapes, config: Config, hints: dict[str, Any]) -> Found:
    """The model that names and shapes tell. Raises `PatchwordError` if they tell none."""
    prefix = prefix_of(shapes, "embedding/kernel")
    merged = f"{prefix}Transformer/encoderblock/{LINEN[1]}/query/kernel" in shapes
    spec, notes = _spec(shapes, prefix, merged, hints)
    ignored = ignored_for(prefix)
    if not spec.num_classes:
        ignored += (f"{prefix}pre_logits/.*",)
    return Found(
        spec=spec,
        rules=prefixed(_rules(spec, merged), prefix),
        preprocess=preprocess(
            spec.in_channels, resize="stretch" if prefix.endswith("img/") else "short"
        ),
        ignored=ignored,
        notes=notes,
    )


def _spec(
    shapes: Shapes, prefix: str, merged: bool, hints: dict[str, Any]
) -> tuple[ViTSpec, tuple[str, ...]]:
    rows, columns, channels, width = shape_of(shapes, f"{prefix}embedding/kernel", 4)
    encoder = f"{prefix}Transformer/encoderblock"
    first = encoder if merged else f"{encoder}_0"
    query = shape_of(shapes, f"{first}/{LINEN[1]}/query/kernel", 3 + merged)
    hidden = shape_of(shapes, f"{first}/{LINEN[3]}/Dense_0/kernel", 2 + merged)[-1]
    depth = query[0] if merged else count(shapes, rf"{encoder}_(\d+)/")
    positions = f"{prefix}pos_embedding"
    learned = positions in shapes
    if learned:
        entries = shape_of(shapes, positions, 3)[1]
        size, notes = image_size(entries, (rows, columns), hints, positions), ()
    else:
        size, notes = assumed_size(rows, hints)
    token, probe = f"{prefix}cls" in shapes, f"{prefix}MAPHead_0/probe" in shapes
    head, head_width = head_in(shapes, prefix, width)
    spec = ViTSpec(
        image_size=size,
        in_channels=channels,
        num_classes=classes_in(shapes, f"{prefix}head/kernel"),
        depth=check_depth(depth),
        width=width,
        mlp_width=hidden,
        heads=query[-2],
        patch_size=(rows, columns),
        pool="token" if token else "map" if probe else "gap",
        head=head,
        head_width=head_width,
        position="learned-1d" if learned else "sincos2d",
        activation="gelu_tanh",
    )
    return with_hints(spec, hints), notes


def _rules(spec: ViTSpec, merged: bool) -> list[Rule]:
    width, heads = spec.width, spec.heads
    name = "Transformer/encoderblock" if merged else "Transformer/encoderblock_{i}"
    block = encoder_block(name, LINEN, width, heads)
    rules = [
        *patch_embedding("embedding", (*spec.patch_size, spec.in_channels, width)),
        *(stacked(block, spec.depth) if merged else repeated(block, spec.depth)),
        *norm("norm", "Transformer/encoder_norm"),
    ]
    if spec.position == "learned-1d":
        op = PATCHES_ALONE if spec.pool == "token" else SAME
        rules.append(rule("positions.0.table", "pos_embedding", op))
    if spec.pool == "token":
        rules.append(rule("class_token", "cls"))
    if spec.pool == "map":
        attention = f"MAPHead_0/{LINEN[1]}"
        rules += [
            rule("pool.probe", "MAPHead_0/probe"),
            *heads_in("pool.query", attention, ("query",), width, heads),
            *heads_in("pool.key_value", attention, ("key", "value"), width, heads),
            *heads_out("pool.projection", attention, width, heads),
            *norm("pool.norm", "MAPHead_0/LayerNorm_0"),
            *dense("pool.mlp.hidden", "MAPHead_0/MlpBlock_0/Dense_0"),
            *dense("pool.mlp.output", "MAPHead_0/MlpBlock_0/Dense_1"),
        ]
    if spec.head == "mlp" and spec.num_classes:
        rules += dense("pre_logits", "pre_logits")
    if spec.num_classes:
        rules += dense("head", "head")
    return rules
