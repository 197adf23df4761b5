"""Parameter groups, optimisers and learning-rate schedules."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from patchword.spec.train import OptimSpec


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to the weight matrices and LoRA's additions to them, not to
    biases, norms, LayerScale, tokens and position tables."""
    return parameter.ndim >= 2 and name.endswith(("weight", "weight.down", "weight.up"))


BOTTOM = (
    *("patch_embedding.", "class_token", "distillation_token", "registers"),
    *("stem.", "root.", "positions.0."),
)
"""How the names of the parameters before the first block begin."""


def layer_of(name: str) -> int | None:
    """How many blocks, or a ResNet's stages, a parameter comes after, itself counted: 0 for the
    embedding and a hybrid's stem, i + 1 for block i; None after the last one: norm and heads. A
    position table of a layer of its own counts to the block before."""
    if name.startswith(BOTTOM):
        return 0
    found = re.match(r"(blocks|stages|positions)\.(\d+)\.", name)
    return None if found is None else int(found[2]) + (found[1] != "positions")


def layer_scales(names: Iterable[str], decay: float) -> dict[str, float]:
    """By parameter, what its learning rate is multiplied by: `decay` to the power of the layers
    between it and the head (BEiT, arXiv 2106.08254; MAE, arXiv 2111.06377, A.1)."""
    layers = {name: layer_of(name) for name in names}
    top = 1 + max((layer for layer in layers.values() if layer is not None), default=0)
    return {name: decay ** (0 if layer is None else top - layer) for name, layer in layers.items()}


def build_optimizer(trained: Mapping[str, nn.Parameter], optim: OptimSpec) -> torch.optim.Optimizer:
    """AdamW or SGD with momentum over the parameters `trained` by name, fused where the device has
    it. A group's `scale` is what the learning rate is to be multiplied by."""
    scales = layer_scales(trained, optim.layer_decay)
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in trained.items():
        decayed = optim.decay_all or is_decayed(name, p)
        key = (scales[name], optim.weight_decay if decayed else 0.0)
        members.setdefault(key, []).append(p)
    groups: list[dict[str, Any]] = [
        {"params": params, "weight_decay": decay, "scale": scale}
        for (scale, decay), params in members.items()
    ]
    fused = {p.device.type for p in trained.values()} <= {"cpu", "cuda"}
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


def optimizer_state(
    trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """The optimiser's tensors by `"<slot>/<parameter>"`, such as `"exp_avg/norm.weight"`."""
    names: dict[Tensor, str] = {p: name for name, p in trained.items()}
    return {
        f"{slot}/{names[p]}": value
        for p, slots in optimizer.state.items()
        for slot, value in slots.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_state(
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
) -> None:
    """The inverse of `optimizer_state`. Raises `KeyError` on names that are not trained."""
    optimizer.state.clear()
    for key, value in tensors.items():
        slot, name = key.split("/", 1)
        p = trained[name]
        optimizer.state[p][slot] = value.to(p.device, copy=True)
