"""Files of tensors of every kind: values as they were stored, read one at a time."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from patchword import Model, PatchwordError, UsageError, load_model, save_model
from patchword.weights.files import find_weights, open_container
from patchword.weights.native import write_model

Make = Callable[..., Model]
Same = Callable[[Model, Model], bool]


def drawn() -> dict[str, Tensor]:
    """Shapes of all sorts; names with what is special in paths, zips and state dicts."""
    return {
        "a/b/kernel": torch.randn(3, 4, 5),
        "../up": torch.randn(2),
        "/etc/passwd": torch.randn(1, 1),
        "scalar": torch.randn(()),
        "empty": torch.zeros(0, 3),
        "größe.weight": torch.randn(7),
        "file": torch.randn(2, 2),
    }


def read_all(path: Path, **options: Any) -> dict[str, Tensor]:
    container = open_container(path, **options)
    found = {name: container.tensor(name) for name in container.shapes}
    assert {name: tuple(value.shape) for name, value in found.items()} == container.shapes
    return found


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype is value.dtype and torch.equal(found[name], value)
        for name, value in wanted.items()
    )


def write_npz(path: Path, tensors: dict[str, Tensor], **options: Any) -> Path:
    """As numpy writes it; `savez` itself cannot take the name "file"."""
    import zipfile

    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, value in tensors.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, value.numpy())
    return path


DTYPES = [torch.float64, torch.float32, torch.float16, torch.int64, torch.int8, torch.uint8]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16, torch.bool, torch.float8_e4m3fn])
def test_safetensors_and_pickles_are_read_as_stored(tmp_path: Path, dtype: torch.dtype):
    tensors = {name: (9 * value).to(dtype) for name, value in drawn().items()}
    save_file(tensors, tmp_path / "t.safetensors")
    torch.save(tensors, tmp_path / "t.pth")
    paths = [tmp_path / "t.safetensors", tmp_path / "t.pth"]
    for path in paths[: 1 if dtype is torch.float8_e4m3fn else 2]:
        container = open_container(path, trust_pickle=True)
        assert container.shapes == {n: tuple(v.shape) for n, v in tensors.items()}
        for name, value in tensors.items():
            found = container.tensor(name)
            assert found.dtype is dtype
            assert torch.equal(found.double(), value.double())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool])
@pytest.mark.parametrize("compression", [0, 8], ids=["stored", "deflated"])
def test_npz_is_read_as_stored(tmp_path: Path, dtype: torch.dtype, compression: int):
    tensors = {name: (9 * value).to(dtype) for name, value in drawn().items()}
    path = write_npz(tmp_path / "t.npz", tensors, compression=compression)
    assert equal(read_all(path), tensors)


def test_npz_of_other_layouts(tmp_path: Path):
    """Fortran order, the other byte order, bfloat16 as big_vision saves it, numpy's own writer."""
    values = np.random.default_rng(0).normal(size=(3, 4, 5)).astype("<f4")
    half = torch.from_numpy(values).bfloat16()
    np.savez(
        tmp_path / "t.npz",
        fortran=np.asfortranarray(values),
        big=values.astype(">f4"),
        half=half.view(torch.int16).numpy().view("V2"),
        long=np.arange(6).reshape(2, 3).astype(">i8"),
    )
    found = read_all(tmp_path / "t.npz")
    assert torch.equal(found["fortran"], torch.from_numpy(values))
    assert torch.equal(found["big"], torch.from_numpy(values))
    assert torch.equal(found["half"], half)
    assert found["half"].dtype is torch.bfloat16
    assert found["long"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_the_content_tells_the_kind(tmp_path: Path):
    """Whatever a file is called; the hub's cache has names without a suffix."""
    tensors = drawn()
    save_file(tensors, tmp_path / "0a1b.npz")
    write_npz(tmp_path / "2c3d.pth", tensors)
    torch.save(tensors, tmp_path / "4e5f")
    for name in ("0a1b.npz", "2c3d.pth", "4e5f"):
        assert equal(read_all(tmp_path / name, trust_pickle=True), tensors)


def test_only_the_asked_tensor_is_read(tmp_path: Path):
    """A file that lost its end is noticed where the missing values are asked for."""
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.randn(100), "b": torch.randn(100)}, path)
    container = open_container(path)
    os.truncate(path, path.stat().st_size - 8)
    assert container.tensor("a").shape == (100,)
    with pytest.raises(PatchwordError, match="b cannot be read: it ends after 392 of 400 bytes"):
        container.tensor("b")


# Pickles -----------------------------------------------------------------------------------------


def test_pickles_are_refused_unless_trusted(tmp_path: Path):
    torch.save(drawn(), tmp_path / "t.pth")
    for name in ("t.pth", "t.pt", "pytorch_model.bin", "t"):
        path = (tmp_path / "t.pth").rename(tmp_path / name)
        with pytest.raises(PatchwordError, match=r"is a pickle.*pass --trust-pickle"):
            open_container(path)
        path.rename(tmp_path / "t.pth")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: {"model": d, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda d: {"state_dict": {f"module.{n}": v for n, v in d.items()}},
        lambda d: {"model_state_dict": {f"_orig_mod.{n}": v for n, v in d.items()}},
        lambda d: {"model": {"state_dict": {f"module._orig_mod.{n}": v for n, v in d.items()}}},
        lambda d: {f"_orig_mod.module.{n}": v for n, v in d.items()},
        lambda d: {"state_dict": {"x": torch.zeros(1)}, "state_dict_ema": d},
        lambda d: {n: torch.nn.Parameter(v) for n, v in d.items()},
        lambda d: d | {"step": 3, 7: torch.zeros(1), "note": "text"},
    ],
    ids=["model", "parallel", "compiled", "nested", "both", "averaged", "parameters", "more"],
)
def test_what_programs_wrap_state_dicts_in_is_taken_off(
    tmp_path: Path, wrap: Callable[[dict[str, Tensor]], Any]
):
    tensors = drawn()
    torch.save(wrap(tensors), tmp_path / "t.pth")
    found = read_all(tmp_path / "t.pth", trust_pickle=True)
    assert equal(found, tensors)
    assert not any(value.requires_grad for value in found.values())


