"""Features of a data set, computed once and kept on disk."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from patchword import PatchwordError, UsageError, ViT, create_model, load_model, save_model
from patchword.data.images import BadImage
from patchword.data.registry import open_source
from patchword.data.sources import Source
from patchword.data.transforms import EvalTransform, to_input
from patchword.models.model import Model
from patchword.session.features import Features, cache_folder, cache_key, extract


@pytest.fixture
def model() -> Model:
    """A small model, all parameters drawn."""
    net = create_model("ViT-mu/8", 5, 16, depth=2)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of eight noisy pictures, the third of them broken."""
    root, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for k, name in enumerate(("dark", "light")):
        (root / name).mkdir()
        for i in range(8):
            pixels = rng.integers(0, 128, (20, 24 + i, 3), dtype=np.uint8) + 127 * k
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    (root / "dark" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    return root


@pytest.fixture
def source(folder: Path) -> Source:
    return open_source(str(folder))


ORDER = np.array([15, 3, 2, 0, 8, 9])
"""Some positions in the source, the broken file's among them."""


def take(model: Model, source: Source, cache: Any, **options: Any) -> Features:
    return extract(model, source, ORDER, device="cpu", cache=cache, **options)


def forbid(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the model must not run."""

    def fail(images: torch.Tensor) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(model, "pooled_features", fail)


@pytest.mark.parametrize(
    ("batch_size", "workers"), [(1, 0), (4, 2), (64, 0)], ids=["ones", "workers", "all"]
)
def test_features_are_those_of_the_model(
    model: Model, source: Source, batch_size: int, workers: int
):
    calls: list[tuple[int, int]] = []
    found = take(
        model,
        source,
        False,
        batch_size=batch_size,
        workers=workers,
        progress=lambda *done: calls.append(done),
    )
    good = [15, 3, 0, 8, 9]
    transform = EvalTransform((16, 16), 3, model.preprocess)
    images = torch.from_numpy(np.stack([transform(source.read(i)) for i in good]))
    with torch.inference_mode():
        wanted = model.features(to_input(images, model.preprocess)).pooled
    assert (found.pooled - wanted).abs().max() < 1e-5
    assert found.pooled.dtype == torch.float32
    assert found.labels.tolist() == [1, 0, 0, 1, 1]
    assert found.indices.tolist() == good
    assert found.skipped == 1
    assert found.bad[0][0] == 2
    assert calls[-1] == (6, 6)
    assert found.cached is None


def test_the_second_time_they_are_read(
    model: Model,
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level("INFO")
    first = take(model, source, tmp_path)
    assert "read from" not in caplog.text
    forbid(model, monkeypatch)
    second = take(model, source, tmp_path)
    assert second.cached is not None
    assert f"features of 6 images read from {second.cached}" in caplog.text
    assert torch.equal(first.pooled, second.pooled)
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first.indices, second.indices)
    assert first.bad == second.bad
    assert [p.name for p in tmp_path.iterdir()] == [second.cached.name]  # nothing else is left


def test_features_train_a_head(model: Model, source: Source, tmp_path: Path):
    """They are plain tensors, computed or read."""
    for _ in range(2):
        found = take(model, source, tmp_path)
        head = torch.nn.Linear(found.pooled.shape[1], 2)
        torch.nn.functional.cross_entropy(head(found.pooled), found.labels).backward()
        assert head.weight.grad is not None


def test_the_default_folder(
    model: Model, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATCHWORD_CACHE", str(tmp_path / "kept"))
    take(model, source, True)
    assert cache_folder() == tmp_path / "kept" / "features"
    assert len(list(cache_folder().iterdir())) == 1
    monkeypatch.delenv("PATCHWORD_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "patchword" / "features"


def _weights(model: Model, source: Source) -> tuple[Model, Source, dict[str, Any]]:
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "hidden.bias" in n)[0] += 1
    return model, source, {}


def _spec(model: Model, source: Source) -> tuple[Model, Source, dict[str, Any]]:
    """The same tensors, other heads."""
    spec: Any = dataclasses.replace(model.spec, heads=1)
    other = ViT(spec, preprocess=model.preprocess)
    other.load_state_dict(model.state_dict())
    return other, source, {}


def _preprocess(model: Model, source: Source) -> tuple[Model, Source, dict[str, Any]]:
    model.preprocess = dataclasses.replace(model.preprocess, crop_fraction=1.0)
    return model, source, {}


def _precision(model: Model, source: Source) -> tuple[Model, Source, dict[str, Any]]:
    return model, source, {"precision": "bfloat16"}


@pytest.mark.parametrize("change", [_weights, _spec, _preprocess, _precision])
def test_what_changes_features_is_noticed(
    model: Model, source: Source, tmp_path: Path, change: Any
):
    first = take(model, source, tmp_path)
    other, data, options = change(model, source)
    second = take(other, data, tmp_path, **options)
    assert second.cached is None
    assert len(list(tmp_path.iterdir())) == 2
    assert first.pooled.shape == second.pooled.shape
    assert not torch.equal(first.pooled, second.pooled)


@pytest.mark.parametrize("kind", ["bmp", "ppm"])
def test_files_of_one_size_with_other_pixels_are_other_data(
    model: Model, tmp_path: Path, kind: str
):
    root, cache = tmp_path / "noise", tmp_path / "cache"

    def features(seed: int) -> Features:
        rng = np.random.default_rng(seed)
        for name in ("dark", "light"):
            (root / name).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"0.{kind}")
        source = open_source(str(root))
        return extract(model, source, np.arange(2), device="cpu", cache=cache)

    first, other, again = features(0), features(1), features(0)
    assert other.cached is None
    assert not torch.equal(first.pooled, other.pooled)
    assert again.cached is not None
    assert torch.equal(first.pooled, again.pooled)


class Faulty:
    """Reads as another reader does, but for some images, which it fails to read so many times."""

    def __init__(self, reader: Any, faults: dict[int, int]) -> None:
        self.reader, self.faults = reader, faults
        self.location, self.digest = reader.location, reader.digest

    def read(self, index: int) -> Any:
        if self.faults.get(index, 0):
            self.faults[index] -= 1
            raise BadImage("Input/output error")
        return self.reader.read(index)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_read_errors_are_not_for_ever(
    model: Model, source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture, times: int
):
    """Whether the fault lasts for the pass, or for the next command too; 2 is always broken."""
    caplog.set_level("INFO")
    whole = take(model, source, False)
    faulty = dataclasses.replace(source, reader=Faulty(source.reader, {8: times}))
    first = take(model, faulty, tmp_path)
    assert dict(first.bad).keys() == {2, 8}
    found = take(model, faulty, tmp_path)
    if times == 3:  # tried once in the pass, once after it, and once by the second command
        assert found.cached is not None
        assert dict(found.bad).keys() == {2, 8}
        found = take(model, faulty, tmp_path)
    assert found.cached is None
    assert "1 of the images that could not be read can be by now" in caplog.text
    assert torch.equal(found.pooled, whole.pooled)
    assert dict(found.bad).keys() == {2}
    assert take(model, faulty, tmp_path).cached is not None


def test_other_positions_are_other_features(model: Model, source: Source, tmp_path: Path):
    take(model, source, tmp_path)
    turned = extract(model, source, ORDER[::-1], device="cpu", cache=tmp_path)
    assert turned.cached is None
    assert turned.labels.tolist() == [1, 1, 0, 0, 1]


def test_the_head_does_not_matter(model: Model, source: Source, tmp_path: Path):
    """Nor whether the weights come from a file."""
    first = take(model, source, tmp_path / "cache")
    assert model.head is not None
    torch.nn.init.normal_(model.head.weight)
    assert take(model, source, tmp_path / "cache").cached is not None
    spec: Any = dataclasses.replace(model.spec, num_classes=0)
    bare = ViT(spec, preprocess=model.preprocess)
    body = {n: t for n, t in model.state_dict().items() if not n.startswith("head.")}
    bare.load_state_dict(body)
    again = load_model(save_model(bare, tmp_path / "bare.safetensors"))
    found = take(again, source, tmp_path / "cache")
    assert found.cached is not None
    assert torch.equal(found.pooled, first.pooled)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 16
    path.write_bytes(bytes(content))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _foreign(path: Path) -> None:
    save_model(create_model("ViT-mu/8", 5, 16, depth=1), path, overwrite=True)


@pytest.mark.parametrize("damage", [_cut, _flip, _empty, _foreign])
def test_a_damaged_file_is_replaced(
    model: Model, source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any
):
    first = take(model, source, tmp_path)
    (path,) = tmp_path.iterdir()
    damage(path)
    second = take(model, source, tmp_path)
    assert "cannot be used, the features are computed anew" in caplog.text
    assert second.cached is None
    assert torch.equal(first.pooled, second.pooled)
    assert take(model, source, tmp_path).cached == path


def test_a_file_under_another_name_is_not_believed(model: Model, source: Source, tmp_path: Path):
    other = create_model("ViT-mu/8", 5, 16, depth=2).eval()
    wanted = take(other, source, False)
    take(other, source, tmp_path / "b")
    take(model, source, tmp_path / "a")
    (ours,), (theirs,) = (tmp_path / "a").iterdir(), (tmp_path / "b").iterdir()
    shutil.copy(ours, theirs)
    assert torch.equal(take(other, source, tmp_path / "b").pooled, wanted.pooled)


@pytest.mark.parametrize("block", ["parent", "file"])
def test_a_cache_that_cannot_be_written(
    model: Model, source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture, block: str
):
    wanted = take(model, source, tmp_path / "good")
    (path,) = (tmp_path / "good").iterdir()
    if block == "parent":
        (tmp_path / "bad").write_text("a file where the folder should be")
    else:
        (tmp_path / "bad" / path.name).mkdir(parents=True)
    found = take(model, source, tmp_path / "bad")
    assert torch.equal(found.pooled, wanted.pooled)
    assert "the features are not kept" in caplog.text
    if block == "file":
        assert [p.name for p in (tmp_path / "bad").iterdir()] == [path.name]


def test_bad_images_can_be_fatal(model: Model, source: Source, tmp_path: Path):
    """Also where the cache knows how to go without them."""
    take(model, source, tmp_path)
    with pytest.raises(PatchwordError, match=r"2\.png"):
        take(model, source, tmp_path, on_bad="fail")
    with pytest.raises(PatchwordError, match="none of 1 images can be read"):
        extract(model, source, np.array([2]), device="cpu", cache=tmp_path)
    with pytest.raises(PatchwordError, match="no images to compute features of"):
        extract(model, source, np.array([], np.int64), device="cpu", cache=tmp_path)
    with pytest.raises(UsageError, match="unknown precision 'float61'"):
        take(model, source, tmp_path, precision="float61")


def test_features_that_are_not_finite(model: Model, source: Source, tmp_path: Path):
    with torch.no_grad():
        next(model.parameters())[:] = torch.nan
    with pytest.raises(PatchwordError, match=r"features of .*7\.png are not finite"):
        take(model, source, tmp_path)
    assert not list(tmp_path.iterdir())


def test_bfloat16_leaves_the_model_alone(model: Model, source: Source):
    exact = take(model.train(), source, False)
    rounded = take(model, source, False, precision="bfloat16")
    assert next(model.parameters()).dtype == torch.float32
    assert rounded.pooled.dtype == torch.float32
    difference = (exact.pooled - rounded.pooled).abs().max()
    assert 0 < difference < 0.1 * exact.pooled.abs().max()


def test_features_after_a_hidden_layer(source: Source, tmp_path: Path):
    """tanh of the pre-logits layer, in a file of its own that depends on that layer's weights."""
    net = create_model("ViT-mu/8", 5, 16, head="mlp")
    assert isinstance(net, ViT)
    assert net.pre_logits is not None
    with torch.no_grad():
        torch.nn.init.normal_(net.pre_logits.weight, std=0.3)
        pooled = take(net, source, tmp_path)
        found = take(net, source, tmp_path, layer="pre-logits")
        assert not torch.allclose(found.pooled, pooled.pooled, atol=0.01)
        torch.testing.assert_close(found.pooled, torch.tanh(net.pre_logits(pooled.pooled)))
        assert take(net, source, tmp_path, layer="pre-logits").cached is not None
        keys = [cache_key(net, source, ORDER, "float32", at) for at in ("pooled", "pre-logits")]
        net.pre_logits.bias.add_(1)
        moved = [cache_key(net, source, ORDER, "float32", at) for at in ("pooled", "pre-logits")]
    assert keys[0] == cache_key(net, source, ORDER, "float32") == moved[0]
    assert len({*keys, *moved}) == 3


def test_without_a_hidden_layer_there_is_one_file(model: Model, source: Source, tmp_path: Path):
    assert torch.equal(
        take(model, source, tmp_path).pooled,
        take(model, source, tmp_path, layer="pre-logits").pooled,
    )
    assert len(list(tmp_path.iterdir())) == 1


def test_an_unknown_layer_is_named(model: Model, source: Source):
    with pytest.raises(UsageError, match="unknown layer 'prelogits'; did you mean pre-logits"):
        take(model, source, False, layer="prelogits")
