"""Weight files: bit-exact round trips, damage, foreign files, other resolutions, transfer."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from patchword import PatchwordError, UsageError, create_model, load_model, save_model
from patchword.architecture import PreprocessSpec
from patchword.models.position import resample_position_embedding
from patchword.models.vit import ViT
from patchword.weights.native import (
    find_weights,
    load_tensors,
    read_weights,
    save_tensors,
    transfer,
    write_model,
)

CLASSES = ("cat", "dog", 'Größe [x] "quoted"\n', "")


def scattered(name: str = "ViT-mu/8", size: Any = 32, **options: Any) -> ViT:
    model = create_model(
        name,
        len(CLASSES),
        size,
        preprocess=PreprocessSpec(mean=(0.1, 0.2, 0.3), interpolation="bilinear"),
        classes=CLASSES,
        **options,
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def same(ours: ViT, theirs: ViT) -> bool:
    mine, other = ours.state_dict(), theirs.state_dict()
    return (
        mine.keys() == other.keys()
        and all(torch.equal(mine[name], other[name]) for name in mine)
        and (ours.spec, ours.preprocess, ours.classes)
        == (theirs.spec, theirs.preprocess, theirs.classes)
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pool": "map", "head": "mlp", "layer_scale": 0.1},
        {"pool": "gap", "position": "sincos2d", "registers": 2, "qk_norm": True},
        {"position": "none", "probability": "sigmoid", "dropout": 0.1, "size": (16, 40)},
    ],
)
def test_round_trip_is_bit_exact(tmp_path: Path, options: dict[str, Any]):
    model = scattered(**options)
    path = save_model(model, tmp_path / "deep" / "m.safetensors", step=7, note="é")
    loaded = load_model(path)
    assert same(model, loaded)
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    images = torch.randn(2, 3, *model.spec.image_size)
    torch.testing.assert_close(model(images), loaded(images))  # memory is aligned otherwise
    _, file = read_weights(path)
    assert file.extra == {"step": 7, "note": "é"}
    assert file.path == path


def test_special_values_survive(tmp_path: Path):
    values = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45])
    tensors = {
        "floats": values,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(5),
        "half": values.bfloat16(),
        "view": torch.arange(12.0).reshape(3, 4).T,
    }
    save_tensors(tmp_path / "t", tensors, {"b": 1, "a": [None, "x"]})
    found, header = load_tensors(tmp_path / "t")
    assert header == {"b": 1, "a": [None, "x"]}
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype is value.dtype
        np.testing.assert_array_equal(found[name].float().numpy(), value.float().numpy())
    assert found["floats"].signbit().tolist() == values.signbit().tolist()


def test_every_flipped_bit_is_found_or_harmless(tmp_path: Path):
    """Positions all over the file, and every byte of the header's first 400."""
    model = scattered(size=16)
    path = save_model(model, tmp_path / "m.safetensors")
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(0)
    places = [*range(400), *rng.integers(0, header, 300), *rng.integers(header, len(data), 150)]
    found = 0
    for place in map(int, places):
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        message = ""
        try:
            loaded = load_model(path)
        except PatchwordError as error:
            message = str(error)
            loaded = None
        if loaded is None:
            found += str(path) in message and "\n" not in message
        else:  # only where the header says nothing
            assert same(model, loaded), f"byte {place}"
            assert place < header, f"byte {place}"
    assert found > 0.97 * len(places)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files_are_refused(tmp_path: Path, share: float):
    path = save_model(scattered(), tmp_path / "m.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(PatchwordError, match="not a readable safetensors file"):
        load_model(path)


def test_a_swapped_header_is_found(tmp_path: Path):
    """The spec of one file over the tensors of another, as a careless tool would write it."""
    path = save_model(scattered(), tmp_path / "m.safetensors")
    tensors, file = read_weights(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    header = json.loads(metadata["patchword"])
    header["classes"] = list(reversed(header["classes"]))
    save_file(tensors, path, metadata=metadata | {"patchword": json.dumps(header)})
    with pytest.raises(PatchwordError, match="damaged: its checksum does not match"):
        load_model(path)
    assert file.classes == CLASSES


def test_foreign_files_are_named_as_such(tmp_path: Path):
    foreign = tmp_path / "timm.safetensors"
    save_file({"cls_token": torch.zeros(1, 1, 8)}, foreign, metadata={"format": "pt"})
    with pytest.raises(PatchwordError, match="was not written by patchword"):
        load_model(foreign)
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(PatchwordError, match="not a readable safetensors file"):
        load_model(text)
    with pytest.raises(PatchwordError, match="no such file or run directory"):
        load_model(tmp_path / "nothing")
    save_tensors(tmp_path / "optimizer.safetensors", {"a/b": torch.zeros(1)}, {})
    with pytest.raises(PatchwordError, match="holds no model: its header lacks 'model'"):
        load_model(tmp_path / "optimizer.safetensors")


def test_wrong_tensors_are_named_and_counted(tmp_path: Path):
    path = save_model(scattered(depth=2), tmp_path / "m.safetensors")
    tensors, header = load_tensors(path)

    def broken(changes: dict[str, Any], *gone: str) -> str:
        kept = {name: value for name, value in tensors.items() if name not in gone}
        save_tensors(path, kept | changes, header)
        with pytest.raises(PatchwordError) as raised:
            load_model(path)
        return str(raised.value)

    assert "norm.bias is missing" in broken({}, "norm.bias")
    assert "extra is unexpected" in broken({"extra": torch.zeros(1)})
    assert "head.bias is [9], not [4]" in broken({"head.bias": torch.zeros(9)})
    many = broken({"x": torch.zeros(1)}, *(n for n in tensors if n.startswith("blocks.1.")))
    assert "blocks.1.attention.projection.bias is missing" in many
    assert many.endswith(" and 10 more")  # 12 of the block and x, 3 of them named


def test_a_spec_from_the_future_is_refused(tmp_path: Path):
    path = save_model(scattered(), tmp_path / "m.safetensors")
    tensors, header = load_tensors(path)
    header["model"]["rope"] = True
    save_tensors(path, tensors, header)
    with pytest.raises(PatchwordError, match="unknown key 'rope'"):
        load_model(path)


# Another resolution ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [48, (16, 40), (64, 32)])
@pytest.mark.parametrize("options", [{}, {"pool": "gap", "registers": 2}], ids=str)
def test_other_resolutions_resample_and_say_so(
    tmp_path: Path, size: Any, options: dict[str, Any], caplog: pytest.LogCaptureFixture
):
    model = scattered(**options)
    path = save_model(model, tmp_path / "m.safetensors")
    with caplog.at_level(logging.WARNING, "patchword"):
        loaded = load_model(path, image_size=size)
    pair = (size, size) if isinstance(size, int) else size
    assert loaded.spec.image_size == pair
    assert loaded(torch.zeros(1, 3, *pair)).shape == (1, 4)
    rows, columns = loaded.spec.grid
    assert f"position table resampled from 4x4 to {rows}x{columns} patches" in caplog.text
    assert str(path) in caplog.text
    before, after = model.state_dict(), loaded.state_dict()
    wanted = resample_position_embedding(before["position_embedding"], (4, 4), (rows, columns))
    assert torch.equal(after["position_embedding"], wanted)
    assert all(torch.equal(before[n], after[n]) for n in before if n != "position_embedding")


def test_the_same_resolution_changes_and_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    model = scattered()
    path = save_model(model, tmp_path / "m.safetensors")
    with caplog.at_level(logging.INFO, "patchword"):
        assert same(load_model(path, image_size=32), model)
        assert same(load_model(path, image_size=(32, 32)), model)
    assert caplog.text == ""


def test_fixed_tables_are_computed_for_the_new_grid(tmp_path: Path):
    path = save_model(scattered(position="sincos2d"), tmp_path / "m.safetensors")
    loaded = load_model(path, image_size=(16, 48))
    fresh = create_model("ViT-mu/8", 4, (16, 48), position="sincos2d")
    assert loaded.fixed_position is not None
    assert fresh.fixed_position is not None
    assert torch.equal(loaded.fixed_position, fresh.fixed_position)


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path):
    path = save_model(scattered(), tmp_path / "m.safetensors")
    for size in (33, (32, 12), 0):
        with pytest.raises(UsageError, match="not a multiple of the patch"):
            load_model(path, image_size=size)


# Transfer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"head": "mlp"}, {"pool": "gap", "registers": 2}, {"pool": "map"}], ids=str
)
def test_transfer_keeps_the_body_and_replaces_the_head(
    tmp_path: Path, options: dict[str, Any], caplog: pytest.LogCaptureFixture
):
    model = scattered(**options)
    path = save_model(model, tmp_path / "m.safetensors")
    with caplog.at_level(logging.WARNING, "patchword"):
        tuned = transfer(path, num_classes=9, image_size=(48, 32), dropout=0.1)
    assert "resampled from 4x4 to 6x4" in caplog.text
    assert tuned.spec.num_classes == 9
    assert tuned.spec.dropout == 0.1
    assert tuned.spec.head == "linear"
    assert tuned.pre_logits is None
    assert tuned.classes == ()
    assert tuned.preprocess == model.preprocess
    before, after = model.state_dict(), tuned.state_dict()
    assert not after["head.weight"].any()
    assert not after["head.bias"].any()
    body = {n for n in before if not n.startswith(("head.", "pre_logits.", "position_embedding"))}
    assert {n for n in after if not n.startswith(("head.", "position_embedding"))} == body
    assert all(torch.equal(before[name], after[name]) for name in body)
    wanted = resample_position_embedding(before["position_embedding"], (4, 4), (6, 4))
    assert torch.equal(after["position_embedding"], wanted)
    assert not tuned(torch.randn(1, 3, 48, 32)).any()


