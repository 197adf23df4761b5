"""`patchword evaluate` on a finished run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import patchword
from patchword import UsageError, create_model, load_model, save_model
from patchword.models.zoo import build_model

Command = Callable[..., tuple[int, str, str]]
AsJson = Callable[..., Any]
MakePhotos = Callable[..., Path]


def test_the_fields_of_evaluate_json(finished: Path, photos: Path, as_json: AsJson):
    found = as_json("evaluate", finished, photos, "--workers", 0)
    bound = {"n", "top1", "top5", "loss", "ece", "per_class"}
    assert found.keys() == bound | {"balanced", "brier", "skipped", "split"}
    assert found["per_class"].keys() == {"blue", "green", "red"}
    for row in found["per_class"].values():
        assert row.keys() == {"n", "recall", "precision"}
    assert sum(row["n"] for row in found["per_class"].values()) == found["n"]
    for name in ("top1", "top5", "balanced", "ece"):
        assert 0 <= found[name] <= 1
    assert found["top5"] == 1  # of three classes
    summary = json.loads((finished / "summary.json").read_text())
    for name in ("n", "top1", "balanced", "loss", "ece", "brier"):
        assert found[name] == pytest.approx(summary[name], rel=1e-6)


def test_which_part_is_measured(
    finished: Path,
    photos: Path,
    make_photos: MakePhotos,
    tmp_path: Path,
    command: Command,
    caplog: pytest.LogCaptureFixture,
):
    """test, else val, else what the run held out, else all; standard error says which."""
    table = {
        (): ("split test: held out by first", 4),
        ("--split", "val"): ("split val: held out by first", 4),
        ("--split", "train"): ("split train: trained on by first", 28),
        ("--split", "all"): ("split all: all images", 36),
    }
    for words, (said, n) in table.items():
        code, out, err = command("evaluate", finished, photos, *words, "--json", "--workers", 0)
        assert code == 0, err
        assert said in err
        assert json.loads(out)["n"] == n
        assert json.loads(out)["split"] == (words[1] if words else "test")
    # given by the data
    for parts, wanted in ((("train", "val", "test"), "test"), (("train", "val"), "val")):
        names = [f"{part}/{name}" for part in parts for name in ("red", "green")]
        data = make_photos(tmp_path / wanted, 3, names)
        _, _, err = command("evaluate", finished, data, "--workers", 0)
        assert f"split {wanted}: given by the data" in err
    # other data, without splits
    data = make_photos(tmp_path / "plain", 3)
    code, _, err = command("evaluate", finished, data, "--workers", 0)
    assert code == 0
    assert "split all: all images of the data" in err
    assert "images that first was trained on may be among them" in caplog.text
    assert "start a new run" not in caplog.text
    code, _, err = command("evaluate", finished, data, "--split", "tests")
    assert code == 2
    assert "no 'tests' part" in err


@pytest.mark.parametrize("inner", ["best", "last", "best/model.safetensors"])
def test_weights_in_a_run_know_what_it_held_out(
    finished: Path, photos: Path, inner: str, as_json: AsJson
):
    assert as_json("evaluate", finished / inner, photos, "--workers", 0)["split"] == "test"


def test_any_batch_size_gives_the_same_figures(finished: Path, photos: Path):
    results = [
        patchword.evaluate(
            finished, photos, split="all", batch_size=size, workers=workers
        ).classification
        for size, workers in ((1, 0), (5, 2), (36, 0), (1000, 0))
    ]
    for result in results:
        assert result.n == 36
        assert result.skipped == 1
        assert result.top1 == results[0].top1
        assert result.per_class == results[0].per_class
        assert result.loss == pytest.approx(results[0].loss, rel=1e-5)
        assert result.ece == pytest.approx(results[0].ece, abs=1e-5)
    assert results[0].top1 > 0.8


def test_labels_match_by_name(
    finished: Path, make_photos: MakePhotos, tmp_path: Path, as_json: AsJson, command: Command
):
    """A manifest, whose classes sort otherwise, and a folder with some of the classes only."""
    subset = make_photos(tmp_path / "subset", 6, ("red", "green"), 500)
    found = as_json("evaluate", finished, subset, "--workers", 0)
    assert found["n"] == 12
    assert found["top1"] > 0.8
    assert found["per_class"]["blue"] == {
        "n": 0,
        "recall": None,
        "precision": found["per_class"]["blue"]["precision"],
    }
    red = subset / "only"
    shutil.copytree(subset / "red", red / "red")
    assert as_json("evaluate", finished, red, "--workers", 0)["per_class"]["red"]["recall"] > 0.6
    (subset / "red").rename(subset / "rot")
    shutil.rmtree(red)
    code, _, err = command("evaluate", finished, subset)
    assert code == 1
    assert "does not know 1 of the data's 2 classes: 'rot'" in err


def test_order_of_classes_does_not_matter(finished: Path, photos: Path, tmp_path: Path):
    """The same weights with the classes the other way round give the same figures."""
    model = load_model(finished)
    wanted = patchword.evaluate(finished, photos, split="all", workers=0).classification
    order = [2, 0, 1]
    assert model.head is not None
    model.head.weight.data = model.head.weight.data[order]
    model.head.bias.data = model.head.bias.data[order]
    model.classes = tuple(model.classes[k] for k in order)
    found = patchword.evaluate(model, photos, split="all", workers=0).classification
    assert found.top1 == wanted.top1
    assert {**found.per_class} == {**wanted.per_class}
    path = save_model(model, tmp_path / "turned.safetensors")
    assert patchword.evaluate(path, photos, workers=0).split == "all"  # no run, nothing held out


def test_evaluate_table(finished: Path, photos: Path, command: Command):
    code, out, _ = command("evaluate", finished, photos, "--split", "all", "--workers", 0)
    assert code == 0
    assert "top-1" in out
    assert "green" in out


def test_evaluate_other_sizes_and_precisions(finished: Path, photos: Path):
    plain = patchword.evaluate(finished, photos, split="all", workers=0).classification
    half = patchword.evaluate(
        finished, photos, split="all", workers=0, precision="bfloat16"
    ).classification
    assert half.loss != plain.loss
    assert half.loss == pytest.approx(plain.loss, rel=0.05)
    large = patchword.evaluate(finished, photos, split="all", workers=0, image_size=(32, 24))
    assert large.classification.n == 36
    with pytest.raises(UsageError, match="image_size"):
        patchword.evaluate(load_model(finished), photos, image_size=32)


def test_models_that_cannot_classify(photos: Path, command: Command, tmp_path: Path):
    path = save_model(create_model("ViT-mu/8", 0, 16), tmp_path / "f.safetensors")
    code, _, err = command("evaluate", path, photos)
    assert code == 1
    assert "no head" in err


def test_unnamed_classes_are_numbers(
    tmp_path: Path, photos: Path, caplog: pytest.LogCaptureFixture
):
    path = save_model(create_model("ViT-mu/8", 3, 16), tmp_path / "m.safetensors")
    found = patchword.evaluate(path, photos, workers=0).classification
    assert set(found.per_class) == {"0", "1", "2"}
    assert caplog.text.count("does not name its 3 classes") == 1
    assert {p.label for p in patchword.predict(path, photos / "red", workers=0)} == {"0"}


# Names from elsewhere ----------------------------------------------------------------------------


@pytest.fixture
def unnamed(finished: Path, tmp_path: Path) -> Path:
    """The weights of the run among 1,000 classes without names, in the places of ImageNet's tench,
    goldfish and crane bird (green, blue, red)."""
    known = load_model(finished)
    spec = dataclasses.replace(known.spec, num_classes=1000)
    model = build_model(spec, preprocess=known.preprocess)
    tensors = known.state_dict()
    head, bias = torch.zeros(1000, 32), torch.full((1000,), -100.0)
    for ours, theirs in ((known.classes.index(n), k) for k, n in PLACES.items()):
        head[theirs], bias[theirs] = tensors["head.weight"][ours], tensors["head.bias"][ours]
    model.load_state_dict(tensors | {"head.weight": head, "head.bias": bias})
    return save_model(model, tmp_path / "unnamed.safetensors")


@pytest.fixture
def imagenet_photos(make_photos: MakePhotos, tmp_path: Path) -> Path:
    """Photos of three classes in folders named by WordNet id or in English."""
    root = make_photos(tmp_path / "data", 6, ("green", "blue", "red"), 500)
    for before, after in (("green", "n01440764"), ("blue", "goldfish"), ("red", "n02012849")):
        (root / before).rename(root / after)
    return root


PLACES = {0: "green", 1: "blue", 134: "red"}


def test_classes_without_names_are_not_matched_by_position(
    unnamed: Path, imagenet_photos: Path, command: Command
):
    for name in ("evaluate", "calibrate"):
        words = ["--split", "half/half"] if name == "calibrate" else []
        code, out, err = command(name, unnamed, imagenet_photos, *words, "--workers", 0)
        assert code == 1
        assert not out
        said = " ".join(err.split())
        assert "does not name its 1,000 classes, and the data have 3" in said
        assert "--classes imagenet" in said


def test_imagenets_names(
    unnamed: Path, imagenet_photos: Path, as_json: AsJson, tmp_path: Path, command: Command
):
    words = ("--classes", "imagenet", "--workers", 0)
    found = as_json("evaluate", unnamed, imagenet_photos, *words)
    assert found["top1"] > 0.8
    assert found["per_class"]["crane bird"]["n"] == 6
    (row,) = as_json("predict", unnamed, imagenet_photos / "goldfish" / "00.jpg", *words)
    assert row["label"] == "goldfish"
    target = tmp_path / "calibrated.safetensors"
    split = ("--split", "half/half", "--out", target)
    assert command("calibrate", unnamed, imagenet_photos, *split, *words)[0] == 0
    assert load_model(target).classes[134] == "crane bird"
    assert as_json("evaluate", target, imagenet_photos, "--workers", 0)["top1"] > 0.8
    (imagenet_photos / "n02012849").rename(imagenet_photos / "crane")
    code, _, err = command("evaluate", unnamed, imagenet_photos, *words)
    assert code == 1
    assert "'crane' is a name of 2 classes of ImageNet, n02012849 and n03126707" in " ".join(
        err.split()
    )


def test_names_from_a_file(
    finished: Path, photos: Path, tmp_path: Path, as_json: AsJson, command: Command
):
    model = load_model(finished)
    model.classes = ()
    path = save_model(model, tmp_path / "m.safetensors")
    wanted = as_json("evaluate", finished, photos, "--split", "all", "--workers", 0)
    words = ("--classes", finished / "classes.json", "--workers", 0)
    assert as_json("evaluate", path, photos, *words) == wanted
    found = patchword.evaluate(path, photos, classes=["blue", "green", "red"], workers=0)
    assert found.classification.top1 == wanted["top1"]
    two = tmp_path / "two.txt"
    two.write_text("blue\ngreen\n")
    code, _, err = command("evaluate", path, photos, "--classes", two)
    assert code == 2
    assert "names 2 classes, the model has 3" in " ".join(err.split())
    with pytest.raises(UsageError, match="classes"):
        patchword.evaluate(model, photos, classes="imagenet")
    assert command("evaluate", path, photos, "--probe", "knn", *words)[0] == 0
