"""The layers of a model as a table: shapes, parameters, multiply-accumulates, activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from patchword.models.model import Model
from patchword.models.position import PositionRule
from patchword.models.resnet import ResNetStem
from patchword.models.vit import ViT
from patchword.models.zoo import unfilled_model
from patchword.spec.model import ModelSpec

REST = "rest"
"""The name of the row for what belongs to no layer: tokens, padding, pooling."""
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the counter leaves it out


@dataclass(frozen=True)
class LayerRow:
    """A part of a model, for one image in float32."""

    name: str
    shape: tuple[int, ...]
    """of its output, without the batch: tokens and channels, or channels, height and width"""
    parameters: int
    macs: int
    """of its matrix products and convolutions, as torch counts them"""
    activation_bytes: int
    """what training keeps of its forward pass for the backward pass"""


def layer_table(spec: ModelSpec) -> list[LayerRow]:
    """The parts of `spec`'s model in the order in which they work, blocks one by one.

    Nothing is computed and no memory taken. Every token of the last block is counted, though
    `forward` leaves out those that the head does not see.
    """
    model = unfilled_model(spec).train()
    with FakeTensorMode(allow_non_fake_inputs=True):  # as the CPU would compute it
        model.to_empty(device="cpu")
        images = torch.empty(1, spec.in_channels, *spec.image_size)
        return _rows(model, images)


def _rows(model: Model, images: Tensor) -> list[LayerRow]:
    saved = _Saved(model)
    counter = FlopCounterMode(display=False, custom_mapping={FUSED: _fused_flops})
    starts: dict[nn.Module, tuple[int, int]] = {}
    names = {part: name for name, part in _parts(model)}
    rows: list[LayerRow] = []

    def enter(part: nn.Module, _: Any) -> None:
        starts[part] = (counter.get_total_flops(), saved.bytes)

    def leave(part: nn.Module, _: Any, output: Tensor) -> None:
        flops, kept = starts[part]
        macs = (counter.get_total_flops() - flops) // 2
        rows.append(
            LayerRow(names[part], tuple(output.shape[1:]), _size(part), macs, saved.bytes - kept)
        )

    for part in names:
        part.register_forward_pre_hook(enter)
        part.register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor), counter:
        features = model.features(images)
        model.classify(features.pooled)
        if isinstance(model, ViT) and model.distillation_head is not None:
            model.distillation_head(features.tokens[:, 0])
    rest = _size(model) - sum(row.parameters for row in rows)
    kept = saved.bytes - sum(row.activation_bytes for row in rows)
    if rest or kept:
        rows.insert(0, LayerRow(REST, (), rest, 0, kept))
    return rows


def _fused_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return cast(Any, flop_counter).sdpa_flop_count(q, k, v)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that have a row, by name: children, or theirs where these are lists or a stem."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential | ResNetStem):
            yield from _parts(child, f"{prefix}{name}.")
        elif not isinstance(child, PositionRule):  # it works within the blocks
            yield prefix + name, child


class _Saved:
    """Counts the bytes that autograd keeps: each storage once, the parameters not at all."""

    def __init__(self, model: nn.Module) -> None:
        self.bytes = 0
        self._storages = [p.untyped_storage() for p in model.parameters()]  # keeps them alive
        self._seen = {_number(storage) for storage in self._storages}

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        number = _number(storage)
        if number not in self._seen:
            self._seen.add(number)
            self._storages.append(storage)
            self.bytes += storage.nbytes()
        return tensor


def _number(storage: torch.UntypedStorage) -> int:
    """What tells a storage from the others that live."""
    return cast(Any, StorageWeakRef(storage)).cdata
