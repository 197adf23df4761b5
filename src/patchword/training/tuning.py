"""Which weights are trained: all, those of the last blocks, or low-rank additions to all blocks.

Applied to a model from outside. Its weights are plain and whole at any time, so that evaluating,
averaging and saving need not know.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from patchword.data.seeding import derived_seed
from patchword.models.model import Model
from patchword.models.zoo import variant_name
from patchword.spec.parse import UsageError
from patchword.spec.train import TuneSpec
from patchword.training.optim import layer_of


def trained_names(model: Model, tuning: TuneSpec) -> list[str]:
    """The parameters that gradients are needed of, in the model's order; with `lora` those that
    something is added to are among them.

    Raises `UsageError` if the model has not so many blocks, or with `lora` no matrices in them.
    """
    names = [name for name, _ in model.named_parameters()]
    if tuning.tune == "all":
        return names
    blocks = list(dict.fromkeys(found for found in map(_block, names) if found))
    if tuning.tune == "last":
        if tuning.last_blocks > len(blocks):
            raise UsageError(
                f"{variant_name(model.spec)} has {len(blocks)} blocks, not the "
                f"{tuning.last_blocks} of --last-blocks; give fewer, or --tune all"
            )
        inner = set(blocks[len(blocks) - tuning.last_blocks :])
        return [name for name in names if layer_of(name) is None or _block(name) in inner]
    adapted = set(adapted_names(model))
    if not adapted:
        raise UsageError(
            f"the blocks of {variant_name(model.spec)} have no matrices that --tune lora could "
            "add to; use --tune last or all"
        )
    return [name for name in names if layer_of(name) is None or name in adapted]


def _block(name: str) -> str | None:
    """The block that a parameter is in, such as `blocks.3` or `stages.0.2`."""
    found = re.match(r"blocks\.\d+|stages\.\d+\.\d+", name)
    return found and found[0]


def adapted_names(model: nn.Module) -> list[str]:
    """The weights of the linear layers in the blocks: qkv, projection, and both of each MLP."""
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _block(name)
    ]


def trained_count(model: Model, tuning: TuneSpec) -> int:
    """How many numbers are trained."""
    adapted = set(adapted_names(model)) if tuning.tune == "lora" else set[str]()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return sum(
        tuning.lora_rank * sum(shapes[name]) if name in adapted else shapes[name].numel()
        for name in trained_names(model, tuning)
    )


def freeze(model: Model, tuning: TuneSpec) -> None:
    """Let only `trained_names` require gradients: for what lies below the lowest of them, nothing
    is kept in the forward pass and nothing computed in the backward pass. Raises `UsageError`."""
    trained = set(trained_names(model, tuning))
    for name, p in model.named_parameters():
        p.requires_grad_(name in trained)


class Adapters:
    """Low-rank additions to the matrices of a model's blocks (LoRA, arXiv 2106.09685): weight =
    base + alpha / rank * up @ down, `[out, rank]` and `[rank, in]`.

    `up` starts at zero, `down` uniform in +-1 / sqrt(in), as in the authors' public code. The
    matrices of `master` hold the sum; the gradients that `working` (the master itself, or the copy
    of it that computes) gets for them go to the additions at once, and are freed.
    """

    def __init__(self, master: nn.Module, working: nn.Module, tuning: TuneSpec, seed: int) -> None:
        self.scale = tuning.lora_alpha / tuning.lora_rank
        weights, computing = dict(master.named_parameters()), dict(working.named_parameters())
        self.names = adapted_names(master)
        self.weights: dict[str, Tensor] = {name: weights[name] for name in self.names}
        self.base = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.parameters: dict[str, nn.Parameter] = {}
        """float32, by `<weight>.down` and `<weight>.up`"""
        for number, (name, base) in enumerate(self.base.items()):
            rows, columns = base.shape
            generator = torch.Generator().manual_seed(derived_seed(seed, "lora", number))
            down = torch.empty(tuning.lora_rank, columns)
            down.uniform_(-1 / math.sqrt(columns), 1 / math.sqrt(columns), generator=generator)
            up = torch.zeros(rows, tuning.lora_rank)
            self.parameters[f"{name}.down"] = nn.Parameter(down.to(base.device))
            self.parameters[f"{name}.up"] = nn.Parameter(up.to(base.device))
            computing[name].register_post_accumulate_grad_hook(self._taker(name))

    def _taker(self, name: str) -> Callable[[Tensor], None]:
        down, up = self._pair(name)

        def take(weight: Tensor) -> None:
            gradient = weight.grad
            if gradient is None:
                raise RuntimeError(f"{name} has additions of another trainer; load the model anew")
            weight.grad = None
            gradient = gradient.float()
            _add_gradient(down, up.detach().T @ gradient * self.scale)
            _add_gradient(up, gradient @ down.detach().T * self.scale)

        return take

    def _pair(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self.parameters[f"{name}.down"], self.parameters[f"{name}.up"]

    @torch.no_grad()
    def merge(self) -> None:
        """Put the sums into the master's matrices."""
        for name, base in self.base.items():
            down, up = self._pair(name)
            torch.addmm(base, up, down, alpha=self.scale, out=self.weights[name])

    def state(self) -> dict[str, Tensor]:
        """The additions by their names, and what they are added to by `base/<weight>`: the sums do
        not give it back bit for bit."""
        return {**self.parameters, **{f"base/{name}": base for name, base in self.base.items()}}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state`. The master's matrices are left as they are."""
        for name, mine in self.state().items():
            mine.copy_(tensors[name])


@torch.no_grad()
def _add_gradient(p: nn.Parameter, gradient: Tensor) -> None:
    p.grad = gradient if p.grad is None else p.grad.add_(gradient)
