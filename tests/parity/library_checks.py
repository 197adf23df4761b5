"""What the tests of timm's and torchvision's formats do with a random model of theirs: read it,
compare, write it, and read and compare again."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from parity_record import noted
from torch import Tensor, nn

from patchword.models.model import Model
from patchword.models.zoo import build_model
from patchword.weights import mapping
from patchword.weights.mapping import Reading, Written
from peers import define_torchvision_operators

define_torchvision_operators()
create = importlib.import_module("timm").create_model
EXACT = 1e-9
"""of float64 logits and gradients"""


def perturbed(model: nn.Module) -> nn.Module:
    """The model, with noise on all its parameters and buffers, in evaluation mode."""
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.add_(torch.randn_like(value), alpha=0.1)
    return model.eval()


def from_timm(architecture: str, **arguments: Any) -> nn.Module:
    """timm's model of these arguments, perturbed."""
    return perturbed(create(architecture, **arguments))


def find(
    module: ModuleType, tensors: Mapping[str, Tensor], config: Any = None, **hints: Any
) -> Reading:
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    config = json.loads(json.dumps(config or {}))
    assert module.recognises(shapes, config)
    return module.find(shapes, config, hints)


def build(tensors: Mapping[str, Tensor], found: Reading) -> Model:
    """The found model with their tensors."""
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    ours = mapping.read(lambda name: tensors[name], shapes, found, "model.safetensors")
    with torch.device("meta"):
        model = build_model(found.spec, preprocess=found.preprocess, classes=found.classes)
    model.load_state_dict({name: value.clone() for name, value in ours.items()}, assign=True)
    return model.requires_grad_().eval()


def relative(value: Tensor, reference: Tensor) -> float:
    assert value.shape == reference.shape
    return float((value - reference).abs().max() / reference.abs().max())


def images(model: Model, batch: int = 2) -> Tensor:
    return torch.randn(batch, model.spec.in_channels, *model.spec.image_size)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of a loss with respect to images and parameters, and the logits themselves."""
    values = dict(model.named_parameters())
    inputs = x.clone().requires_grad_()
    out = model(inputs)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
    found = torch.autograd.grad(loss + out.square().mean(), [inputs, *values.values()])
    return dict(zip(["images", *values], found, strict=True)) | {"logits": out.detach()}


def check_gradients(theirs: nn.Module, found: Reading, x: Tensor) -> None:
    """In float64, where no activation falls on the other side of a ReLU's corner by rounding. Of
    the parameters, those that one rule takes to one of ours."""
    ours = build(theirs.double().state_dict(), found)
    expected, given = (gradients(model, x.double()) for model in (theirs, ours))
    assert relative(given["logits"], expected["logits"]) < EXACT
    assert relative(given["images"], expected["images"]) < EXACT
    largest = max(float(value.abs().max()) for value in expected.values())
    compared = 0
    for rule in found.rules:
        if len(rule.ours) == len(rule.theirs) == 1:
            reference = rule.op.read([expected[rule.theirs[0]]])[0]
            difference = float((given[rule.ours[0]] - reference).abs().max())
            assert difference < EXACT * (float(reference.abs().max()) + 1e-3 * largest), rule.ours
            compared += 1
    assert compared > 10


def check(
    module: ModuleType,
    theirs: nn.Module,
    rebuild: Callable[[Written], nn.Module],
    config: Any = None,
    tolerance: float = 1e-5,
    **hints: Any,
) -> tuple[Model, Reading]:
    """Reads a model of theirs, compares, writes it, and compares what they make of that;
    `tolerance` is of float32 logits, largest difference over largest value."""
    tensors = theirs.state_dict()
    found = find(module, tensors, config, **hints)
    ours = build(tensors, found)
    x = images(ours)
    with torch.no_grad():
        assert noted(relative(ours(x), theirs(x))) < tolerance
    written = module.write(ours)
    again = find(module, written.tensors, written.config, **hints)
    assert again.spec == found.spec
    assert again.preprocess == found.preprocess
    for name, value in build(written.tensors, again).state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    copy = rebuild(written)
    copy.load_state_dict(written.tensors)
    with torch.no_grad():
        assert relative(copy.eval()(x), ours(x)) < tolerance
    check_gradients(theirs, found, x)
    return ours, found


def rebuilt_by_timm(written: Written) -> nn.Module:
    config = json.loads(json.dumps(written.config))
    return create(config["architecture"], **config["model_args"])
