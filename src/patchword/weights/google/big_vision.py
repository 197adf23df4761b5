"""Google's npz files of google-research/big_vision, by the names of its `models/vit.py`; read only.

As vision_transformer's (`google_npz`), but for: positions are added before the class token, or are
the fixed sin-cos table and not in the file; a MAP head; the blocks of an encoder trained with scan
are stacked in one tensor each. The image tower of a two-tower model (SigLIP) is read without the
other one. Images are evaluated after a centre crop, a two-tower model's stretched.
"""

from __future__ import annotations

import re

import torch

from patchword.spec.model import ViTSpec
from patchword.weights.google import flax, google_npz
from patchword.weights.mapping import SAME, Reading, Rule, each, prefixed, repeated, rule, stacked
from patchword.weights.shapes import Config, Hints, Shapes, image_size_for, shape_of, spec_of

OURS = re.compile(r"[\w/]*?Transformer/encoderblock(_\d+)?/MultiHeadDotProductAttention_0/.*")
PATCHES_ALONE = each(
    lambda t: torch.cat([torch.zeros_like(t[:, :1]), t], dim=1), lambda t: t[:, 1:]
)
"""Their position table has no entry for the class token, ours has one of zeros."""


def recognises(shapes: Shapes, config: Config) -> bool:
    """Whether the names are those of a ViT of this format, and not of `google_npz`, where the
    positions are the encoder's."""
    return any(map(OURS.fullmatch, shapes)) and not any(map(google_npz.PLACED.fullmatch, shapes))


def find(shapes: Shapes, config: Config, hints: Hints) -> Reading:
    """The model that names and shapes tell. Raises `PatchwordError` if they tell none."""
    prefix = flax.prefix_of(shapes, "embedding/kernel")
    merged = f"{prefix}Transformer/encoderblock/{flax.LINEN[1]}/query/kernel" in shapes
    fields = flax.vit_fields(shapes, prefix, flax.LINEN, merged=merged)
    positions, notes = f"{prefix}pos_embedding", ()
    if positions in shapes:
        entries, sizes = shape_of(shapes, positions, 3)[1], [hints.get("image_size")]
        size = image_size_for(entries, fields["patch_size"], sizes, positions)
    else:
        size, notes = flax.assumed_size(fields["patch_size"][0], hints)
        fields["position"] = "sincos2d"
    if fields["pool"] == "gap" and f"{prefix}MAPHead_0/probe" in shapes:
        fields["pool"] = "map"
    spec = spec_of(ViTSpec, fields | {"image_size": size}, hints)
    resize = "stretch" if prefix.endswith("img/") else "short"
    return Reading(
        spec=spec,
        rules=prefixed(_rules(spec, merged), prefix),
        preprocess=flax.preprocess(spec.in_channels, resize=resize),
        ignored=flax.ignored_for(prefix, spec),
        notes=notes,
    )


def _rules(spec: ViTSpec, merged: bool) -> list[Rule]:
    width, heads = spec.width, spec.heads
    name = "Transformer/encoderblock" if merged else "Transformer/encoderblock_{i}"
    block = flax.encoder_block(name, flax.LINEN, width, heads)
    blocks = stacked(block, spec.depth) if merged else repeated(block, spec.depth)
    rules = flax.vit_rules(spec, (*spec.patch_size, spec.in_channels, width), blocks)
    if spec.position == "learned-1d":
        op = PATCHES_ALONE if spec.pool == "token" else SAME
        rules.append(rule("positions.0.table", "pos_embedding", op))
    if spec.pool == "map":
        attention = f"MAPHead_0/{flax.LINEN[1]}"
        rules += [
            rule("pool.probe", "MAPHead_0/probe"),
            *flax.heads_in("pool.query", attention, ("query",), width, heads),
            *flax.heads_in("pool.key_value", attention, ("key", "value"), width, heads),
            *flax.heads_out("pool.projection", attention, width, heads),
            *flax.norm("pool.norm", "MAPHead_0/LayerNorm_0"),
            *flax.dense("pool.mlp.hidden", "MAPHead_0/MlpBlock_0/Dense_0"),
            *flax.dense("pool.mlp.output", "MAPHead_0/MlpBlock_0/Dense_1"),
        ]
    return rules
