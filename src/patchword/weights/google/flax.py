"""What Google's formats share: the names and layouts of Flax layers, as rules for the engine.

Flax keeps dense kernels `[in, out]`, convolutions `[kh, kw, in, out]`, and attention apart per
head: q, k and v `[D, h, d]`, the output `[h, d, D]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from patchword.spec.model import ModelSpec, PreprocessSpec, ViTSpec
from patchword.spec.parse import PatchwordError
from patchword.weights.mapping import SAME, TRANSPOSED, Op, Rule, chain, each, joined, rule, viewed
from patchword.weights.shapes import Hints, Shapes, count, shape_of

CONVOLUTION = each(lambda t: t.permute(3, 2, 0, 1), lambda t: t.permute(2, 3, 1, 0))
"""Theirs `[kh, kw, in, out]`, ours `[out, in, kh, kw]`."""
GROUP_SCALE = each(lambda t: t.reshape(-1), lambda t: t.reshape(1, 1, 1, -1))
"""Published GroupNorms are `[1, 1, 1, C]`; Flax since 0.3.6 has `[C]`, which is read too."""
PREFIXES = ("", "params/", "opt/target/", "img/", "params/img/")
"""Before the names of a whole model, of its training state, or of a model with an image tower."""
LINEN = ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")
"""An encoder block's first norm, attention, second norm and MLP, as Flax's linen numbers them."""
LAYERS = 1000
"""More are taken for damage."""


def dense(ours: str, theirs: str) -> list[Rule]:
    """A dense layer."""
    kernel = rule(f"{ours}.weight", f"{theirs}/kernel", TRANSPOSED)
    return [kernel, rule(f"{ours}.bias", f"{theirs}/bias")]


def norm(ours: str, theirs: str, op: Op = SAME) -> list[Rule]:
    """A LayerNorm, or with `GROUP_SCALE` a GroupNorm."""
    scale = rule(f"{ours}.weight", f"{theirs}/scale", op)
    return [scale, rule(f"{ours}.bias", f"{theirs}/bias", op)]


def convolution(ours: str, theirs: str) -> list[Rule]:
    """A convolution without bias."""
    return [rule(f"{ours}.weight", f"{theirs}/kernel", CONVOLUTION)]


def patch_embedding(theirs: str, kernel: Sequence[int]) -> list[Rule]:
    """The convolution over patches, of shape `kernel`: ours flattens a patch in the same order."""
    flat = (math.prod(kernel[:3]), kernel[3])
    return [
        rule("patch_embedding.weight", f"{theirs}/kernel", chain(viewed(flat, kernel), TRANSPOSED)),
        rule("patch_embedding.bias", f"{theirs}/bias"),
    ]


def heads_in(ours: str, theirs: str, parts: Sequence[str], width: int, heads: int) -> list[Rule]:
    """The projections `parts` of an attention layer, one layer of ours."""
    split = (heads, width // heads)
    kernel = chain(viewed((width, width), (width, *split)), TRANSPOSED, joined(len(parts)))
    bias = chain(viewed((width,), split), joined(len(parts)))
    return [
        rule((f"{ours}.weight",), tuple(f"{theirs}/{part}/kernel" for part in parts), kernel),
        rule((f"{ours}.bias",), tuple(f"{theirs}/{part}/bias" for part in parts), bias),
    ]


def heads_out(ours: str, theirs: str, width: int, heads: int) -> list[Rule]:
    """The output of an attention layer."""
    kernel = chain(viewed((width, width), (heads, width // heads, width)), TRANSPOSED)
    return [
        rule(f"{ours}.weight", f"{theirs}/out/kernel", kernel),
        rule(f"{ours}.bias", f"{theirs}/out/bias"),
    ]


def encoder_block(theirs: str, parts: Sequence[str], width: int, heads: int) -> list[Rule]:
    """An encoder block; `parts` are their names of the first norm, attention, second norm and
    MLP."""
    norm1, attention, norm2, mlp = (f"{theirs}/{part}" for part in parts)
    return [
        *norm("blocks.{i}.norm1", norm1),
        *heads_in("blocks.{i}.attention.qkv", attention, ("query", "key", "value"), width, heads),
        *heads_out("blocks.{i}.attention.projection", attention, width, heads),
        *norm("blocks.{i}.norm2", norm2),
        *dense("blocks.{i}.mlp.hidden", f"{mlp}/Dense_0"),
        *dense("blocks.{i}.mlp.output", f"{mlp}/Dense_1"),
    ]


def vit_rules(spec: ViTSpec, kernel: Sequence[int], blocks: list[Rule]) -> list[Rule]:
    """A ViT whose patch embedding has that kernel, but for its positions and its pooling."""
    rules = [
        *patch_embedding("embedding", kernel),
        *blocks,
        *norm("norm", "Transformer/encoder_norm"),
    ]
    rules += [rule("class_token", "cls")] if spec.pool == "token" else []
    if spec.num_classes:
        rules += dense("pre_logits", "pre_logits") if spec.head == "mlp" else []
        rules += dense("head", "head")
    return rules


# What shapes tell ---------------------------------------------------------------------------------


def prefix_of(shapes: Shapes, name: str) -> str:
    """What stands before the names of the model that has a tensor `name`; empty if none has."""
    return next((prefix for prefix in PREFIXES if prefix + name in shapes), "")


def ignored_for(prefix: str, spec: ModelSpec) -> tuple[str, ...]:
    """Patterns of what is not the model's: the optimizer's state, another tower, and without a head
    what leads to it."""
    others = (f"(?!{prefix}).*",) if prefix else ("opt/.*", "txt/.*")
    return others if spec.num_classes else (*others, f"{prefix}pre_logits/.*")


def classes_in(shapes: Shapes, kernel: str, axes: int = 2) -> int:
    """How many classes a head's kernel has; 0 without a head."""
    return shape_of(shapes, kernel, axes)[-1] if kernel in shapes else 0


