"""What the tests of Google's formats do with a random file: find, build, compare, write back."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import flax_reference as reference
import numpy as np
import torch
from flax_reference import Array, Params
from parity_record import noted
from torch import nn

from patchword.models.model import Model
from patchword.models.zoo import build_model
from patchword.weights import mapping
from patchword.weights.mapping import Reading


def find(module: ModuleType, params: Params, **hints: Any) -> Reading:
    shapes = {name: value.shape for name, value in params.items()}
    assert module.recognises(shapes, {})
    return module.find(shapes, {}, hints)


def build(params: Params, found: Reading) -> Model:
    """The found model with the file's weights, in float32."""
    tensors = {name: torch.from_numpy(value).float() for name, value in params.items()}
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    ours = mapping.read(tensors.__getitem__, shapes, found, "model.npz")
    model = build_model(found.spec, preprocess=found.preprocess)
    model.load_state_dict(ours, strict=True)
    return model.eval()


def images(batch: int, height: int, width: int, channels: int = 3) -> Array:
    return np.random.default_rng(1).standard_normal((batch, height, width, channels))


def logits(model: nn.Module, x: Array) -> Array:
    """Of images with the channels last."""
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        return model(torch.from_numpy(x).permute(0, 3, 1, 2).to(dtype)).double().numpy()


def timm_logits(peer: Any, params: Params, path: Path, x: Array) -> Array:
    """Of a timm model, once it has read the file that holds `params`."""
    arrays: dict[str, Any] = {name: value.astype(np.float32) for name, value in params.items()}
    np.savez(path, **arrays)
    peer.load_pretrained(str(path))
    return logits(peer.eval(), x)


def check_logits(model: Model, expected: Array, x: Array, double: float = 1e-9) -> None:
    """In float32 and float64; leaves the model in float64."""
    assert noted(reference.relative(logits(model.float(), x), expected)) < 1e-5
    assert reference.relative(logits(model.double(), x), expected) < double


def check_gradients(
    model: Model, found: Reading, forward: Any, params: Params, names: list[str], x: Array
) -> None:
    """The gradients of a loss by two entries of each of their tensors: ours, carried over by the
    rules, against finite differences of the reference. The model is in float64."""
    rng = np.random.default_rng(2)
    weights = rng.standard_normal(logits(model, x).shape)
    loss = (model(torch.from_numpy(x).permute(0, 3, 1, 2)) * torch.from_numpy(weights)).sum()
    values = list(model.named_parameters())
    gradients = torch.autograd.grad(loss, [value for _, value in values])
    ours = {name: value for (name, _), value in zip(values, gradients, strict=True)}
    theirs = mapping.write(ours, found.rules)
    for name in names:
        for _ in range(2):
            index = tuple(rng.integers(size) for size in params[name].shape)
            expected = reference.slope(
                lambda p: (forward(p, x) * weights).sum(), params, name, index
            )
            scale = float(theirs[name].abs().max())
            assert scale > 0
            assert abs(float(theirs[name][index]) - expected) < 1e-6 * scale + 1e-8, name


def check_same(tensors: dict[str, torch.Tensor], params: Params) -> None:
    """Exactly the file's names, shapes and values."""
    assert tensors.keys() == params.keys()
    for name, value in tensors.items():
        assert value.shape == params[name].shape, name
        assert torch.equal(value.double(), torch.from_numpy(params[name])), name
