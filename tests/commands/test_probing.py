"""`patchword evaluate --probe`: what it measures, and on what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from patchword import PatchwordError, UsageError, ViT, create_model, load_model, save_model
from patchword.commands.probing import measure_probes, probe_parts
from patchword.data.registry import open_source
from patchword.data.sources import Source
from patchword.evaluation.fewshot import few_shot_accuracies
from patchword.session.features import extract

Command = Callable[..., tuple[int, str, str]]
AsJson = Callable[..., Any]
MakePhotos = Callable[..., Path]
ALL = ("--probe", "fewshot", "--probe", "knn", "--probe", "logistic", "--workers", 0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATCHWORD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Weights without a head."""
    return save_model(create_model("ViT-mu/8", 0, 16, depth=1), tmp_path / "bare.safetensors")


def test_the_fields_of_the_json(finished: Path, photos: Path, as_json: AsJson):
    found = as_json("evaluate", finished, photos, *ALL)
    assert found.keys() == {
        *("fewshot", "knn", "logistic"),
        *("layer", "split", "n", "support", "skipped"),
    }
    assert list(found["fewshot"]) == ["1", "5", "10", "25"]
    for row in found["fewshot"].values():
        assert row.keys() == {"mean", "std"}
        assert 0 <= row["mean"] <= 1
    assert list(found["knn"]) == ["10", "20"]
    assert found["logistic"].keys() == {"top1", "l2", "development_top1"}
    assert found["layer"] == "pooled"  # its head is one linear layer
    assert (found["split"], found["n"], found["support"]) == ("test", 4, 28)
    assert found["fewshot"]["10"]["mean"] > 0.8  # the run learned the colours
    assert found["logistic"]["top1"] > 0.7
    one = as_json("evaluate", finished, photos, "--probe", "knn", "--workers", 0)
    assert one == {key: found[key] for key in ("knn", "layer", "split", "n", "support", "skipped")}


