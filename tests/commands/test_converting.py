"""Conversion with proof: what does not say the same is not kept."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from patchword import Model, PatchwordError, create_model, load_model, save_model
from patchword.cli.main import main
from patchword.commands.converting import convert
from patchword.weights import save
from patchword.weights.mapping import Written

TARGETS = [
    ("timm", "folder"),
    ("timm", "m.pth"),
    ("huggingface", "folder"),
    ("torchvision", "m.safetensors"),
    ("google-npz", "m.npz"),
]


def weights(folder: Path, **options: Any) -> Path:
    values: dict[str, Any] = {"width": 64, "heads": 1} | options
    model = create_model("ViT-mu/8", 4, 16, **values)
    torch.nn.init.normal_(model.get_parameter("head.weight"))
    return save_model(model, folder / "source.safetensors")


def erring(format: str, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """The format's writer writes a head `factor` as large."""
    known = next(known for known in save.FORMATS if known.name == format)
    assert known.write is not None
    right = known.write

    def wrong(model: Model) -> Written:
        written = right(model)
        last = [name for name in written.tensors if "head" in name or "classifier" in name]
        changed = {name: written.tensors[name] * factor for name in last}
        assert changed
        return dataclasses.replace(written, tensors=written.tensors | changed)

    formats = (dataclasses.replace(known, write=wrong), *save.FORMATS)
    monkeypatch.setattr(save, "FORMATS", formats)


@pytest.mark.parametrize(("format", "name"), TARGETS)
def test_what_gives_other_logits_is_not_kept(
    tmp_path: Path, format: str, name: str, monkeypatch: pytest.MonkeyPatch
):
    source = weights(tmp_path, activation="gelu_tanh" if format == "google-npz" else "gelu")
    erring(format, monkeypatch, 1.01)
    with pytest.raises(PatchwordError, match="is not kept: worst logit difference") as caught:
        convert(source, tmp_path / name, format=format)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert os.listdir(tmp_path) == ["source.safetensors"]


def test_what_is_not_finite_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = weights(tmp_path)
    erring("timm", monkeypatch, float("nan"))
    with pytest.raises(PatchwordError):
        convert(source, tmp_path / "m.pth", format="timm")
    assert os.listdir(tmp_path) == ["source.safetensors"]


def test_a_difference_within_the_tolerance_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = weights(tmp_path)
    erring("huggingface", monkeypatch, 1 + 5e-5)
    row = convert(source, tmp_path / "folder", format="huggingface").to_dict()
    assert 0 < row["worst_logit_difference"] < 1e-4 * row["largest_logit"]


def test_the_old_file_stays_and_the_command_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    source, target = weights(tmp_path), tmp_path / "m.pth"
    convert(source, target, format="timm")
    head = load_model(target, trust_pickle=True).get_parameter("head.weight")
    erring("timm", monkeypatch, 2.0)
    words = ["convert", str(source), str(target), "--format", "timm", "--overwrite"]
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "is not kept" in err
    kept = load_model(target, trust_pickle=True).get_parameter("head.weight")
    assert torch.equal(kept, head)


def test_another_eps_than_the_librarys_is_told_to_nobody(tmp_path: Path):
    """It is the difference that others get."""
    source = weights(tmp_path, heads=8, norm_eps=0.1)
    with pytest.raises(PatchwordError, match=r"read with heads=8, which is more than 0\.001 of"):
        convert(source, tmp_path / "m.pth", format="timm")
    with pytest.raises(PatchwordError, match="is not kept: worst logit"):
        convert(source, tmp_path / "m", format="timm")
    assert convert(source, tmp_path / "h", format="huggingface").difference < 1e-5
    assert sorted(os.listdir(tmp_path)) == ["h", "source.safetensors"]