def test_pickles_of_the_old_kind_are_named(tmp_path: Path):
    path = tmp_path / "t.pth"
    torch.save(drawn(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(PatchwordError, match=r"a pickle of the old kind.*save it again"):
        open_container(path, trust_pickle=True)


def test_pickles_without_tensors_are_named(tmp_path: Path):
    path = tmp_path / "t.pth"
    for value, message in (([1, 2], "holds a list"), ({"epoch": 3}, "holds no tensors")):
        torch.save(value, path)
        with pytest.raises(PatchwordError, match=message):
            open_container(path, trust_pickle=True)


# Folders -----------------------------------------------------------------------------------------


def test_weights_are_found_in_order(tmp_path: Path, scattered: Make, same: Same):
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


def test_folders_of_other_programs(tmp_path: Path):
    tensors = drawn()
    (tmp_path / "config.json").write_text('{"depth": 3}')
    (tmp_path / "preprocessor_config.json").write_text('{"size": 4}')

    def check(path: Path, **options: Any) -> None:
        assert equal(read_all(tmp_path, **options), tensors)
        container = open_container(tmp_path, **options)
        assert container.path == path
        assert container.config == {"depth": 3, "preprocessor": {"size": 4}}

    check(write_npz(tmp_path / "some.npz", tensors))
    write_npz(tmp_path / "other.npz", tensors)
    with pytest.raises(PatchwordError, match=r"holds 2 weight files; name one: .*other\.npz"):
        open_container(tmp_path)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(PatchwordError, match="--trust-pickle"):
        open_container(tmp_path)
    check(tmp_path / "pytorch_model.bin", trust_pickle=True)
    save_file(tensors, tmp_path / "model.safetensors")
    check(tmp_path / "model.safetensors")


def test_configs_belong_to_standard_names_and_folders(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"depth": 3}')
    for name, config in (("model.safetensors", {"depth": 3}), ("vit.safetensors", {})):
        save_file(drawn(), tmp_path / name)
        assert open_container(tmp_path / name).config == config
    for text in ("{", "[]", "\xff", "[" * 100_000):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(
            PatchwordError, match=r"config\.json (cannot be read|holds no JSON obj)"
        ):
            open_container(tmp_path)


def test_our_own_files_need_no_config(tmp_path: Path, scattered: Make, same: Same):
    """That of a run directory is of another kind."""
    model = scattered()
    save_model(model, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("not JSON")
    assert same(load_model(tmp_path), model)


def test_shards(tmp_path: Path, scattered: Make, same: Same):
    folder = save_model(scattered(), tmp_path / "hf", format="huggingface")
    whole = load_model(folder)
    tensors = read_all(folder)
    names = sorted(tensors)
    places = {name: f"model-{1 + k % 3:05}-of-00003.safetensors" for k, name in enumerate(names)}
    for file in set(places.values()):
        save_file({n: tensors[n] for n in names if places[n] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    assert equal(read_all(folder), tensors)
    assert same(load_model(folder), whole)
    assert same(load_model(index), whole)
    index.write_text(json.dumps({"weight_map": places | {"more": places[names[0]]}}))
    with pytest.raises(PatchwordError, match=r"places 'more' in .*, where it is not"):
        open_container(folder)
    index.write_text(json.dumps({"weight_map": places | {"more": "gone.safetensors"}}))
    with pytest.raises(PatchwordError, match=r"gone\.safetensors is not a readable safetensors"):
        open_container(folder)


# The hub: its library's cache, and no network ----------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's library, and no way out."""
    import huggingface_hub.constants as constants

    def blocked(*_: Any, **__: Any) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", blocked)
    monkeypatch.setattr(socket, "getaddrinfo", blocked)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_hub_weights_from_the_cache(cache: Path, scattered: Make, same: Same):
    """As the library lays it out: `models--ORG--NAME/{refs,snapshots}`."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repo = cache / "models--some--vit-mu"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    (repo / "snapshots").mkdir()
    folder = save_model(scattered(), repo / "snapshots" / revision, format="huggingface")
    wanted = load_model(folder)
    assert same(load_model("hub:some/vit-mu"), wanted)
    assert same(load_model(Path("hub:some/vit-mu")), wanted)
    assert same(load_model(f"hub:some/vit-mu@{revision}"), wanted)


@pytest.mark.usefixtures("cache")
def test_the_hub_out_of_reach_is_one_line():
    with pytest.raises(PatchwordError, match="hub:some/other cannot be fetched") as raised:
        load_model("hub:some/other")
    assert "\n" not in str(raised.value)
    for name in ("vit", "a/b/c", "", "../../etc/passwd", "a/b c"):
        with pytest.raises(UsageError, match="write hub:ORG/NAME"):
            load_model(f"hub:{name}")


def test_the_hub_is_told_of_no_use(monkeypatch: pytest.MonkeyPatch):
    """When the library is called, it names no other package to the hub."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    told: list[str] = [build_hf_headers()["user-agent"]]

    def snapshot_download(*_: Any, **__: Any) -> str:
        told.append(build_hf_headers()["user-agent"])
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(PatchwordError, match="cannot be fetched"):
        load_model("hub:some/vit")
    assert ["torch/" in agent for agent in told] == [True, False]


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(PatchwordError, match=r"pip install 'patchword\[hub\]'"):
        load_model("hub:some/vit")