def check_depth(depth: int) -> int:
    """The number of blocks. Raises `PatchwordError` if there are none, or more than any model's."""
    if not 1 <= depth <= LAYERS:
        raise PatchwordError(f"the file has {depth} encoder blocks; it is incomplete or damaged")
    return depth


def vit_fields(
    shapes: Shapes, prefix: str, parts: Sequence[str], *, merged: bool = False
) -> dict[str, Any]:
    """The fields of a ViT's spec but for the image size; `parts` as in `encoder_block`, `merged`
    where all blocks are stacked in one tensor each. Raises `PatchwordError` if the tensors that
    tell them are missing or misshapen."""
    rows, columns, channels, width = shape_of(shapes, f"{prefix}embedding/kernel", 4)
    encoder = f"{prefix}Transformer/encoderblock"
    first = encoder if merged else f"{encoder}_0"
    query = shape_of(shapes, f"{first}/{parts[1]}/query/kernel", 3 + merged)
    return {
        "in_channels": channels,
        "num_classes": classes_in(shapes, f"{prefix}head/kernel"),
        "depth": check_depth(query[0] if merged else count(shapes, rf"{encoder}_(\d+)/")),
        "width": width,
        "mlp_width": shape_of(shapes, f"{first}/{parts[3]}/Dense_0/kernel", 2 + merged)[-1],
        "heads": query[-2],
        "patch_size": (rows, columns),
        "pool": "token" if f"{prefix}cls" in shapes else "gap",
        "activation": "gelu_tanh",
        **_head(shapes, prefix, width),
    }


def _head(shapes: Shapes, prefix: str, width: int) -> dict[str, Any]:
    """A spec's `head` and `head_width`: `mlp` where a pre-logits layer, of any width, stands before
    a head. Raises `PatchwordError` if it does not take what the model gives."""
    kernel = f"{prefix}pre_logits/kernel"
    if kernel not in shapes or f"{prefix}head/kernel" not in shapes:
        return {}
    inputs, hidden = shape_of(shapes, kernel, 2)
    if inputs != width:
        raise PatchwordError(
            f"the tensor {kernel} is {[inputs, hidden]}, the model {width} wide; the file is "
            "incomplete or damaged"
        )
    return {"head": "mlp", "head_width": None if hidden == width else hidden}


def assumed_size(patch: int, hints: Hints) -> tuple[tuple[int, int], tuple[str, ...]]:
    """The image size that no tensor tells: the user's, else about 224, and a note that says so."""
    size = hints.get("image_size")
    if size is not None:
        return (size[0], size[1]), ()
    side = max(1, round(224 / max(patch, 1))) * patch
    note = f"the file does not say the image size: {side} x {side} is assumed; set image_size"
    return (side, side), (note,)


def preprocess(channels: int, **options: Any) -> PreprocessSpec:
    """Pixels from -1 to 1, bilinear."""
    halves = (0.5,) * channels
    return PreprocessSpec(mean=halves, std=halves, interpolation="bilinear", **options)
