"""No number of the batch in a forward pass: what is exported or traced with two images takes any
number of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from patchword.models.model import Model
from patchword.models.zoo import create_model

Perturb = Callable[[nn.Module], None]
TINY: dict[str, Any] = {"depth": 2, "width": 24, "mlp_width": 32, "heads": 3}
VITS: dict[str, dict[str, Any]] = {
    "token": {},
    "average": {"pool": "gap", "pool_norm": True},
    "attention pooling": {"pool": "map", "head": "mlp"},
    "token and average": {"pool": "token+gap", "position": "none"},
    "a table in every layer": {"position": "learned-2d", "position_at": "every", "registers": 2},
    "sin-cos, shared": {"position": "sincos2d", "position_at": "every-shared"},
    "relative": {"position": "relative", "position_at": "every"},
    "rotary": {"position": "rotary", "registers": 1},
    "SwiGLU": {"activation": "swiglu"},
    "normalised": {"qk_norm": True, "layer_scale": 0.1, "registers": 2, "pool": "gap"},
    "distillation": {"distillation": "head", "activation": "gelu_tanh"},
    "features": {"num_classes": 0},
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("ViT-mu/8", TINY | options) for name, options in VITS.items()},
    "hybrid": ("R+ViT-Ti/16", TINY),
    "hybrid of bottlenecks": ("R26+ViT-S/32", TINY),
    "BiT": ("BiT-R50x1", {"layers": (1, 1, 1, 1)}),
    "Mixer": ("Mixer-S/8", {"depth": 2, "width": 16, "drop_path": 0.1}),
}
RESIZED = {"a table in every layer", "sin-cos, shared", "relative", "rotary", "token"}


def made(name: str, perturb: Perturb, size: int = 32) -> Model:
    variant, options = FAMILIES[name]
    settings: dict[str, Any] = {"num_classes": 5, "image_size": size} | options
    model = create_model(variant, **settings).eval()
    perturb(model)
    return model


def check(exported: Callable[[Tensor], Tensor], model: Model, size: tuple[int, int]) -> None:
    with torch.no_grad():
        for count in (1, 3, 8):
            images = torch.randn(count, 3, *size)
            torch.testing.assert_close(exported(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_exported_program_takes_any_batch(name: str, perturb: Perturb):
    model = made(name, perturb)
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        model, (torch.randn(2, 3, 32, 32),), dynamic_shapes={"images": {0: batch}}
    )
    check(program.module(), model, (32, 32))


@pytest.mark.parametrize("name", sorted(RESIZED))
def test_an_exported_program_of_another_size_takes_any_batch(name: str, perturb: Perturb):
    model = made(name, perturb)
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        model, (torch.randn(2, 3, 16, 24),), dynamic_shapes={"images": {0: batch}}
    )
    check(program.module(), model, (16, 24))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_trace_takes_any_batch(name: str, perturb: Perturb):
    model = made(name, perturb)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # the size of the images is fixed
        traced: Any = torch.jit.trace(model, (torch.randn(2, 3, 32, 32),))
    check(traced, model, (32, 32))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name", ["rotary", "attention pooling"])
def test_an_onnx_graph_takes_any_batch(name: str, perturb: Perturb):
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    model = made(name, perturb)
    program = torch.onnx.export(
        model, (torch.randn(2, 3, 32, 32),), dynamo=True, dynamic_shapes={"images": {0: "batch"}}
    )
    assert program is not None
    graph: Any = ReferenceEvaluator(program.model_proto)
    (key,) = graph.input_names
    check(lambda images: torch.tensor(graph.run(None, {key: images.numpy()})[0]), model, (32, 32))
