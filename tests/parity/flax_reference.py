"""Google's models from their published equations, in NumPy float64, independent of patchword.

Parameters are a flat dict under the names of the original npz files, images `[B, H, W, C]`. ViT:
arXiv 2010.11929, Eq. 1-8; MAP head: arXiv 1810.00825, section 3.2; Mixer: arXiv 2105.01601, Eq. 1;
BiT: arXiv 1912.11370; weight standardisation: arXiv 1903.10520; GroupNorm: arXiv 1803.08494.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Array = NDArray[np.float64]
Params = dict[str, Array]
Shapes = dict[str, tuple[int, ...]]
Padding = str | int
"""`SAME`, or so many pixels on every side."""


def draw(shapes: Shapes, seed: int = 0) -> Params:
    """A value for every parameter, in float32: the network keeps signals of about unit size, and
    no parameter is at a special value."""
    rng = np.random.default_rng(seed)
    params: Params = {}
    for name, shape in shapes.items():
        value = rng.standard_normal(shape)
        last = name.rsplit("/", 1)[-1]
        if last in ("scale", "gamma"):
            value = 1 + 0.2 * value
        elif last == "kernel":
            out = "/out/" in name
            axes = shape[1:] if "encoderblock/" in name else shape
            inputs = axes[:-1] if out or len(axes) in (2, 4) else axes[:1]
            value /= math.sqrt(math.prod(inputs))
        else:
            value *= 0.3
        params[name] = value.astype(np.float32).astype(np.float64)
    return params


def relative(ours: Any, theirs: Array) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())


# Names and shapes ---------------------------------------------------------------------------------

GOOGLE = ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
LINEN = ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")
"""of an encoder block's norm, attention, second norm and MLP, as Google's published files have
them, and as Flax's linen numbers them: the current code, and all of big_vision's"""


def norm_shapes(name: str, *shape: int) -> Shapes:
    return {f"{name}/scale": shape, f"{name}/bias": shape}


def dense_shapes(name: str, *kernel: int) -> Shapes:
    return {f"{name}/kernel": kernel, f"{name}/bias": kernel[-1:]}


def mlp_shapes(name: str, width: int, hidden: int) -> Shapes:
    return dense_shapes(f"{name}/Dense_0", width, hidden) | dense_shapes(
        f"{name}/Dense_1", hidden, width
    )


def attention_shapes(name: str, width: int, heads: int) -> Shapes:
    split = (heads, width // heads)
    shapes = dense_shapes(f"{name}/out", *split, width)
    for part in ("query", "key", "value"):
        shapes |= {f"{name}/{part}/kernel": (width, *split), f"{name}/{part}/bias": split}
    return shapes


def block_shapes(parts: tuple[str, ...], width: int, heads: int, hidden: int) -> Shapes:
    return {
        **norm_shapes(parts[0], width),
        **attention_shapes(parts[1], width, heads),
        **norm_shapes(parts[2], width),
        **mlp_shapes(parts[3], width, hidden),
    }


def vit_shapes(
    kernel: tuple[int, int, int, int],
    positions: tuple[str, int] | None,
    parts: tuple[str, ...],
    *,
    heads: int = 2,
    hidden: int = 40,
    depth: int = 2,
    token: bool = True,
    pre_logits: int = 0,
    classes: int = 5,
    merged: bool = False,
) -> Shapes:
    width = kernel[-1]
    shapes = dense_shapes("embedding", *kernel) | norm_shapes("Transformer/encoder_norm", width)
    for name, shape in block_shapes(parts, width, heads, hidden).items():
        if merged:
            shapes[f"Transformer/encoderblock/{name}"] = (depth, *shape)
        else:
            shapes |= {f"Transformer/encoderblock_{i}/{name}": shape for i in range(depth)}
    if positions is not None:
        shapes[positions[0]] = (1, positions[1], width)
    if token:
        shapes["cls"] = (1, 1, width)
    if pre_logits:
        shapes |= dense_shapes("pre_logits", width, pre_logits)
    if classes:
        shapes |= dense_shapes("head", pre_logits or width, classes)
    return shapes


def stem_shapes(layers: tuple[int, ...], width: int = 32) -> Shapes:
    """GroupNorm as in the published files."""
    shapes = {"conv_root/kernel": (7, 7, 3, width)} | norm_shapes("gn_root", 1, 1, 1, width)
    before = width
    for stage, units in enumerate(layers):
        inner = width * 2**stage
        for unit in range(units):
            name = f"block{stage + 1}/unit{unit + 1}"
            sizes = {"1": (1, before, inner), "2": (3, inner, inner), "3": (1, inner, 4 * inner)}
            if not unit:
                sizes["_proj"] = (1, before, 4 * inner)
            for part, (size, *channels) in sizes.items():
                shapes[f"{name}/conv{part}/kernel"] = (size, size, *channels)
                shapes |= norm_shapes(f"{name}/gn{part}", 1, 1, 1, channels[1])
            before = 4 * inner
    return shapes


def mixer_shapes(
    kernel: tuple[int, int, int, int], entries: int, tokens: int, channels: int, depth: int = 2
) -> Shapes:
    width = kernel[-1]
    shapes = dense_shapes("stem", *kernel) | norm_shapes("pre_head_layer_norm", width)
    for i in range(depth):
        name = f"MixerBlock_{i}"
        shapes |= norm_shapes(f"{name}/LayerNorm_0", width)
        shapes |= norm_shapes(f"{name}/LayerNorm_1", width)
        shapes |= mlp_shapes(f"{name}/token_mixing", entries, tokens)
        shapes |= mlp_shapes(f"{name}/channel_mixing", width, channels)
    return shapes | dense_shapes("head", width, 5)


def bit_shapes(layers: tuple[int, ...], factor: int = 1, classes: int = 5) -> Shapes:
    conv_name, width = "standardized_conv2d/kernel", 64 * factor
    shapes: Shapes = {f"resnet/root_block/{conv_name}": (7, 7, 3, width)}
    before = width

    def gn(name: str, channels: int) -> Shapes:
        return {f"{name}/group_norm/gamma": (channels,), f"{name}/group_norm/beta": (channels,)}

    for stage, units in enumerate(layers):
        inner = width * 2**stage
        for unit in range(units):
            name = f"resnet/block{stage + 1}/unit{unit + 1:02d}"
            sizes = {"a": (1, before, inner), "b": (3, inner, inner), "c": (1, inner, 4 * inner)}
            for part, (size, *channels) in sizes.items():
                shapes[f"{name}/{part}/{conv_name}"] = (size, size, *channels)
                shapes |= gn(f"{name}/{part}", channels[0])
            if not unit:
                shapes[f"{name}/a/proj/{conv_name}"] = (1, 1, before, 4 * inner)
            before = 4 * inner
    shapes |= gn("resnet", before)
    if classes:
        shapes |= dense_shapes("resnet/head/conv2d", 1, 1, before, classes)
    return shapes


# Layers -------------------------------------------------------------------------------------------


def dense(p: Params, name: str, x: Array) -> Array:
    return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]


def layer_norm(p: Params, name: str, x: Array) -> Array:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * p[f"{name}/scale"] + p[f"{name}/bias"]


def group_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    b, h, w, c = x.shape
    groups = x.reshape(b, h, w, 32, c // 32)
    mean = groups.mean((1, 2, 4), keepdims=True)
    variance = groups.var((1, 2, 4), keepdims=True)
    x = ((groups - mean) / np.sqrt(variance + eps)).reshape(x.shape)
    return x * scale.reshape(-1) + bias.reshape(-1)


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def softmax(x: Array) -> Array:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def mlp(p: Params, name: str, x: Array) -> Array:
    return dense(p, f"{name}/Dense_1", gelu(dense(p, f"{name}/Dense_0", x)))


def attention(p: Params, name: str, queries: Array, x: Array) -> Array:
    def heads(part: str, tokens: Array) -> Array:
        kernel, bias = p[f"{name}/{part}/kernel"], p[f"{name}/{part}/bias"]
        return np.einsum("bnd,dhk->bhnk", tokens, kernel) + bias[:, None]

    q, k, v = heads("query", queries), heads("key", x), heads("value", x)
    weights = softmax(np.einsum("bhqk,bhnk->bhqn", q, k) / math.sqrt(q.shape[-1]))
    kernel, bias = p[f"{name}/out/kernel"], p[f"{name}/out/bias"]
    return np.einsum("bhqn,bhnk,hkd->bqd", weights, v, kernel, optimize=True) + bias


def windows(x: Array, size: int, stride: int, padding: Padding, fill: float) -> Array:
    """`[B, H', W', C, size, size]`"""
    pads = [(0, 0)]
    for n in x.shape[1:3]:
        total = max((-(-n // stride) - 1) * stride + size - n, 0)
        pads.append(
            (total // 2, total - total // 2) if isinstance(padding, str) else (padding, padding)
        )
    x = np.pad(x, [*pads, (0, 0)], constant_values=fill)
    return sliding_window_view(x, (size, size), axis=(1, 2))[:, ::stride, ::stride]


def conv(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    patches = windows(x, kernel.shape[0], stride, padding, 0.0)
    return np.tensordot(patches, kernel.transpose(2, 0, 1, 3), axes=3)


def max_pool(x: Array, padding: Padding, fill: float) -> Array:
    return windows(x, 3, 2, padding, fill).max((-2, -1))


def patches(p: Params, name: str, x: Array) -> Array:
    """`[B, N, D]`"""
    kernel = p[f"{name}/kernel"]
    height, width = kernel.shape[:2]
    b, rows, columns = len(x), x.shape[1] // height, x.shape[2] // width
    x = x.reshape(b, rows, height, columns, width, -1)
    x = np.einsum("brhcwi,hwid->brcd", x, kernel) + p[f"{name}/bias"]
    return x.reshape(b, rows * columns, -1)


# Models -------------------------------------------------------------------------------------------


def under(p: Params, prefix: str) -> Params:
    return {name[len(prefix) :]: value for name, value in p.items() if name.startswith(prefix)}


def block(p: Params, parts: tuple[str, ...], x: Array) -> Array:
    norm1, attending, norm2, dense_part = parts
    y = layer_norm(p, norm1, x)
    x = x + attention(p, attending, y, y)
    return x + mlp(p, dense_part, layer_norm(p, norm2, x))


def classified(p: Params, x: Array) -> Array:
    if "pre_logits/kernel" in p:
        x = np.tanh(dense(p, "pre_logits", x))
    return dense(p, "head", x) if "head/kernel" in p else x


def vision_transformer(p: Params, x: Array) -> Array:
    """ViT and hybrid of google-research/vision_transformer, under either naming."""
    parts = GOOGLE if f"Transformer/encoderblock_0/{GOOGLE[1]}/out/bias" in p else LINEN
    if "conv_root/kernel" in p:
        x = stem(p, x)
    x = patches(p, "embedding", x)
    if "cls" in p:
        x = np.concatenate([np.repeat(p["cls"], len(x), 0), x], axis=1)
    x = x + p["Transformer/posembed_input/pos_embedding"]
    layer = 0
    while layers := under(p, f"Transformer/encoderblock_{layer}/"):
        x = block(layers, parts, x)
        layer += 1
    x = layer_norm(p, "Transformer/encoder_norm", x)
    return classified(p, x[:, 0] if "cls" in p else x.mean(1))


def stem(p: Params, x: Array) -> Array:
    def std_conv(name: str, x: Array, stride: int = 1) -> Array:
        kernel = p[f"{name}/kernel"]
        kernel = kernel - kernel.mean((0, 1, 2))
        return conv(x, kernel / (kernel.std((0, 1, 2)) + 1e-5), stride, "SAME")

    def norm(name: str, x: Array) -> Array:
        return group_norm(x, p[f"{name}/scale"], p[f"{name}/bias"], 1e-6)

    x = max_pool(relu(norm("gn_root", std_conv("conv_root", x, 2))), "SAME", -np.inf)
    stage = 1
    while f"block{stage}/unit1/conv1/kernel" in p:
        unit = 1
        while f"block{stage}/unit{unit}/conv1/kernel" in p:
            name = f"block{stage}/unit{unit}"
            stride = 2 if stage > 1 and unit == 1 else 1
            shortcut = x
            if f"{name}/conv_proj/kernel" in p:
                shortcut = norm(f"{name}/gn_proj", std_conv(f"{name}/conv_proj", x, stride))
            x = relu(norm(f"{name}/gn1", std_conv(f"{name}/conv1", x)))
            x = relu(norm(f"{name}/gn2", std_conv(f"{name}/conv2", x, stride)))
            x = relu(norm(f"{name}/gn3", std_conv(f"{name}/conv3", x)) + shortcut)
            unit += 1
        stage += 1
    return x


def mixer(p: Params, x: Array) -> Array:
    x = patches(p, "stem", x)
    layer = 0
    while layers := under(p, f"MixerBlock_{layer}/"):
        y = layer_norm(layers, "LayerNorm_0", x).swapaxes(1, 2)
        x = x + mlp(layers, "token_mixing", y).swapaxes(1, 2)
        x = x + mlp(layers, "channel_mixing", layer_norm(layers, "LayerNorm_1", x))
        layer += 1
    return classified(p, layer_norm(p, "pre_head_layer_norm", x).mean(1))


def sincos_2d(rows: int, columns: int, width: int) -> Array:
    """arXiv 2205.01580: of x, then of y, all sines before all cosines, 10000^-(0 ... 1)."""
    quarter = width // 4
    table = np.zeros((1, rows * columns, width))
    for place in range(rows * columns):
        for k in range(quarter):
            rate = 10_000 ** -(k / (quarter - 1))
            x, y = place % columns * rate, place // columns * rate
            table[0, place, k::quarter] = math.sin(x), math.cos(x), math.sin(y), math.cos(y)
    return table


def big_vision(p: Params, x: Array) -> Array:
    """ViT of google-research/big_vision; `p` without a prefix."""
    rows, columns = (
        n // k for n, k in zip(x.shape[1:3], p["embedding/kernel"].shape, strict=False)
    )
    x = patches(p, "embedding", x)
    table = p.get("pos_embedding")
    x = x + (sincos_2d(rows, columns, x.shape[-1]) if table is None else table)
    if "cls" in p:
        x = np.concatenate([np.repeat(p["cls"], len(x), 0), x], axis=1)
    stacks = under(p, "Transformer/encoderblock/")
    depth = len(stacks["LayerNorm_0/scale"]) if stacks else 0
    merged = [{name: value[layer] for name, value in stacks.items()} for layer in range(depth)]
    layer = 0
    while layers := under(p, f"Transformer/encoderblock_{layer}/"):
        merged.append(layers)
        layer += 1
    for layers in merged:
        x = block(layers, LINEN, x)
    x = layer_norm(p, "Transformer/encoder_norm", x)
    if "MAPHead_0/probe" in p:
        head = under(p, "MAPHead_0/")
        y = attention(head, LINEN[1], np.repeat(head["probe"], len(x), 0), x)
        return classified(
            p, (y + mlp(head, "MlpBlock_0", layer_norm(head, "LayerNorm_0", y)))[:, 0]
        )
    return classified(p, x[:, 0] if "cls" in p else x.mean(1))


def bit(p: Params, x: Array) -> Array:
    """BiT ResNet of google-research/big_transfer."""

    def std_conv(name: str, x: Array, stride: int = 1, padding: int = 0) -> Array:
        kernel = p[f"resnet/{name}/standardized_conv2d/kernel"]
        kernel = kernel - kernel.mean((0, 1, 2))
        return conv(x, kernel / np.sqrt(kernel.var((0, 1, 2)) + 1e-10), stride, padding)

    def active(name: str, x: Array) -> Array:
        gamma, beta = (p[f"resnet/{name}group_norm/{part}"] for part in ("gamma", "beta"))
        return relu(group_norm(x, gamma, beta, 1e-5))

    x = max_pool(std_conv("root_block", x, 2, 3), 1, 0.0)
    for stage in range(1, 5):
        unit = 1
        while f"resnet/block{stage}/unit{unit:02d}/a/group_norm/gamma" in p:
            name = f"block{stage}/unit{unit:02d}"
            stride = 2 if stage > 1 and unit == 1 else 1
            y = active(f"{name}/a/", x)
            shortcut = std_conv(f"{name}/a/proj", y, stride) if unit == 1 else x
            y = active(f"{name}/b/", std_conv(f"{name}/a", y))
            y = active(f"{name}/c/", std_conv(f"{name}/b", y, stride, 1))
            x = std_conv(f"{name}/c", y) + shortcut
            unit += 1
    x = active("", x).mean((1, 2))
    if "resnet/head/conv2d/kernel" not in p:
        return x
    return x @ p["resnet/head/conv2d/kernel"][0, 0] + p["resnet/head/conv2d/bias"]


# Gradients ----------------------------------------------------------------------------------------


def slope(function: Callable[[Params], float], p: Params, name: str, index: Any) -> float:
    """The derivative of a function of the parameters by one entry, by central differences."""
    step, values = 1e-5, []
    for sign in (1, -1):
        moved = p[name].copy()
        moved[index] += sign * step
        values.append(function({**p, name: moved}))
    return (values[0] - values[1]) / (2 * step)
