"""Runs that train a part of the model, and runs on classes of different sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from settling import config, settled

from patchword.data.registry import open_source
from patchword.models.zoo import create_model
from patchword.run.inputs import Data, Inputs
from patchword.spec.parse import changed
from patchword.spec.train import TrainSpec
from patchword.weights.load import load_model
from patchword.weights.native import load_tensors, write_model

Command = Callable[..., tuple[int, str, str]]
MakePhotos = Callable[..., Path]


@pytest.fixture
def uneven(make_photos: MakePhotos, tmp_path: Path) -> Path:
    """12 blue pictures in train, 3 red; two of each in val and test."""
    for part, blue, red in (("train", 12, 3), ("val", 2, 2), ("test", 2, 2)):
        make_photos(tmp_path / "uneven" / part, blue, ["blue"])
        make_photos(tmp_path / "uneven" / part, red, ["red"])
    return tmp_path / "uneven"


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """The weights of a small model, untrained."""
    path = tmp_path / "start.safetensors"
    write_model(path, create_model("ViT-mu/8", 4, 16, depth=2))
    return path


SHORT = ("--steps", 2, "--batch-size", 4, "--workers", 0, "--device", "cpu")


@pytest.mark.parametrize("words", [("--tune", "lora"), ("--tune", "last", "--last-blocks", 1)])
def test_weights_of_the_run_are_whole_and_plain(
    words: tuple[object, ...], uneven: Path, start: Path, tmp_path: Path, command: Command
):
    run = tmp_path / "run"
    settings = (*SHORT, "--recipe", "transfer", "--init", start, "--out", run, "--lr", 0.01)
    code, _, said = command("train", uneven, *settings, *words)
    assert code == 0, said
    assert "of which 0.0" in said  # M are trained
    before, _ = load_tensors(start)
    for folder in ("best", "last"):
        after, _ = load_tensors(run / folder / "model.safetensors")
        assert after.keys() == before.keys()
    same = {
        name
        for name in before
        if not name.startswith("head") and (before[name] == after[name]).all()
    }
    assert "patch_embedding.weight" in same
    assert "blocks.0.mlp.hidden.bias" in same
    assert ("blocks.0.mlp.hidden.weight" in same) == (words[1] == "last")
    assert "norm.bias" not in same
    assert load_model(run).classes == ("blue", "red")
    assert config(run).tuning.tune == words[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tune", "lora"), "--tune lora keeps most weights as they are; give some with --init"),
        (("--tune", "last", "--last-blocks", 3, "--init"), "has 2 blocks, not the 3 of"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_start(
    words: tuple[object, ...],
    message: str,
    uneven: Path,
    start: Path,
    tmp_path: Path,
    command: Command,
):
    given = (*words, start) if words[-1] == "--init" else words
    code, _, said = command("train", uneven, *SHORT, "--out", tmp_path / "run", *given)
    assert code == 2
    assert message in said
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("balance", "remedy"),
    [
        ("none", "--balance sampler or loss makes up for it"),
        ("sampler", "all classes are drawn equally often"),
        ("loss", "images of small classes count for more"),
    ],
)
def test_imbalance_is_said(
    balance: str, remedy: str, uneven: Path, start: Path, tmp_path: Path, command: Command
):
    settings = ("--init", start, "--recipe", "transfer", "--out", tmp_path / "run")
    code, _, said = command("train", uneven, *SHORT, *settings, "--balance", balance)
    assert code == 0, said
    assert f"imbalance 4.0: 12 images of blue, 3 of red; {remedy}" in said


def inputs_of(data: Path, balance: str) -> Inputs:
    source = open_source(str(data))
    asked = changed(TrainSpec(source=str(data), batch_size=15), balance=balance, crop="resize")
    parts = {
        part: np.flatnonzero([f"/{part}/" in source.location(i) for i in range(len(source))])
        for part in ("train", "val", "test")
    }
    model = create_model("ViT-mu/8", 2, 16)
    settings = settled(asked)
    return Inputs(data=Data(source=source, division=parts), settled=settings, model=model)


def test_the_sampler_balances_the_batches(uneven: Path):
    for balance, wanted in (("none", [12, 3]), ("sampler", [8, 7]), ("loss", [12, 3])):
        inputs = inputs_of(uneven, balance)
        for batch in inputs.feed(0, 3):
            assert sorted(np.bincount(batch.labels), reverse=True) == wanted


def test_the_loss_weighs_small_classes_more(uneven: Path):
    assert inputs_of(uneven, "none").class_weights() is None
    assert inputs_of(uneven, "sampler").class_weights() is None
    weights = inputs_of(uneven, "loss").class_weights()
    assert weights is not None
    assert weights.tolist() == [15 / 24, 2.5]