def test_the_table_and_what_is_said(
    finished: Path, photos: Path, cache: Path, command: Command, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    code, out, err = command("evaluate", finished, photos, *ALL)
    assert code == 0, err
    for words in ("few-shot", "25 a class", "nearest neighbours", "k 20", "logistic regression"):
        assert words in out
    assert "split test: held out by first; learned from 28 images of train; features pooled" in err
    assert "3 of 3 classes have fewer than 25 images to learn from; they give all" in caplog.text
    assert len(list(cache.iterdir())) == 3
    assert "read from" not in caplog.text
    assert command("evaluate", finished, photos, *ALL)[1] == out
    assert caplog.text.count("read from") == 3
    code, _, err = command("evaluate", finished, photos, "--probe", "kNN")
    assert code == 2
    assert "fewshot" in err


@pytest.mark.parametrize("name", ["ViT-mu/8", "Mixer-S/16", "BiT-R50x1"])
def test_models_of_every_family_without_a_head(make_photos: MakePhotos, tmp_path: Path, name: str):
    data = make_photos(tmp_path / "data", 10)
    options: dict[str, Any] = {"layers": (1, 1, 1, 1)} if name.startswith("BiT") else {"depth": 1}
    model = create_model(name, 0, 32, **options)
    found = measure_probes(model, data, device="cpu", workers=0)
    assert found.split == "test"
    assert found.n == 3
    assert found.logistic is not None
    assert found.to_dict()["knn"]["10"] >= 0
    assert all(p.requires_grad for p in model.parameters())


def test_the_figures_are_those_of_the_parts(bare: Path, photos: Path):
    source = open_source(str(photos))
    parts = probe_parts(source, None, None, 0)
    model = load_model(bare)
    train, test = (
        extract(model, source, at, device="cpu", cache=False) for at in (parts.train, parts.queries)
    )
    wanted = few_shot_accuracies(
        train.pooled, train.labels, test.pooled, test.labels, 3, shots=(2,), seeds=2
    )
    found = measure_probes(
        bare, photos, ["fewshot"], device="cpu", workers=0, shots=(2,), seeds=2, cache=False
    )
    assert found.fewshot == wanted
    assert found.knn is None
    assert found.logistic is None
    assert found.skipped == 1


def divided(make_photos: MakePhotos, root: Path, parts: tuple[str, ...]) -> Source:
    names = [f"{part}/{name}" for part in parts for name in ("red", "green")]
    return open_source(str(make_photos(root, 10, names)))


@pytest.mark.parametrize(
    ("given", "split", "queries", "own"),
    [
        (("train", "val", "test"), None, "test", True),
        (("train", "val", "test"), "val", "val", False),
        (("train", "test"), None, "test", False),
        (("train", "val"), None, "val", False),
    ],
)
def test_parts_that_the_data_give(
    make_photos: MakePhotos,
    tmp_path: Path,
    given: tuple[str, ...],
    split: str | None,
    queries: str,
    own: bool,
):
    """What is measured on is never learned from; without a val part of its own, the regulariser is
    chosen on some of train."""
    source = divided(make_photos, tmp_path / "data", given)
    parts = probe_parts(source, None, split, 0)
    assert parts.split == queries
    assert parts.why == "given by the data"
    assert np.array_equal(parts.queries, source.parts[queries])
    assert np.array_equal(parts.train, source.parts["train"])
    assert np.isin(parts.development, parts.train).all() != own
    assert len(parts.development) == (20 if own else 2)
    assert not np.isin(parts.development, parts.queries).any()


def test_data_without_parts_are_divided(photos: Path):
    source = open_source(str(photos))
    parts = probe_parts(source, None, None, 0)
    assert (len(parts.train), len(parts.development), len(parts.queries)) == (29, 4, 4)
    assert "held out of the data, seed 0" in parts.why
    every = np.concatenate([parts.train, parts.development, parts.queries])
    assert sorted(every.tolist()) == list(range(len(source)))
    other = probe_parts(source, None, None, 1)
    assert not np.array_equal(other.queries, parts.queries)


def test_the_logistic_probe_with_and_without_a_val_part(
    bare: Path, make_photos: MakePhotos, tmp_path: Path
):
    for given in (("train", "val", "test"), ("train", "test")):
        names = [f"{part}/{name}" for part in given for name in ("red", "green")]
        data = make_photos(tmp_path / "-".join(given), 12, names)
        found = measure_probes(bare, data, ["logistic"], device="cpu", workers=0)
        assert found.logistic_probe is not None
        shares = {share for _, share, _ in found.logistic_probe.table}
        size = 24 if "val" in given else 2
        assert all((share * size) % 1 == pytest.approx(0, abs=1e-9) for share in shares)
        assert found.logistic_probe.weight.shape[0] == 2


def test_what_cannot_be_probed(
    bare: Path, photos: Path, make_photos: MakePhotos, tmp_path: Path, command: Command
):
    data = tmp_path / "data"
    divided(make_photos, data, ("val",))
    with pytest.raises(PatchwordError, match="no train part for a probe to learn from, only val"):
        measure_probes(bare, data, device="cpu")
    with pytest.raises(UsageError, match="the data have no 'train'"):
        measure_probes(bare, photos, split="train", device="cpu")
    wrong: Any = ["nkn"]
    with pytest.raises(UsageError, match="unknown probe 'nkn'; did you mean knn"):
        measure_probes(bare, photos, wrong, device="cpu")
    with pytest.raises(UsageError, match="a model has its own"):
        measure_probes(load_model(bare), photos, image_size=32, device="cpu")
    only = make_photos(tmp_path / "only", 4, ["red"])
    code, _, err = command("evaluate", bare, only, "--probe", "knn")
    assert code == 1
    assert "nothing to tell apart" in err


def test_bfloat16_and_other_sizes(bare: Path, photos: Path, cache: Path):
    exact = measure_probes(bare, photos, ["knn"], device="cpu", workers=0)
    rounded = measure_probes(
        bare, photos, ["knn"], device="cpu", workers=0, precision="bfloat16", image_size=32
    )
    assert exact.n == rounded.n
    assert len(list(cache.iterdir())) == 4
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture
def hidden(tmp_path: Path) -> Path:
    """Weights whose head has a hidden layer, which makes everything nearly the same."""
    torch.manual_seed(0)
    model = create_model("ViT-mu/8", 3, 16, head="mlp")
    assert isinstance(model, ViT)
    assert model.pre_logits is not None
    torch.nn.init.normal_(model.pre_logits.weight, std=0.3)
    return save_model(model, tmp_path / "hidden.safetensors")


def test_a_hidden_layer_is_probed_behind_unless_asked(
    hidden: Path, photos: Path, cache: Path, command: Command, as_json: AsJson
):
    """As the authors' code has it (big_vision, common_fewshot: pre_logits). Their files differ."""
    model, source = load_model(hidden), open_source(str(photos))
    parts = probe_parts(source, None, None, 0)
    for layer, flags in (("pre-logits", ()), ("pooled", ("--layer", "pooled"))):
        found = as_json("evaluate", hidden, photos, *ALL, *flags)
        assert found["layer"] == layer
        features = [
            extract(model, source, at, device="cpu", cache=False)
            for at in (parts.train, parts.queries)
        ]
        rows = [part.pooled for part in features]
        if layer == "pre-logits":
            rows = [torch.tanh(model.pre_logits(part)).detach() for part in rows]  # type: ignore[operator]
        wanted = few_shot_accuracies(
            *(rows[0], features[0].labels, rows[1], features[1].labels, 3), shots=(5,)
        )
        assert found["fewshot"]["5"]["mean"] == pytest.approx(wanted[5].mean)
    assert len(list(cache.iterdir())) == 6
    code, _, err = command("evaluate", hidden, photos, *ALL)
    assert code == 0
    assert "; features pre-logits" in err


def test_a_layer_without_a_probe(hidden: Path, photos: Path, command: Command):
    code, _, err = command("evaluate", hidden, photos, "--layer", "pooled")
    assert code == 2
    assert "--layer goes with --probe" in err


def test_without_a_hidden_layer_the_layers_are_one(
    finished: Path, photos: Path, cache: Path, as_json: AsJson
):
    """Also on disk: what earlier versions kept is still read."""
    found = [
        as_json("evaluate", finished, photos, *ALL, "--layer", layer)
        for layer in ("pooled", "pre-logits")
    ]
    assert found[0] == found[1]
    assert len(list(cache.iterdir())) == 3
