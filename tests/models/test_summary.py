"""The layer table against the model itself and the families' formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from patchword.models.summary import REST, layer_table
from patchword.models.zoo import create_model, macs, model_cost, model_spec

CASES = {
    "ViT": ("ViT-Ti/16", {}),
    "all kinds of tokens": ("ViT-Ti/16", {"distillation": "head", "registers": 2}),
    "relative": ("ViT-Ti/32", {"position": "relative", "position_at": "every"}),
    "2-D, every layer": ("ViT-Ti/32", {"position": "learned-2d", "position_at": "every"}),
    "map": ("ViT-Ti/32", {"pool": "map", "head": "mlp", "position": "sincos2d"}),
    "hybrid": ("R50+ViT-B/16", {}),
    "BiT": ("BiT-R50x1", {}),
    "Mixer": ("Mixer-S/32", {}),
}


@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES.keys())
def test_rows_add_up(name: str, options: dict[str, Any]):
    """To the exact parameters, and to the multiply-accumulates of the formula."""
    spec = model_spec(name, **options)
    rows = layer_table(spec)
    parameters, cost = model_cost(spec)
    assert sum(row.parameters for row in rows) == parameters
    assert sum(row.macs for row in rows) == cost == macs(spec)
    assert len({row.name for row in rows}) == len(rows)
    assert all(row.activation_bytes > 0 for row in rows if ".0" in row.name and row.macs)


def test_a_block_in_figures():
    """ViT-B/16: 197 tokens of 768, 12 blocks alike."""
    rows = {row.name: row for row in layer_table(model_spec("ViT-B/16"))}
    first = rows["blocks.0"]
    assert first.shape == (197, 768)
    assert first.parameters == 4 * 768**2 + 4 * 768 + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    assert first.macs == 197 * 12 * 768**2 + 2 * 197**2 * 768
    assert rows["patch_embedding"].shape == (196, 768)
    assert rows["head"].shape == (1000,)
    assert rows[REST].parameters == 768
    assert rows["positions.0"].parameters == 197 * 768
    assert [name for name in rows if name.startswith("blocks")] == [
        f"blocks.{i}" for i in range(12)
    ]


def test_activations_are_what_a_real_step_keeps():
    """Counted on real tensors, by the addresses of their memory."""
    model = create_model("ViT-mu/8", 10, 32, depth=3, pool="gap").train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(1, 3, 32, 32))
    wanted = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    found = sum(row.activation_bytes for row in layer_table(model.spec))
    assert found == pytest.approx(wanted, rel=0.05)
