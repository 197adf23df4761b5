"""A model in training: one update, and the state that a checkpoint holds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from patchword.data.seeding import derived_seed
from patchword.models.model import Model
from patchword.objectives import create_objective
from patchword.objectives.base import body, parts_of
from patchword.session.device import Working, resolve_precision
from patchword.spec.settled import Settled
from patchword.training.average import Average
from patchword.training.checkpoint import write_text
from patchword.training.optim import build_optimizer, load_optimizer_state, optimizer_state
from patchword.training.tuning import Adapters, freeze
from patchword.weights.native import load_tensors, save_tensors, write_model


@dataclass
class Progress:
    """Everything a checkpoint holds besides tensors."""

    step: int = 0
    """updates done"""
    position: int = 0
    """batches drawn; ahead of `step` by those that a rollback passed over"""
    loss_sum: float = 0.0
    loss_count: int = 0
    """of the steps since the last log line"""
    best: float | None = None
    """what the weights kept as the best reached on val by the run's criterion"""
    best_step: int = 0
    best_position: int = 0
    """names the folder of the best weights: unlike steps, positions never come twice"""
    best_weights: str = "raw"
    top: float | None = None
    """the best that any weights reached"""
    ready: float | None = None
    """what the head that the run began with reached"""
    evaluated: int = -1
    """step of the last evaluation that was not cut short"""
    seconds: float = 0.0
    """training time, evaluations and checkpoints not counted"""
    rollbacks: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    """unreadable images: position in the source -> reason"""

    def count(self, loss: float) -> None:
        """One more update is done."""
        self.step += 1
        self.position += 1
        self.loss_sum += loss
        self.loss_count += 1


HeadValues = tuple[Tensor, Tensor]
"""Weight `[K, D]` and bias `[K]` of a linear head."""


@torch.no_grad()
def set_head(layer: nn.Linear, head: HeadValues) -> None:
    """Copy a head's values into a layer."""
    layer.weight.copy_(head[0])
    layer.bias.copy_(head[1])


@contextmanager
def wearing(models: Sequence[Model], head: HeadValues | None) -> Iterator[None]:
    """Models with another head, if one is given, for a while."""
    layers = [model.head for model in models if head and model.head is not None]
    kept = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in layers]
    try:
        for layer in layers:
            set_head(layer, cast(HeadValues, head))
        yield
    finally:
        for layer, own in zip(layers, kept, strict=True):
            set_head(layer, own)


FILES = {
    "raw": ("model.safetensors", "objective.safetensors"),
    "average": ("average.safetensors", "average-objective.safetensors"),
}
"""In a checkpoint: the file of a model, and of what its objective trains besides."""


def read_weights(network: nn.Module, folder: Path, names: tuple[str, str]) -> None:
    """The inverse of `Trainer.write_weights`, into a network of the same kind."""
    body(network).load_state_dict(load_tensors(folder / names[0])[0])
    parts = parts_of(network)
    if parts is not None:
        parts.load_state_dict(load_tensors(folder / names[1])[0])


class Trainer:
    """A model in training: weights, average, optimiser, progress; saved and restored together."""

    def __init__(self, model: Model, settled: Settled, class_weights: Tensor | None = None) -> None:
        """`class_weights`, float `[K]`: what the loss of an image counts by its class."""
        request, optim = settled.request, settled.optim
        self.settled = settled
        self.device = torch.device(settled.device)
        self.model = model.to(self.device).train()
        weights = None if class_weights is None else class_weights.to(self.device)
        self.objective = create_objective(request, self.model, weights)
        self.network = self.objective.network(self.model).to(self.device).train()
        freeze(self.model, request.tuning)
        self.average = Average(self.network, optim.average) if optim.average else None
        dtype = resolve_precision(settled.precision, self.device)
        self.working = Working(self.network, dtype, request.compile)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if self.objective.parts is not None:
            own = self.objective.parts.named_parameters()
            self.trained |= {f"objective.{name}": p for name, p in own}
        self.adapters: Adapters | None = None
        if request.tuning.tune == "lora":
            self.adapters = Adapters(self.model, self.working.module, request.tuning, request.seed)
            for name in self.adapters.base:
                del self.trained[name]
            self.trained |= self.adapters.parameters
        self.optimizer = build_optimizer(self.trained, optim)
        self.progress = Progress()

    def step(self, inputs: Tensor, targets: Tensor, lr: float) -> tuple[float, float]:
        """One update. Returns loss and gradient norm; if either is not finite, nothing changed."""
        count, clip = self.settled.parts, self.settled.optim.clip
        self.working.train()
        loss = torch.zeros((), device=self.device)
        parts = zip(inputs.chunk(count), targets.chunk(count), strict=True)
        for number, (images, wanted) in enumerate(parts):
            seed, position = self.settled.request.seed, self.progress.position
            torch.manual_seed(derived_seed(seed, "model", position, number))
            share = self.objective.loss(self.working, images, wanted) / count
            share.backward()
            self.working.collect()
            loss += share.detach()
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if clip:
            torch._foreach_mul_(gradients, (clip / (norm + 1e-6)).clamp(max=1.0))
        values = torch.stack([loss, norm]).tolist()
        if all(map(math.isfinite, values)):
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            self.optimizer.step()
            if self.adapters:
                self.adapters.merge()
            self.working.refresh()
            if self.average:
                self.average.update(self.network, self.progress.step)
        self.optimizer.zero_grad(set_to_none=True)
        return values[0], values[1]

    @property
    def networks(self) -> dict[str, nn.Module]:
        """What can be measured: the raw weights, and the average where there is one."""
        average = {"average": self.average.network} if self.average else {}
        return {"raw": self.network} | average

    def wearing(self, head: HeadValues | None) -> AbstractContextManager[None]:
        """The model and its average with another head, if one is given, for a while."""
        return wearing([body(network) for network in self.networks.values()], head)

    def write(self, folder: Path) -> None:
        """Put the whole state into a checkpoint folder. Raises `OSError`."""
        for weights in self.networks:
            self.write_weights(folder, weights, FILES[weights])
        if self.adapters:
            save_tensors(folder / "adapters.safetensors", self.adapters.state(), {})
        tensors = optimizer_state(self.trained, self.optimizer)
        save_tensors(folder / "optimizer.safetensors", tensors, {})
        write_text(folder / "state.json", json.dumps(asdict(self.progress), indent=1))

    def write_weights(self, folder: Path, weights: str, names: tuple[str, str]) -> None:
        """Put a network's model, and the parts of the objective if there are any, into a folder,
        each in a file of its own. Raises `OSError`."""
        network, step = self.networks[weights], self.progress.step
        write_model(folder / names[0], body(network), step=step, weights=weights)
        parts = parts_of(network)
        if parts is not None:
            save_tensors(folder / names[1], parts.state_dict(), {})

    def read(self, folder: Path, state: dict[str, Any]) -> None:
        """Take over the state that `write` left in a checkpoint folder."""
        for weights, network in self.networks.items():
            read_weights(network, folder, FILES[weights])
        if self.adapters:
            self.adapters.load_state(load_tensors(folder / "adapters.safetensors")[0])
        tensors, _ = load_tensors(folder / "optimizer.safetensors")
        load_optimizer_state(self.trained, self.optimizer, tensors)
        self.working.refresh(frozen=True)
        self.progress = Progress(**state)
