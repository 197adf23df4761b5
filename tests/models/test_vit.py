"""The Vision Transformer against Eq. 1-8 written in numpy, and what its options do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from patchword.models import vit
from patchword.models.attention import SelfAttention
from patchword.models.position import Rotary, SinCos2d
from patchword.models.vit import ViT
from patchword.models.zoo import create_model, macs, model_spec
from patchword.spec.model import ViTSpec
from patchword.spec.parse import PatchwordError

Array = NDArray[np.float64]
Weights = dict[str, Array]


# The paper in numpy ------------------------------------------------------------------------------


def dense(x: Array, w: Weights, name: str) -> Array:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(x: Array, w: Weights, name: str, eps: float) -> Array:
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: Array) -> Array:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def mlp(x: Array, w: Weights, name: str, spec: ViTSpec) -> Array:
    x = dense(x, w, f"{name}.hidden")
    if spec.activation == "swiglu":
        gate, value = np.split(x, 2, axis=1)
        x = gate / (1 + np.exp(-gate)) * value
    else:
        x = (gelu if spec.activation == "gelu" else gelu_tanh)(x)
    return dense(x, w, f"{name}.output")


def attend(
    q: Array,
    k: Array,
    v: Array,
    heads: int,
    norms: Any = None,
    offsets: Any = None,
    turn: Any = None,
) -> Array:
    """Eq. 6-8 without the projection: heads one after the other, concatenated."""
    size = q.shape[-1] // heads
    found: list[Array] = []
    for head in range(heads):
        at = slice(head * size, (head + 1) * size)
        query, key = q[:, at], k[:, at]
        if norms is not None:
            query, key = norms(query, "query_norm"), norms(key, "key_norm")
        if turn is not None:
            query, key = turn(query), turn(key)
        logits = query @ key.T
        if offsets is not None:  # D.4: the query with the embedding of its offset to the key
            for i, j in np.ndindex(*logits.shape):
                logits[i, j] += query[i] @ offsets[i - j + len(k) - 1]
        found.append(softmax(logits / math.sqrt(size)) @ v[:, at])
    return np.concatenate(found, axis=1)


def self_attention(x: Array, w: Weights, name: str, spec: ViTSpec) -> Array:
    q, k, v = np.split(dense(x, w, f"{name}.qkv"), 3, axis=1)

    def norms(values: Array, which: str) -> Array:
        return layer_norm(values, w, f"{name}.{which}", spec.norm_eps)

    offsets = None
    if spec.position == "relative":
        offsets = placed("offsets", w, spec, int(name.split(".")[1]))
    turn = (lambda t: rotated(t, spec)) if spec.position == "rotary" else None
    heads = attend(q, k, v, spec.heads, norms if spec.qk_norm else None, offsets, turn)
    return dense(heads, w, f"{name}.projection")


def placed(kind: str, w: Weights, spec: ViTSpec, layer: int) -> Array | None:
    """The position parameters that act in a layer."""
    if spec.position_at == "stem" and layer:
        return None
    return w[f"positions.{layer if spec.position_at == 'every' else 0}.{kind}"]


def positions(w: Weights, spec: ViTSpec, layer: int) -> Array | float:
    """What is added to all tokens before a layer, `[T, D]`."""
    rows, columns = spec.grid
    lead, registers = spec.leading, np.zeros((spec.registers, spec.width))
    leads = np.zeros((lead, spec.width))
    if spec.position == "sincos2d" and (not layer or spec.position_at != "stem"):
        patches = sincos(rows, columns, spec.width)
    elif spec.position == "learned-1d" and (table := placed("table", w, spec, layer)) is not None:
        leads, patches = table[0, :lead], table[0, lead:]
    elif spec.position == "learned-2d" and (x := placed("columns", w, spec, layer)) is not None:
        y = placed("rows", w, spec, layer)
        assert y is not None
        patches = np.stack(
            [np.concatenate([x[0, c], y[0, r]]) for r in range(rows) for c in range(columns)]
        )
    else:
        return 0.0
    return np.concatenate([leads, registers, patches])


def rotated(x: Array, spec: ViTSpec) -> Array:
    """Each pair of a head's channels (c, c + d / 2) of each patch turned by its angle."""
    (rows, columns), size = spec.grid, x.shape[1]
    out = x.copy()
    for n in range(rows * columns):
        y, at = divmod(n, columns)
        centres = ((y + 0.5) / rows * 2 - 1, (at + 0.5) / columns * 2 - 1)
        for pair in range(size // 2):
            axis, step = divmod(pair, size // 4)
            angle = 2 * math.pi * centres[axis] / 100.0 ** (step / (size // 4))
            a, b = x[spec.prefix + n, pair], x[spec.prefix + n, pair + size // 2]
            out[spec.prefix + n, pair] = a * math.cos(angle) - b * math.sin(angle)
            out[spec.prefix + n, pair + size // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def sincos(rows: int, columns: int, width: int) -> Array:
    quarter = width // 4
    omega = 10_000.0 ** (-np.arange(quarter) / (quarter - 1))
    table = [
        np.concatenate([f(at * omega) for at in (x, y) for f in (np.sin, np.cos)])
        for y in range(rows)
        for x in range(columns)
    ]
    return np.stack(table)


def reference(image: Array, w: Weights, spec: ViTSpec) -> Array:
    """Logits `[K]` of one image `[C, H, W]`."""
    (rows, columns), (ph, pw) = spec.grid, spec.patch_size
    patches = [
        np.array(
            [
                image[c, r * ph + y, s * pw + x]
                for y in range(ph)
                for x in range(pw)
                for c in range(spec.in_channels)
            ]
        )
        for r in range(rows)
        for s in range(columns)
    ]
    z = dense(np.stack(patches), w, "patch_embedding")
    firsts = [w[n][0] for n in ("class_token", "distillation_token", "registers") if n in w]
    z = np.concatenate([*firsts, z])
    for layer in range(spec.depth):
        z = z + positions(w, spec, layer)  # Eq. 1 where layer is 0
        name = f"blocks.{layer}"
        y = self_attention(
            layer_norm(z, w, f"{name}.norm1", spec.norm_eps), w, f"{name}.attention", spec
        )
        z = z + y * w.get(f"{name}.scale1", np.ones(1))  # Eq. 2
        y = mlp(layer_norm(z, w, f"{name}.norm2", spec.norm_eps), w, f"{name}.mlp", spec)
        z = z + y * w.get(f"{name}.scale2", np.ones(1))  # Eq. 3
    if not spec.pool_norm:
        z = layer_norm(z, w, "norm", spec.norm_eps)
    average = z[-rows * columns :].mean(0)
    if spec.pool == "token":
        pooled = z[0]  # Eq. 4
    elif spec.pool == "gap":
        pooled = layer_norm(average, w, "norm", spec.norm_eps) if spec.pool_norm else average
    elif spec.pool == "token+gap":
        pooled = np.concatenate([z[0], average])
    else:
        q = dense(w["pool.probe"][0], w, "pool.query")
        k, v = np.split(dense(z, w, "pool.key_value"), 2, axis=1)
        pooled = dense(attend(q, k, v, spec.heads), w, "pool.projection")
        normed = layer_norm(pooled, w, "pool.norm", spec.norm_eps)
        pooled = (pooled + mlp(normed, w, "pool.mlp", spec))[0]
    if spec.num_classes and spec.head == "mlp":
        pooled = np.tanh(dense(pooled, w, "pre_logits"))
    logits = dense(pooled, w, "head") if spec.num_classes else pooled
    if spec.num_classes and spec.distillation == "head":
        logits = (logits + dense(z[1], w, "distillation_head")) / 2
    return logits


# Helpers -----------------------------------------------------------------------------------------


def tiny(**options: Any) -> ViTSpec:
    """A small model with every size different."""
    values: dict[str, Any] = {
        "depth": 2,
        "width": 24,
        "mlp_width": 40,
        "heads": 3,
        "patch_size": (4, 4),
        "image_size": (16, 16),
        "num_classes": 7,
    }
    return ViTSpec(**(values | options))


def scatter(model: nn.Module) -> None:
    """Draw every weight, so that none is at a value (0 or 1) that hides a mistake."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim > 1 else 0.5))
            if "norm" in name and name.endswith("weight"):
                p.add_(1)


CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "pre-training head": {"head": "mlp"},
    "gap": {"pool": "gap"},
    "map": {"pool": "map"},
    "map, mlp head": {"pool": "map", "head": "mlp"},
    "mlp head of 8 units": {"head": "mlp", "head_width": 8},
    "registers": {"registers": 3},
    "gap, registers": {"pool": "gap", "registers": 2},
    "map, registers": {"pool": "map", "registers": 1},
    "LayerScale": {"layer_scale": 0.1},
    "qk-norm": {"qk_norm": True, "norm_eps": 1e-3},
    "sincos": {"position": "sincos2d"},
    "sincos, gap, registers": {"position": "sincos2d", "pool": "gap", "registers": 2},
    "sincos, every layer": {"position": "sincos2d", "position_at": "every"},
    "no positions": {"position": "none"},
    "1-D, every layer": {"position_at": "every", "registers": 2},
    "1-D, shared": {"position_at": "every-shared", "image_size": (8, 24)},
    "2-D": {"position": "learned-2d", "image_size": (8, 24)},
    "2-D, every layer": {"position": "learned-2d", "position_at": "every", "registers": 1},
    "2-D, shared": {"position": "learned-2d", "position_at": "every-shared", "pool": "gap"},
    "relative": {"position": "relative", "registers": 2},
    "relative, every layer": {"position": "relative", "position_at": "every"},
    "relative, shared": {"position": "relative", "position_at": "every-shared", "pool": "map"},
    "rotary": {"position": "rotary", "registers": 2, "image_size": (8, 24)},
    "rotary, gap": {"position": "rotary", "pool": "gap", "qk_norm": True},
    "tanh GELU, map": {"activation": "gelu_tanh", "pool": "map"},
    "SwiGLU": {"activation": "swiglu", "layer_scale": 0.1},
    "SwiGLU, map": {"activation": "swiglu", "pool": "map"},
    "token and average": {"pool": "token+gap", "registers": 2},
    "token and average, mlp head": {"pool": "token+gap", "head": "mlp"},
    "norm after pooling": {"pool": "gap", "pool_norm": True},
    "distillation token": {"distillation": "token", "registers": 1},
    "both heads": {"distillation": "head", "position": "rotary"},
    "features": {"num_classes": 0, "head": "mlp"},
    "wide": {"image_size": (8, 24)},
    "tall, flat patches": {"image_size": (18, 10), "patch_size": (3, 5)},
    "one channel": {"in_channels": 1},
    "five channels": {"in_channels": 5, "patch_size": (8, 2)},
    "everything": {
        "image_size": (12, 20),
        "patch_size": (6, 4),
        "in_channels": 2,
        "pool": "token",
        "head": "mlp",
        "registers": 2,
        "layer_scale": 1e-5,
        "qk_norm": True,
        "dropout": 0.5,
        "drop_path": 0.5,
    },
}


def exact_turns(module: Rotary, spec: ViTSpec) -> None:
    """The buffers in float64, read off `rotated`."""
    size, patches = spec.width // spec.heads, math.prod(spec.grid)
    x = np.zeros((spec.prefix + patches, size))
    x[:, : size // 2] = 1
    out = rotated(x, spec)[spec.prefix :]
    cos, sin = out[:, : size // 2], out[:, size // 2 :]
    module.cos = torch.from_numpy(np.concatenate([cos, cos], axis=1))
    module.sin = torch.from_numpy(np.concatenate([sin, sin], axis=1))


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_model_computes_the_equations(options: dict[str, Any]):
    """1e-10 in float64, 1e-5 in float32, relative to the largest logit."""
    spec = tiny(**options)
    model = ViT(spec).eval()
    scatter(model)
    images = torch.randn(3, spec.in_channels, *spec.image_size, dtype=torch.float64)
    with torch.inference_mode():
        single = model(images.float()).double().numpy()
        double = model.double()
        for module in double.positions:  # fixed tables are float32
            if isinstance(module, SinCos2d):
                module.table = torch.from_numpy(sincos(*spec.grid, spec.width))[None]
            elif isinstance(module, Rotary):
                exact_turns(module, spec)
        exact = double(images).numpy()
    weights = {name: p.detach().numpy() for name, p in double.named_parameters()}
    wanted = np.stack([reference(image, weights, spec) for image in images.numpy()])
    scale = np.abs(wanted).max()
    assert wanted.shape == (3, spec.num_classes or spec.width)
    assert scale > 0.1
    assert np.abs(exact - wanted).max() / scale < 1e-10
    assert np.abs(single - wanted).max() / scale < 1e-5


@pytest.mark.parametrize("pool", ["token", "gap", "map"])
def test_features_agree_with_the_logits(pool: Any):
    spec = tiny(pool=pool, registers=2, image_size=(8, 24), head="mlp")
    model = ViT(spec).eval()
    scatter(model)
    images = torch.randn(2, 3, 8, 24)
    pooled, tokens, grid = model.features(images)
    assert pooled.shape == (2, 24)
    assert tokens.shape == (2, 12, 24)
    assert grid == (2, 6)
    torch.testing.assert_close(model.classify(pooled), model(images))
    if pool == "gap":
        torch.testing.assert_close(pooled, tokens.mean(1))


def test_tokens_are_the_patches_row_by_row():
    """Without attention between them, only the token of a changed patch changes."""
    model = ViT(tiny(depth=1, registers=2, image_size=(8, 24))).eval()
    scatter(model)
    block: Any = model.blocks[0]
    nn.init.zeros_(block.attention.projection.weight)
    images = torch.randn(1, 3, 8, 24)
    changed = images.clone()
    changed[:, :, 5, 9] += 1.0  # row 1, column 2 of the 2 x 6 grid
    differs = (model.features(images).tokens != model.features(changed).tokens).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [1 * 6 + 2]


def test_images_that_the_patches_do_not_divide_are_refused():
    model = ViT(tiny(patch_size=(4, 2)))
    takes = r"the model takes \[B, 3, H, W\] of multiples of 4 x 2 pixels; resize or convert them"
    for shape in ((1, 3, 16, 15), (1, 1, 16, 16), (1, 3, 10, 16), (1, 3, 0, 8), (3, 16, 16)):
        with pytest.raises(PatchwordError, match=takes):
            model(torch.zeros(shape))


# Dropout and stochastic depth --------------------------------------------------------------------


def record_drops(
    model: ViT, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[float, tuple[int, ...]]]:
    """(rate, shape) of every dropout that a forward pass applies."""
    seen: list[tuple[float, tuple[int, ...]]] = []

    def spy(x: Tensor, rate: float) -> Tensor:
        seen.append((rate, tuple(x.shape)))
        return x

    monkeypatch.setattr("torch.nn.functional.dropout", spy)
    model(torch.randn(2, 3, 16, 16))
    return seen


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_dropout_follows_positions_and_dense_layers_but_not_qkv(
    head: Any, monkeypatch: pytest.MonkeyPatch
):
    """B.1.1, in the order of the forward pass; the heads have none, as in the authors' code."""
    model = ViT(tiny(dropout=0.3, head=head)).train()
    x, hidden = (0.3, (2, 17, 24)), (0.3, (2, 17, 40))
    block = [x, hidden, x]  # projection, first and second layer of the MLP
    first, first_hidden = (0.3, (2, 1, 24)), (0.3, (2, 1, 40))  # all that the head will see
    last = [first, first_hidden, first]
    assert record_drops(model, monkeypatch) == [x, *block, *last]


def test_no_dropout_in_evaluation_or_at_rate_zero(monkeypatch: pytest.MonkeyPatch):
    assert record_drops(ViT(tiny(dropout=0.3)).eval(), monkeypatch) == []
    assert record_drops(ViT(tiny()).train(), monkeypatch) == []


def test_evaluation_is_deterministic_and_training_is_not():
    model = ViT(tiny(dropout=0.5, drop_path=0.5))
    scatter(model)
    images = torch.randn(2, 3, 16, 16)
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def test_stochastic_depth_rises_linearly_from_zero():
    model = ViT(tiny(depth=5, drop_path=0.2))
    rates = [block.drop_path for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    assert ViT(tiny(depth=1, drop_path=0.2)).blocks[0].drop_path == 0


# What is off costs nothing -----------------------------------------------------------------------


def graph_nodes(output: Tensor) -> int:
    """Nodes of the autograd graph behind a tensor."""
    seen: set[Any] = set()
    todo = [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return len(seen)


def test_options_that_are_off_add_nothing():
    """A plain model has the paper's tensors and no other, and a graph as small in training mode as
    in evaluation; each option on adds to one of the two."""
    plain = ViT(tiny())
    names = set(plain.state_dict())
    per_block = {
        f"{part}.{kind}"
        for part in ("norm1", "attention.qkv", "attention.projection", "norm2")
        for kind in ("weight", "bias")
    } | {f"mlp.{part}.{kind}" for part in ("hidden", "output") for kind in ("weight", "bias")}
    assert names == {f"blocks.{i}.{name}" for i in range(2) for name in per_block} | {
        "patch_embedding.weight",
        "patch_embedding.bias",
        "class_token",
        "positions.0.table",
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    }
    images = torch.randn(2, 3, 16, 16)
    nodes = graph_nodes(plain.train()(images))
    assert nodes == graph_nodes(plain.eval()(images))
    for on in ({"dropout": 0.1}, {"drop_path": 0.1}):
        model = ViT(tiny(**on)).train()
        assert set(model.state_dict()) == names
        assert graph_nodes(model(images)) > nodes
        assert graph_nodes(model.eval()(images)) == nodes
    for on in ({"layer_scale": 0.1}, {"registers": 1}, {"qk_norm": True}, {"head": "mlp"}):
        model = ViT(tiny(**on))
        assert set(model.state_dict()) > names
        assert graph_nodes(model(images)) > nodes


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_forward_equals_the_head_on_the_features(options: dict[str, Any]):
    """`forward` leaves out what no logit needs; logits and gradients are those of all tokens."""
    torch.manual_seed(0)
    model = ViT(tiny(**options)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = torch.randn(3, model.spec.in_channels, *model.spec.image_size, dtype=torch.float64)
    x = model.encode(model.embed(images), model.spec.grid)  # all tokens
    plain = model.classify(model.features(images).pooled)
    if model.distillation_head is not None:
        plain = (plain + model.distillation_head(x[:, 1])) / 2
    found = []
    for logits in (model(images), plain):
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        found.append((logits, *gradients))
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)


# Multiply-accumulates ----------------------------------------------------------------------------


def counted_macs(spec: ViTSpec) -> int:
    """Half the FLOPs that torch counts for one image, without computing it."""
    with torch.device("meta"):
        model = ViT(spec).to("meta").eval().requires_grad_(False)
        images = torch.empty(1, spec.in_channels, *spec.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features = model.features(images)
        model.classify(features.pooled)
        if model.distillation_head is not None:
            model.distillation_head(features.tokens[:, 0])
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_macs_equal_torch_own_count(options: dict[str, Any]):
    assert macs(tiny(**options)) == counted_macs(tiny(**options))


def test_macs_of_a_real_model():
    spec = model_spec("ViT-B/16")
    assert isinstance(spec, ViTSpec)
    assert macs(spec) == counted_macs(spec)
    assert macs(spec) / 1e9 == pytest.approx(17.6, abs=0.05)  # section 4.4


# Initialisation ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide() -> dict[str, Tensor]:
    """The initial weights of a model wide enough to measure."""
    torch.manual_seed(1)
    model = create_model(
        "ViT-S/16", 10, 64, pool="map", registers=16, head="mlp", layer_scale=0.25, depth=2
    )
    return {name: p.detach() for name, p in model.named_parameters()}


def uniform(values: Tensor, variance: float) -> None:
    """Uniform around 0: the standard deviation to 2 %, the range to 1 % and never beyond."""
    bound = math.sqrt(3 * variance)
    assert values.std().item() == pytest.approx(math.sqrt(variance), rel=0.02)
    assert 0.99 * bound < values.abs().max().item() <= bound * (1 + 1e-6)
    assert abs(values.mean().item()) < 5 * math.sqrt(variance / values.numel())


@pytest.mark.parametrize("layer", [0, 1])
def test_initial_encoder(wide: dict[str, Tensor], layer: int):
    block = {
        name.removeprefix(f"blocks.{layer}."): p
        for name, p in wide.items()
        if name.startswith(f"blocks.{layer}.")
    }
    for part in (*block["attention.qkv.weight"].chunk(3), block["attention.projection.weight"]):
        uniform(part, 1 / 384)
    for name in ("mlp.hidden.weight", "mlp.output.weight"):
        uniform(block[name], 2 / (384 + 1536))
    for name in ("attention.qkv.bias", "attention.projection.bias", "norm1.bias", "norm2.bias"):
        assert not block[name].any()
    for name in ("mlp.hidden.bias", "mlp.output.bias"):
        assert block[name].std().item() == pytest.approx(1e-6, rel=0.15)
    for name in ("norm1.weight", "norm2.weight"):
        assert (block[name] == 1).all()
    assert (block["scale1"] == 0.25).all()
    assert (block["scale2"] == 0.25).all()


def test_initial_stem_and_heads(wide: dict[str, Tensor]):
    for name, fan_in in (("patch_embedding.weight", 768), ("pre_logits.weight", 384)):
        values, std = wide[name], 1 / math.sqrt(fan_in)
        assert values.std().item() == pytest.approx(std, rel=0.02)
        cut = 2 * std / 0.87962566
        assert 0.98 * cut < values.abs().max().item() <= cut * (1 + 1e-6)
    for name in ("positions.0.table", "registers"):
        assert wide[name].std().item() == pytest.approx(0.02, rel=0.05)
        assert wide[name].abs().max().item() > 2.5 * 0.02  # not truncated
    for part in wide["pool.key_value.weight"].chunk(2):
        uniform(part, 1 / 384)
    for name in ("pool.query.weight", "pool.projection.weight"):
        uniform(wide[name], 1 / 384)
    for name in ("head.weight", "head.bias", "patch_embedding.bias", "pre_logits.bias"):
        assert not wide[name].any()
    probe = wide["pool.probe"]
    assert probe.std().item() == pytest.approx(math.sqrt(2 / (1 + 384)), rel=0.1)


@pytest.mark.parametrize("options", [{}, {"pool": "gap"}, {"pool": "map", "head": "mlp"}])
def test_zero_head_gives_zero_logits(options: dict[str, Any]):
    model = ViT(tiny(**options))
    assert not model(torch.randn(2, 3, 16, 16)).any()
    assert model.features(torch.randn(2, 3, 16, 16)).pooled.any()
    if model.class_token is not None:
        assert not model.class_token.any()


def test_initial_weights_follow_the_seed():
    def draw(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return ViT(tiny(registers=2, pool="map", head="mlp")).state_dict()

    first, same, other = draw(3), draw(3), draw(4)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["registers"], other["registers"])


def test_every_tensor_is_initialised(monkeypatch: pytest.MonkeyPatch):
    """No weight is left as memory was found: memory is filled with NaN first."""

    def poisoned(*size: Any, **options: Any) -> Tensor:
        sides = size[0] if isinstance(size[0], tuple) else size
        return torch.full(sides, torch.nan, **options)

    everything = tiny(registers=2, pool="map", head="mlp", layer_scale=0.1, qk_norm=True)
    monkeypatch.setattr(torch, "empty", poisoned)
    for spec in (tiny(), everything):
        model = vit.ViT(spec)
        assert all(p.isfinite().all() for p in model.parameters())


def test_attention_heads_are_laid_out_as_documented():
    """Rows of qkv: all queries, all keys, all values, each head by head."""
    layer = SelfAttention(24, 3).double()
    scatter(layer)
    weights = {f"a.{name}": p.detach().numpy() for name, p in layer.named_parameters()}
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    wanted = self_attention(x[0].numpy(), weights, "a", tiny())
    np.testing.assert_allclose(layer(x)[0].detach().numpy(), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pool_norm", [False, True])
def test_tokens_are_those_that_are_pooled(pool_norm: bool):
    """After the last LayerNorm; with `pool_norm` before it, which the mean then goes through."""
    model = create_model("ViT-mu/8", 3, 16, pool="gap", pool_norm=pool_norm)
    assert isinstance(model, ViT)
    images = torch.randn(2, 3, *model.spec.image_size)
    pooled, tokens, _ = model.features(images)
    residual = model.embed(images)
    for block in model.blocks:
        residual = block(residual)
    average = tokens.mean(1)
    if pool_norm:
        torch.testing.assert_close(tokens, residual)
        torch.testing.assert_close(pooled, model.norm(average))
    else:
        torch.testing.assert_close(tokens, model.norm(residual))
        torch.testing.assert_close(pooled, average)
