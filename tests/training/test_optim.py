"""Parameter groups, schedules, and the optimisers against their papers in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from patchword.models.zoo import create_model
from patchword.spec.train import OptimSpec
from patchword.training.optim import (
    build_optimizer,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
    span,
)


def everything() -> nn.Module:
    return create_model(
        "ViT-mu/8", 5, 16, registers=2, layer_scale=0.1, qk_norm=True, head="mlp", depth=2
    )


def decayed_names(model: nn.Module, optim: OptimSpec) -> set[str]:
    names = {p: name for name, p in model.named_parameters()}
    groups = build_optimizer(dict(model.named_parameters()), optim).param_groups
    seen = [names[p] for group in groups for p in group["params"]]
    assert sorted(seen) == sorted(names.values())  # each once
    return {names[p] for g in groups if g["weight_decay"] == 0.3 for p in g["params"]}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_decay_spares_biases_norms_tokens_and_tables(optimizer: Any):
    optim = OptimSpec(optimizer=optimizer, weight_decay=0.3)
    matrices = {"attention.qkv", "attention.projection", "mlp.hidden", "mlp.output"}
    wanted = {f"blocks.{i}.{name}.weight" for i in range(2) for name in matrices}
    wanted |= {"patch_embedding.weight", "pre_logits.weight", "head.weight"}
    assert decayed_names(everything(), optim) == wanted


def test_decay_of_the_pooling_head():
    model = create_model("ViT-mu/8", 5, 16, pool="map")
    names = decayed_names(model, OptimSpec(weight_decay=0.3))
    assert "pool.probe" not in names
    assert {"pool.query.weight", "pool.key_value.weight", "pool.projection.weight"} <= names
    assert "pool.norm.weight" not in names


def test_decay_all():
    model = everything()
    names = decayed_names(model, OptimSpec(weight_decay=0.3, decay_all=True))
    assert names == {name for name, _ in model.named_parameters()}


def scales_of(name: str, decay: float, **options: Any) -> dict[str, float]:
    with torch.device("meta"):
        model = create_model(name, 5, **options)
    optim = OptimSpec(layer_decay=decay, lr=0.5)
    names = {p: name for name, p in model.named_parameters()}
    groups = build_optimizer(dict(model.named_parameters()), optim).param_groups
    found = {names[p]: group["scale"] for group in groups for p in group["params"]}
    assert found.keys() == set(names.values())
    assert sum(len(group["params"]) for group in groups) == len(names)
    return found


EVERYTHING: dict[str, Any] = {"registers": 2, "head": "mlp", "distillation": "head"}


@pytest.mark.parametrize(
    ("name", "options", "inner", "depth"),
    [
        ("ViT-mu/8", EVERYTHING, "blocks", 2),
        ("ViT-mu/8", {"pool": "map", "position": "relative", "position_at": "stem"}, "blocks", 2),
        ("R50+ViT-B/16", {"depth": 2}, "blocks", 2),
        ("Mixer-S/32", {"depth": 3}, "blocks", 3),
        ("BiT-R50x1", {}, "stages", 4),
    ],
)
def test_layer_decay_by_depth(name: str, options: dict[str, Any], inner: str, depth: int):
    """The head's rate is the peak, each block's lower by the decay, the embedding's lowest."""
    options = ({"depth": 2} if "mu" in name else {}) | {"image_size": 64} | options
    found = scales_of(name, 0.5, **options)
    top = depth + 1
    after = ("head.", "pre_logits.", "distillation_head.", "norm.", "pool.")
    for parameter, scale in found.items():
        if parameter.startswith(f"{inner}."):
            layer = int(parameter.split(".")[1]) + 1
        else:
            layer = top if parameter.startswith(after) else 0
        assert scale == 0.5 ** (top - layer), parameter
    assert {found[n] for n in found if n.startswith(("stem.", "root.", "patch_emb"))} == {0.5**top}


def test_layer_decay_of_tables_of_every_layer():
    found = scales_of("ViT-mu/8", 0.5, image_size=16, depth=3, position_at="every")
    tables = {n.split(".")[1]: scale for n, scale in found.items() if n.startswith("positions.")}
    assert tables == {"0": 0.5**4, "1": 0.5**3, "2": 0.5**2}


def test_no_layer_decay_is_one_rate():
    assert set(scales_of("ViT-mu/8", 1.0, image_size=16).values()) == {1.0}


# Schedules ---------------------------------------------------------------------------------------

schedules = st.sampled_from(["cosine", "linear", "rsqrt", "constant"])


@given(
    schedules,
    st.integers(1, 2000),
    st.one_of(st.floats(0, 0.99), st.integers(1, 3000).map(float)),
    st.one_of(st.floats(0, 0.99), st.integers(1, 3000).map(float)),
    st.floats(0, 1),
)
def test_schedules_stay_within_bounds(
    schedule: Any, total: int, warmup: float, cooldown: float, final: float
):
    lr = 2.0
    optim = OptimSpec(
        lr=lr,
        schedule=schedule,
        warmup=warmup,
        cooldown=cooldown,
        final_lr=final,
        rsqrt_timescale=50,
    )
    rates = [learning_rate(step, total, optim) for step in range(total)]
    first = span(warmup, total)
    assert 0 <= first <= total
    assert all(0 <= rate <= lr * (1 + 1e-12) for rate in rates)
    assert all(rate > 0 for rate in rates)
    ascent = rates[:first]
    assert ascent == sorted(ascent)
    if first and (schedule in ("cosine", "linear") or first <= total - span(cooldown, total)):
        assert rates[first - 1] == pytest.approx(lr)  # the peak, then down from it
        if first < total:
            assert rates[first] == pytest.approx(lr)
    if schedule in ("cosine", "linear"):
        descent = rates[first:]
        assert descent == sorted(descent, reverse=True)
        if total > first:
            assert learning_rate(total, total, optim) == pytest.approx(final, abs=1e-12)


