"""The table of well-known weights against timm's registry, and its models as timm builds them."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from library_checks import create, find

from patchword.models.zoo import variant_name
from patchword.weights import timm
from patchword.weights.pretrained import PRETRAINED

registry: Any = importlib.import_module("timm.models")
TIMM = {name: row for name, row in PRETRAINED.items() if row.hub.startswith("timm/")}


def test_what_timm_does_not_know():
    assert [row.hub for row in PRETRAINED.values() if row not in TIMM.values()] == [
        "google/vit-base-patch16-224-in21k"
    ]


@pytest.mark.parametrize("name", TIMM)
def test_rows_say_what_timm_says(name: str):
    """And our reader finds the row's variant and size in the names and shapes."""
    row = TIMM[name]
    model = row.hub.removeprefix("timm/")
    said = registry.get_pretrained_cfg(model)
    assert said.hf_hub_id == row.hub
    assert said.license == row.licence
    assert said.input_size == (3, row.image_size, row.image_size)
    assert (said.num_classes == 0) == (row.top1 is None)
    with torch.device("meta"):
        tensors = create(model, num_classes=said.num_classes).state_dict()
    config = {"architecture": model.partition(".")[0], "num_classes": said.num_classes}
    found = find(timm, tensors, config | {"pretrained_cfg": said.to_dict()})
    assert variant_name(found.spec) == row.model
    assert found.spec.image_size == (row.image_size, row.image_size)
