"""Saving in every format: whole or not at all, read back, and what a file cannot tell is said."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from patchword import Model, PatchwordError, UsageError, load_model, save_model
from patchword.weights import save as saving
from patchword.weights.load import describe_weights
from patchword.weights.save import writable_formats

Make = Callable[..., Model]
Same = Callable[[Model, Model], bool]

TARGETS = [
    ("patchword", "m.safetensors"),
    ("huggingface", "folder"),
    ("timm", "folder.v2"),
    ("timm", "m.safetensors"),
    ("timm", "m.pth"),
    ("torchvision", "m.safetensors"),
    ("torchvision", "m.pth"),
    ("google-npz", "m.npz"),
]


def fitting(scattered: Make, format: str) -> Model:
    return scattered(activation="gelu_tanh" if format == "google-npz" else "gelu")


@pytest.mark.parametrize(("format", "name"), TARGETS)
def test_every_format_round_trips(tmp_path: Path, format: str, name: str, scattered: Make):
    model = fitting(scattered, format)
    path = save_model(model, tmp_path / "deep" / name, format=format)
    assert path == tmp_path / "deep" / name
    assert os.listdir(path.parent) == [name]
    told = format == "patchword" or path.is_dir() or format == "google-npz"
    hints: dict[str, Any] = {} if told else {"heads": 2}
    if format == "torchvision":
        hints["norm_eps"] = 1e-6
    loaded = load_model(path, trust_pickle=True, **hints)
    assert loaded.spec == model.spec
    mine, other = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(mine[key], other[key]) for key in mine)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("format", "name"), TARGETS)
def test_what_is_there_is_replaced_only_when_asked(
    tmp_path: Path, format: str, name: str, scattered: Make
):
    first, second = fitting(scattered, format), fitting(scattered, format)
    path = save_model(first, tmp_path / name, format=format)

    def weight() -> Tensor:
        return load_model(path, trust_pickle=True).state_dict()["head.weight"]

    with pytest.raises(PatchwordError, match="exists; pass overwrite=True"):
        save_model(second, path, format=format)
    assert torch.equal(weight(), first.state_dict()["head.weight"])
    save_model(second, path, format=format, overwrite=True)
    assert torch.equal(weight(), second.state_dict()["head.weight"])
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(("format", "name"), TARGETS[1:])
def test_a_failed_save_in_another_format_leaves_the_old_one(
    tmp_path: Path, format: str, name: str, scattered: Make, monkeypatch: pytest.MonkeyPatch
):
    first = fitting(scattered, format)
    path = save_model(first, tmp_path / name, format=format)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for step in ("_compare", "sync", "_say_untold"):
        with monkeypatch.context() as patch:
            patch.setattr(saving, step, full)
            with pytest.raises(OSError, match="No space left"):
                save_model(fitting(scattered, format), path, format=format, overwrite=True)
        assert os.listdir(tmp_path) == [name]
        if step != "sync":  # which comes last of all
            found = load_model(path, trust_pickle=True).state_dict()
            assert torch.equal(found["head.weight"], first.state_dict()["head.weight"])


def test_what_does_not_read_back_is_not_kept(
    tmp_path: Path, scattered: Make, monkeypatch: pytest.MonkeyPatch
):
    def wrong(path: Path, suffix: str, tensors: dict[str, Tensor]) -> None:
        with path.open("wb") as file:
            changed: dict[str, Any] = {name: value.numpy() + 1 for name, value in tensors.items()}
            np.savez(file, **changed)

    monkeypatch.setattr(saving, "_write_file", wrong)
    with pytest.raises(PatchwordError, match="does not read back the same"):
        save_model(fitting(scattered, "google-npz"), tmp_path / "m.npz", format="google-npz")
    assert os.listdir(tmp_path) == []


def test_a_folder_has_its_config(tmp_path: Path, scattered: Make):
    path = save_model(scattered(), tmp_path / "hf", format="huggingface")
    assert {p.name for p in path.iterdir()} == {
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
    }
    assert json.loads((path / "config.json").read_text())["hidden_size"] == 32
    with safe_open(path / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"  # which transformers asks for
    file = describe_weights(path)
    assert file.classes[:2] == ("cat", "dog")
    assert file.preprocess.mean == (0.1, 0.2, 0.3)


def test_what_a_file_does_not_tell_is_said(
    tmp_path: Path, scattered: Make, caplog: pytest.LogCaptureFixture
):
    model = scattered(width=64, heads=4, norm_eps=1e-3)
    with caplog.at_level(logging.WARNING, "patchword"):
        save_model(model, tmp_path / "m.pth", format="timm")
        assert f"{tmp_path / 'm.pth'} does not tell heads=4, norm_eps=0.001" in caplog.text
        assert f"{tmp_path / 'm.pth'} has no place for the class names" in caplog.text
        caplog.clear()
        save_model(model, tmp_path / "folder", format="huggingface")
        plain = scattered(width=64, heads=1)
        plain.classes = ()
        save_model(plain, tmp_path / "n.pth", format="timm")
        assert caplog.text == ""


def test_names_that_do_not_fit_the_format(tmp_path: Path, scattered: Make):
    model = scattered()
    for format, name, message in (
        ("timm", "m.npz", r"timm is written to a file \.safetensors or a file \.pth or a folder"),
        ("torchvision", "folder", r"to a file \.safetensors or a file \.pth$"),
        ("huggingface", "m.safetensors", "to a folder$"),
        ("tim", "m.pth", "writes no format 'tim'; did you mean timm"),
        ("bit-npz", "m.npz", "writes no format 'bit-npz'; valid: patchword, huggingface"),
    ):
        with pytest.raises(UsageError, match=message):
            save_model(model, tmp_path / name, format=format)
    with pytest.raises(UsageError, match="the format timm has no place for step"):
        save_model(model, tmp_path / "m.pth", format="timm", step=3)
    with pytest.raises(PatchwordError, match=r"no activation gelu \(only gelu_tanh\)"):
        save_model(model, tmp_path / "m.npz", format="google-npz")
    assert os.listdir(tmp_path) == []
    assert set(writable_formats()) == {format for format, _ in TARGETS}


def test_folders_with_other_things_are_left_alone(tmp_path: Path, scattered: Make):
    model = scattered()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(PatchwordError, match=r"holds more than weights \(thesis\.tex\)"):
        save_model(model, tmp_path / "home", format="huggingface", overwrite=True)
    with pytest.raises(PatchwordError, match="is a folder and would become the other"):
        save_model(model, tmp_path / "home", overwrite=True)
    with pytest.raises(PatchwordError, match="is a file and would become the other"):
        save_model(model, tmp_path / "home" / "thesis.tex", format="huggingface", overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


# Our own format ----------------------------------------------------------------------------------


def test_nothing_is_overwritten_unasked(tmp_path: Path, scattered: Make, same: Same):
    path = tmp_path / "m.safetensors"
    first, second = scattered(), scattered()
    save_model(first, path)
    with pytest.raises(PatchwordError, match="exists; pass overwrite=True"):
        save_model(second, path)
    assert same(load_model(path), first)
    save_model(second, path, overwrite=True)
    assert same(load_model(path), second)
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_a_failed_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scattered: Make, same: Same
):
    path = tmp_path / "m.safetensors"
    model = scattered()
    save_model(model, path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for step in (
        "patchword.weights.native.sync",
        "patchword.weights.native.save_file",
        "patchword.weights.save.load_tensors",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(step, full)
            with pytest.raises(OSError, match="No space left"):
                save_model(scattered(), path, overwrite=True)
        assert same(load_model(path), model)
        assert os.listdir(tmp_path) == ["m.safetensors"]


def test_an_unwritable_place_is_an_os_error(tmp_path: Path, scattered: Make):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_model(scattered(), tmp_path / "file" / "m.safetensors")
