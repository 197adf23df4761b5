"""Parameter groups, optimisers and learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from patchword.specs import OptimSpec


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to the weight matrices, not to biases, norms, LayerScale,
    tokens and position tables."""
    return parameter.ndim >= 2 and name.endswith("weight")


def build_optimizer(model: nn.Module, optim: OptimSpec) -> torch.optim.Optimizer:
    """AdamW or SGD with momentum over the model's parameters, fused where the device has it."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if optim.decay_all or is_decayed(name, p)]
    rest = [p for name, p in named if not (optim.decay_all or is_decayed(name, p))]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = {p.device.type for _, p in named} <= {"cpu", "cuda"}
    if optim.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), fused=fused)


def span(value: float, total: int) -> int:
    """Steps of a warm-up or cool-down: a share of the run below 1, else a number of steps."""
    return min(total, round(value * total if value < 1 else value))


def learning_rate(step: int, total: int, optim: OptimSpec) -> float:
    """The learning rate of step 0 <= `step` < `total`.

    Linear warm-up from lr / warm-up steps; then cosine or linear decay to `final_lr` (reached one
    step after the last), a constant, or 1 / sqrt(1 + steps / rsqrt_timescale); then, for the last
    two, linear cool-down to `final_lr`.
    """
    warmup = span(optim.warmup, total)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    past, length = step - warmup, max(1, total - warmup)
    if optim.schedule in ("cosine", "linear"):
        done = past / length
        share = 0.5 * (1 + math.cos(math.pi * done)) if optim.schedule == "cosine" else 1 - done
        return optim.final_lr + (optim.lr - optim.final_lr) * share
    rate = optim.lr
    if optim.schedule == "rsqrt":
        rate /= math.sqrt(1 + past / optim.rsqrt_timescale)
    cooldown = span(optim.cooldown, total)
    if cooldown and step > total - cooldown:
        rate = optim.final_lr + (rate - optim.final_lr) * (total - step) / cooldown
    return rate


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors by `"<slot>/<parameter>"`, such as `"exp_avg/norm.weight"`."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {
        f"{slot}/{names[p]}": value
        for p, slots in optimizer.state.items()
        for slot, value in slots.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """The inverse of `optimizer_state`. Raises `KeyError` on names the model does not have."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, value in tensors.items():
        slot, name = key.split("/", 1)
        p = parameters[name]
        optimizer.state[p][slot] = value.to(p.device, copy=True)