def test_transfer_of_features_without_a_head(tmp_path: Path):
    path = save_model(create_model("ViT-mu/8", 0, 32), tmp_path / "m.safetensors")
    tuned = transfer(path, num_classes=3, image_size=(32, 32))
    assert tuned(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_transfer_refuses_what_changes_the_body(tmp_path: Path):
    path = save_model(scattered(), tmp_path / "m.safetensors")
    with pytest.raises(PatchwordError, match=r"patch_embedding\.weight is"):
        transfer(path, num_classes=3, image_size=(32, 32), in_channels=1)
    for options in ({"depth": 2}, {"registers": 1}, {"width": 64}, {"position": "none"}):
        with pytest.raises(PatchwordError, match=r"missing|unexpected|not \["):
            transfer(path, num_classes=3, image_size=(32, 32), **options)


# Files -------------------------------------------------------------------------------------------


def test_nothing_is_overwritten_unasked(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    first, second = scattered(), scattered()
    save_model(first, path)
    with pytest.raises(PatchwordError, match="exists; pass overwrite=True"):
        save_model(second, path)
    assert same(load_model(path), first)
    save_model(second, path, overwrite=True)
    assert same(load_model(path), second)
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "m.safetensors"
    model = scattered()
    save_model(model, path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for step in ("patchword.weights.native.sync", "patchword.weights.native.save_file"):
        with monkeypatch.context() as patch:
            patch.setattr(step, full)
            with pytest.raises(OSError, match="No space left"):
                save_model(scattered(), path, overwrite=True)
        assert same(load_model(path), model)
        assert os.listdir(tmp_path) == ["m.safetensors"]


def test_an_unwritable_place_is_an_os_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_model(scattered(), tmp_path / "file" / "m.safetensors")


def test_weights_are_found_in_order(tmp_path: Path):
    """best before last; in a checkpoint the average before the raw weights."""
    run = tmp_path / "run"
    with pytest.raises(PatchwordError, match="no such file or run directory"):
        find_weights(run)
    run.mkdir()
    with pytest.raises(PatchwordError, match="holds no weights"):
        find_weights(run)
    model = scattered(size=16)

    def add(name: str) -> Path:
        path = run / name
        path.parent.mkdir(exist_ok=True)
        write_model(path, model)
        return path

    for name in (
        "last/model.safetensors",
        "last/average.safetensors",
        "best/model.safetensors",
        "best/average.safetensors",
        "model.safetensors",
    ):
        path = add(name)
        assert find_weights(run) == path
        assert same(load_model(run), model)
    assert find_weights(run / "last") == run / "last" / "average.safetensors"
    assert find_weights(run / "last" / "model.safetensors") == run / "last" / "model.safetensors"


def test_files_are_plain_safetensors(tmp_path: Path):
    """Any reader of the format gets the tensors."""
    model = scattered()
    path = save_model(model, tmp_path / "m.safetensors")
    found = load_file(path)
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