def test_shape_of_each_schedule():
    def at(step: int, schedule: Any, **changes: Any) -> float:
        optim = OptimSpec(lr=1.0, schedule=schedule, warmup=100.0, **changes)
        return learning_rate(step, 1100, optim)

    for schedule in ("cosine", "linear", "rsqrt", "constant"):
        assert at(0, schedule) == pytest.approx(0.01)
        assert at(49, schedule) == pytest.approx(0.5)
        assert at(100, schedule) == pytest.approx(1.0)
    assert at(600, "cosine") == pytest.approx(0.5)
    assert at(350, "cosine") == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert at(350, "linear") == pytest.approx(0.75)
    assert at(600, "linear", final_lr=0.2) == pytest.approx(0.6)
    assert at(400, "rsqrt", rsqrt_timescale=100) == pytest.approx(0.5)
    assert at(1099, "constant") == 1.0
    assert at(1000, "constant", cooldown=200.0) == pytest.approx(0.5)
    assert at(1099, "constant", cooldown=200.0) == pytest.approx(1 / 200)
    assert at(900, "rsqrt", rsqrt_timescale=100, cooldown=200.0) == pytest.approx(1 / 3)
    assert at(1000, "rsqrt", rsqrt_timescale=300, cooldown=200.0) == pytest.approx(0.25)


def test_spans_are_shares_or_steps():
    assert span(0.0, 100) == 0
    assert span(0.25, 100) == 25
    assert span(1.0, 100) == 1
    assert span(30.0, 100) == 30
    assert span(10_000.0, 100) == 100


# The optimisers ----------------------------------------------------------------------------------


class Pair(nn.Module):
    """One decayed matrix and one vector that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(3, dtype=torch.float64))


def steps_of(model: Pair, optim: OptimSpec, gradients: list[dict[str, np.ndarray]]) -> None:
    optimizer = build_optimizer(dict(model.named_parameters()), optim)
    for step, gradient in enumerate(gradients):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        for name, p in model.named_parameters():
            p.grad = torch.from_numpy(gradient[name])
        optimizer.step()


def random_gradients(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"weight": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)} for _ in range(count)]


def test_adamw_is_that_of_the_paper():
    """Loshchilov and Hutter, algorithm 2, with decay multiplied by the learning rate."""
    model, gradients = Pair(), random_gradients(20)
    values = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    steps_of(model, OptimSpec(weight_decay=0.2, beta1=0.8, beta2=0.95), gradients)
    for name, theta in values.items():
        m, v = np.zeros_like(theta), np.zeros_like(theta)
        for t, gradient in enumerate(gradients, start=1):
            g, lr = gradient[name], 0.1 / t
            m = 0.8 * m + 0.2 * g
            v = 0.95 * v + 0.05 * g * g
            update = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
            theta = theta - lr * (update + (0.2 if name == "weight" else 0) * theta)
        found = dict(model.named_parameters())[name].detach().numpy()
        np.testing.assert_allclose(found, theta, rtol=1e-10, atol=1e-12)


def test_sgd_with_momentum():
    """v = momentum v + g + decay theta; theta = theta - lr v."""
    model, gradients = Pair(), random_gradients(20)
    values = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    steps_of(model, OptimSpec(optimizer="sgd", weight_decay=0.2, momentum=0.7), gradients)
    for name, theta in values.items():
        velocity = np.zeros_like(theta)
        for t, gradient in enumerate(gradients, start=1):
            decay = 0.2 if name == "weight" else 0.0
            velocity = 0.7 * velocity + gradient[name] + decay * theta
            theta = theta - 0.1 / t * velocity
        found = dict(model.named_parameters())[name].detach().numpy()
        np.testing.assert_allclose(found, theta, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_state_round_trip_goes_on_bit_for_bit(optimizer: Any):
    optim = OptimSpec(optimizer=optimizer)
    gradients = random_gradients(6)

    def advance(model: Pair, opt: torch.optim.Optimizer, some: list[Any]) -> None:
        for gradient in some:
            for name, p in model.named_parameters():
                p.grad = torch.from_numpy(gradient[name])
            opt.step()

    model = Pair()
    first = build_optimizer(dict(model.named_parameters()), optim)
    advance(model, first, gradients[:3])
    state = {
        key: value.clone()
        for key, value in optimizer_state(dict(model.named_parameters()), first).items()
    }
    slots = {"adamw": {"exp_avg", "exp_avg_sq", "step"}, "sgd": {"momentum_buffer"}}[optimizer]
    assert set(state) == {f"{slot}/{name}" for slot in slots for name in ("weight", "bias")}

    copy = Pair()
    copy.load_state_dict(model.state_dict())
    second = build_optimizer(dict(copy.named_parameters()), optim)
    load_optimizer_state(dict(copy.named_parameters()), second, state)
    assert optimizer_state(dict(copy.named_parameters()), second).keys() == state.keys()
    advance(model, first, gradients[3:])
    advance(copy, second, gradients[3:])
    for name, p in model.named_parameters():
        assert torch.equal(p, dict(copy.named_parameters())[name])
    kept = optimizer_state(dict(copy.named_parameters()), second)
    assert any(not torch.equal(kept[key], state[key]) for key in state)  # not the same memory


def test_state_of_another_model_is_refused():
    model = Pair()
    trained = dict(model.named_parameters())
    optimizer = build_optimizer(trained, OptimSpec())
    with pytest.raises(KeyError):
        load_optimizer_state(trained, optimizer, {"exp_avg/head.weight": torch.zeros(1)})
