"""The data of a run, from a source to batches."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from settling import settled

from patchword.data.registry import open_source
from patchword.data.splits import divide
from patchword.models.zoo import create_model
from patchword.objectives import create_objective
from patchword.run.inputs import Data, Inputs, build_model
from patchword.run.pretraining import progress_evaluator
from patchword.spec.parse import changed
from patchword.spec.train import TrainSpec


def inputs_of(**changes: Any) -> Inputs:
    """Of the digits, with a model whose head is zero."""
    source = open_source("digits")
    asked = changed(TrainSpec(source="digits"), batch_size=16, model="ViT-mu/2", **changes)
    model = create_model("ViT-mu/2", 10, 8, 1, depth=1)
    assert model.head is not None
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    division = divide(source, val=0.1, test=0.1, seed=0)
    data = Data(source=source, division=division)
    return Inputs(data=data, settled=settled(asked), model=model)


def test_augmentation_is_a_function_of_seed_and_position():
    """Not of the batch: the same images are mixed in another way at another position."""
    inputs, other = inputs_of(mixup=0.8, seed=1), inputs_of(mixup=0.8, seed=2)
    batch = next(inputs.feed(0, 1))
    images, targets = inputs.prepare(batch, 5)
    again = inputs.prepare(batch, 5)
    assert torch.equal(images, again[0])
    assert torch.equal(targets, again[1])
    for different in (inputs.prepare(batch, 6), other.prepare(batch, 5)):
        assert not torch.equal(images, different[0])
        assert not torch.equal(targets, different[1])


@pytest.mark.parametrize(
    ("loss", "wanted"), [("softmax", math.log(10)), ("sigmoid", 10 * math.log(2))]
)
def test_the_loss_that_is_measured_is_the_one_that_is_trained(loss: str, wanted: float):
    inputs = inputs_of(loss=loss)
    found = inputs.evaluator("val", inputs.division["val"][:20])(inputs.model.eval())
    assert found["n"] == 20
    assert found["loss"] == pytest.approx(wanted)


def test_the_first_weights_are_a_function_of_the_seed():
    source = open_source("digits")
    asked = changed(TrainSpec(source="digits"), model="ViT-mu/2", image_size=[8], depth=1)
    first, again, other = (
        build_model(settled(changed(asked, seed=seed)), source).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    for name in ("patch_embedding.weight", "blocks.0.mlp.hidden.weight"):
        assert not torch.equal(first[name], other[name])


def test_probes_learn_from_some_of_train_and_are_measured_on_some_of_val(
    monkeypatch: pytest.MonkeyPatch,
):
    """A draw by the seed, without repeats; the loss is that of all of val."""
    seen: list[tuple[str, np.ndarray]] = []
    monkeypatch.setattr(Inputs, "passes", lambda self, *asked: seen.append(asked))
    for seed in (1, 1, 2):
        inputs = inputs_of(seed=seed, objective="mae", probe_images=50)
        progress_evaluator(inputs, create_objective(inputs.request, inputs.model))
    for part, indices in seen:
        assert np.isin(indices, inputs.division[part]).all()
        assert (np.diff(indices) > 0).all()
    sizes = [("train", 50), ("val", 50), ("val", len(inputs.division["val"]))]
    assert [(part, len(indices)) for part, indices in seen] == 3 * sizes
    assert np.array_equal(seen[0][1], seen[3][1])
    assert not np.array_equal(seen[0][1], seen[6][1])


def test_images_that_cannot_be_read_are_named_once(caplog: pytest.LogCaptureFixture):
    inputs = inputs_of()
    batch = next(inputs.passes("val", np.arange(3))())
    bad = dataclasses.replace(batch, bad=((1, "torn"),))
    for _ in range(2):
        inputs.note_bad(bad)
    assert inputs.bad == {1: "torn"}
    assert caplog.text.count("digits[1]: torn") == 1
