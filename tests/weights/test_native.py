"""Patchword's own weight files: bit-exact round trips, damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from patchword import Model, PatchwordError, load_model, save_model
from patchword.weights.load import read_weights
from patchword.weights.native import load_tensors, save_tensors

Make = Callable[..., Model]
Same = Callable[[Model, Model], bool]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pool": "map", "head": "mlp", "layer_scale": 0.1},
        {"pool": "gap", "position": "sincos2d", "registers": 2, "qk_norm": True},
        {"position": "none", "probability": "sigmoid", "dropout": 0.1, "size": (16, 40)},
        {"position": "learned-2d", "position_at": "every", "depth": 2, "activation": "swiglu"},
        {"position": "relative", "distillation": "head"},
        {"name": "R+ViT-Ti/16", "depth": 1},
        {"name": "BiT-R50x1", "layers": (1, 1, 1, 1)},
        {"name": "Mixer-S/16", "depth": 1, "width": 32},
    ],
    ids=str,
)
def test_round_trip_is_bit_exact(
    tmp_path: Path, options: dict[str, Any], scattered: Make, same: Same
):
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


def test_every_flipped_bit_is_found_or_harmless(tmp_path: Path, scattered: Make, same: Same):
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
def test_truncated_files_are_refused(tmp_path: Path, share: float, scattered: Make):
    path = save_model(scattered(), tmp_path / "m.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(PatchwordError, match="not a readable safetensors file"):
        load_model(path)


def test_a_swapped_header_is_found(tmp_path: Path, scattered: Make):
    """The spec of one file over the tensors of another, as a careless tool would write it."""
    path = save_model(scattered(), tmp_path / "m.safetensors")
    tensors, file = read_weights(path)
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    header = json.loads(metadata["patchword"])
    header["classes"] = list(reversed(header["classes"]))
    save_file(tensors, path, metadata=metadata | {"patchword": json.dumps(header)})
    with pytest.raises(PatchwordError, match="damaged: its checksum does not match"):
        load_model(path)
    assert file.classes[:2] == ("cat", "dog")


@pytest.mark.parametrize(
    ("said", "instead"),
    [(b'"shape":[2,3]', b'"shape":[3,2]'), (b'"dtype":"F32"', b'"dtype":"I32"')],
)
def test_tensors_that_are_read_in_another_way_are_found(
    tmp_path: Path, said: bytes, instead: bytes
):
    """Their bytes are as they were: shapes and dtypes count too."""
    path = tmp_path / "some.safetensors"
    save_tensors(path, {"some": torch.randn(2, 3)}, {})
    whole = path.read_bytes()
    assert whole.count(said) == 1
    path.write_bytes(whole.replace(said, instead))
    with pytest.raises(PatchwordError, match="damaged: its checksum does not match"):
        load_tensors(path)


def test_files_that_hold_no_model_of_ours_are_named_as_such(tmp_path: Path):
    foreign = tmp_path / "timm.safetensors"
    save_file({"cls_token": torch.zeros(1, 1, 8)}, foreign, metadata={"format": "pt"})
    with pytest.raises(PatchwordError, match="was not written by patchword"):
        load_tensors(foreign)
    save_tensors(tmp_path / "optimizer.safetensors", {"a/b": torch.zeros(1)}, {})
    with pytest.raises(PatchwordError, match="holds no model: its header lacks 'model'"):
        load_model(tmp_path / "optimizer.safetensors")


def test_wrong_tensors_are_named_and_counted(tmp_path: Path, scattered: Make):
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


def test_a_spec_from_the_future_is_refused(tmp_path: Path, scattered: Make):
    path = save_model(scattered(), tmp_path / "m.safetensors")
    tensors, header = load_tensors(path)
    header["model"]["rope"] = True
    save_tensors(path, tensors, header)
    with pytest.raises(PatchwordError, match="unknown key 'rope'"):
        load_model(path)


def test_files_are_plain_safetensors(tmp_path: Path, scattered: Make):
    """Any reader of the format gets the tensors."""
    model = scattered()
    path = save_model(model, tmp_path / "m.safetensors")
    found = load_file(path)
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
