"""A model in training: one update, and the state that a checkpoint holds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from patchword.data.seeding import derived_seed
from patchword.models.model import Model
from patchword.specs import TrainSpec
from patchword.training.averaging import Average
from patchword.training.checkpoint import write_text
from patchword.training.objectives import classification_loss
from patchword.training.optim import build_optimizer, load_optimizer_state, optimizer_state
from patchword.training.parallel import Working
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
    """top-1 on val of the best weights; of equals, the later ones"""
    best_step: int = 0
    best_position: int = 0
    """names the folder of the best weights: unlike steps, positions never come twice"""
    best_weights: str = "raw"
    evaluated: int = -1
    """step of the last evaluation that was not cut short"""
    seconds: float = 0.0
    """training time, evaluations and checkpoints not counted"""
    rollbacks: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    """unreadable images: position in the source -> reason"""


Head = tuple[Tensor, Tensor]
"""Weight `[K, D]` and bias `[K]` of a linear head."""


@torch.no_grad()
def set_head(layer: nn.Linear, head: Head) -> None:
    """Copy a head's values into a layer."""
    layer.weight.copy_(head[0])
    layer.bias.copy_(head[1])


class Trainer:
    """A model in training: weights, average, optimiser, progress; saved and restored together."""

    def __init__(
        self,
        model: Model,
        spec: TrainSpec,
        device: torch.device,
        dtype: torch.dtype,
        class_weights: Tensor | None = None,
    ) -> None:
        """`class_weights`, float `[K]`: what the loss of an image counts by its class."""
        self.model = model.to(device).train()
        self.spec = spec
        self.device = device
        self.class_weights = None if class_weights is None else class_weights.to(device)
        freeze(self.model, spec.tuning)
        self.average = Average(self.model, spec.optim.average) if spec.optim.average else None
        self.working = Working(self.model, dtype, spec.compile)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.adapters: Adapters | None = None
        if spec.tuning.tune == "lora":
            self.adapters = Adapters(self.model, self.working.module, spec.tuning, spec.seed)
            for name in self.adapters.base:
                del self.trained[name]
            self.trained |= self.adapters.parameters
        self.optimizer = build_optimizer(self.trained, spec.optim)
        self.progress = Progress()

    def step(self, inputs: Tensor, targets: Tensor, lr: float) -> tuple[float, float]:
        """One update. Returns loss and gradient norm; if either is not finite, nothing changed."""
        optim = self.spec.optim
        self.working.train()
        loss = torch.zeros((), device=self.device)
        chunks = zip(inputs.chunk(optim.accumulate), targets.chunk(optim.accumulate), strict=True)
        for micro, (images, wanted) in enumerate(chunks):
            torch.manual_seed(derived_seed(self.spec.seed, "model", self.progress.position, micro))
            logits = self.working(images)
            part = classification_loss(logits, wanted, optim, self.class_weights)
            part = part / optim.accumulate
            part.backward()
            self.working.collect()
            loss += part.detach()
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if optim.clip:
            torch._foreach_mul_(gradients, (optim.clip / (norm + 1e-6)).clamp(max=1.0))
        values = torch.stack([loss, norm]).tolist()
        if all(map(math.isfinite, values)):
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            self.optimizer.step()
            if self.adapters:
                self.adapters.merge()
            self.working.refresh()
            if self.average:
                self.average.update(self.model, self.progress.step)
        self.optimizer.zero_grad(set_to_none=True)
        return values[0], values[1]

    @contextmanager
    def wearing(self, head: Head | None) -> Iterator[None]:
        """The model and its average with another head, if one is given, for a while."""
        models = [self.model, *([self.average.model] if self.average else [])]
        layers = [model.head for model in models if head and model.head is not None]
        kept = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in layers]
        try:
            for layer in layers:
                set_head(layer, cast(Head, head))
            yield
        finally:
            for layer, own in zip(layers, kept, strict=True):
                set_head(layer, own)

    def write(self, folder: Path) -> None:
        """Put the whole state into a checkpoint folder. Raises `OSError`."""
        step = self.progress.step
        write_model(folder / "model.safetensors", self.model, step=step, weights="raw")
        if self.average:
            write_model(
                folder / "average.safetensors", self.average.model, step=step, weights="average"
            )
        if self.adapters:
            save_tensors(folder / "adapters.safetensors", self.adapters.state(), {})
        tensors = optimizer_state(self.trained, self.optimizer)
        save_tensors(folder / "optimizer.safetensors", tensors, {})
        write_text(folder / "state.json", json.dumps(asdict(self.progress), indent=1))

    def read(self, folder: Path, state: dict[str, Any]) -> None:
        """Take over the state that `write` left in a checkpoint folder."""
        self.model.load_state_dict(load_tensors(folder / "model.safetensors")[0])
        if self.average:
            tensors, _ = load_tensors(folder / "average.safetensors")
            self.average.model.load_state_dict(tensors)
        if self.adapters:
            self.adapters.load_state(load_tensors(folder / "adapters.safetensors")[0])
        tensors, _ = load_tensors(folder / "optimizer.safetensors")
        load_optimizer_state(self.trained, self.optimizer, tensors)
        self.working.refresh(frozen=True)
        self.progress = Progress(**state)
