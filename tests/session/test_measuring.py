"""`patchword evaluate` and `patchword predict` on a finished run."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import patchword
from patchword import PatchwordError, UsageError, create_model, load_model, save_model
from patchword.models.zoo import build_model
from patchword.session.measuring import find_images

Command = Callable[..., tuple[int, str, str]]
AsJson = Callable[..., Any]
MakePhotos = Callable[..., Path]


# Evaluate ----------------------------------------------------------------------------------------


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


# Predict -----------------------------------------------------------------------------------------


def test_predict_json(finished: Path, photos: Path, as_json: AsJson):
    found = as_json(
        "predict", finished, photos / "green", photos / "red" / "00.jpg", "--workers", 0
    )
    assert len(found) == 13
    assert found[-1]["path"] == str(photos / "red" / "00.jpg")
    for row in found:
        assert row.keys() == {"path", "label", "probability", "top", "abstained"}
        assert row["abstained"] is False
        shares = [entry["probability"] for entry in row["top"]]
        assert [entry.keys() for entry in row["top"]] == [{"label", "probability"}] * 3
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1)
        assert row["top"][0] == {"label": row["label"], "probability": row["probability"]}
    right = sum(Path(row["path"]).parent.name == row["label"] for row in found)
    assert right >= 11


def test_predict_agrees_with_the_model(finished: Path, photos: Path):
    """Top-k, batch sizes and workers change nothing in the first figures."""
    wanted = patchword.predict(finished, photos / "blue", workers=0)
    changes: list[dict[str, Any]] = [
        {"batch_size": 1, "workers": 0},
        {"batch_size": 5, "workers": 2},
        {"top": 1},
    ]
    for options in changes:
        found = patchword.predict(finished, photos / "blue", **options)
        assert [p.path for p in found] == [p.path for p in wanted]
        assert [p.label for p in found] == [p.label for p in wanted]
        assert [p.probability for p in found] == pytest.approx([p.probability for p in wanted])
    assert all(len(p.top) == 1 for p in patchword.predict(finished, photos / "blue", top=1))


def test_bad_files_are_listed_and_the_rest_done(
    finished: Path, photos: Path, tmp_path: Path, command: Command, caplog: pytest.LogCaptureFixture
):
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    words = ("predict", finished, photos / "red", empty, "--workers", 0)
    code, out, err = command(*words, "--json")
    assert code == 0
    assert len(json.loads(out)) == 12
    assert "2 of 14 files could not be read" in err
    assert str(photos / "red" / "broken.jpg") in caplog.text
    assert str(empty) in caplog.text
    bad: dict[str, str] = {}
    patchword.predict(finished, [empty, photos / "red" / "00.jpg"], bad=bad, workers=0)
    assert list(bad) == [str(empty)]
    code, out, err = command("predict", finished, empty, "--json")
    assert code == 1
    assert out == ""
    assert "none of 1 images can be read" in err


def test_predict_csv(finished: Path, photos: Path, command: Command):
    code, out, _ = command("predict", finished, photos / "blue", "--csv", "--top", 2)
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == ["path", "label1", "probability1", "label2", "probability2"]
    assert len(rows) == 12
    assert all(float(row["probability1"]) >= float(row["probability2"]) for row in rows)


def listed(*names: str) -> io.TextIOWrapper:
    """Standard input that holds these lines."""
    return io.TextIOWrapper(io.BytesIO(os.fsencode("\n".join([*names, ""]))), "utf-8")


def test_predict_from_a_list_and_a_pattern(
    finished: Path, photos: Path, command: Command, monkeypatch: pytest.MonkeyPatch
):
    names = [str(photos / "red" / "00.jpg"), str(photos / "blue" / "01.png")]
    monkeypatch.setattr("sys.stdin", listed(*names, ""))
    code, out, _ = command("predict", finished, "-", "--json", "--workers", 0)
    assert code == 0
    assert [row["path"] for row in json.loads(out)] == names
    code, out, _ = command("predict", finished, f"{photos}/*/0[01].*", "--json", "--workers", 0)
    assert code == 0
    assert len(json.loads(out)) == 6


def test_predict_table_shows_names_as_they_are(
    finished: Path, photos: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
):
    """Brackets and colons in file names are no markup."""
    odd = tmp_path / "a[red]b[x]:cat:.png"
    shutil.copy(photos / "red" / "01.png", odd)
    monkeypatch.chdir(tmp_path)
    code, out, err = command("predict", finished, odd.name)
    assert code == 0, err
    assert odd.name in "".join(out.split())
    assert "%" in out


def test_predict_table_shows_long_names_in_full(
    finished: Path, photos: Path, tmp_path: Path, command: Command
):
    """A pipe is 80 columns wide: what does not fit goes on in the next line."""
    long = tmp_path / ("w" * 100 + ".png")
    shutil.copy(photos / "red" / "01.png", long)
    code, out, err = command("predict", finished, long)
    assert code == 0, err
    rows = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    assert "".join(rows) == str(long)


def test_file_names_may_hold_more_than_utf_8(
    finished: Path,
    photos: Path,
    flags: list[str],
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
):
    data = tmp_path / "photos"
    shutil.copytree(photos, data)
    odd = data / "red" / os.fsdecode(b"caf\xe9.jpg")
    try:
        (data / "red" / "00.jpg").rename(odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    monkeypatch.setattr("sys.stdin", listed(str(odd)))
    code, out, err = command("predict", finished, "-", "--json")
    assert code == 0, err
    assert [row["path"] for row in json.loads(out)] == [str(odd)]
    for words in ((), ("--csv",)):
        code, out, err = command("predict", finished, odd, *words)
        assert code == 0, err
        assert "caf\\udce9" in "".join(out.split())
    run = tmp_path / "run"
    code, _, err = command("train", data, *flags, "--steps", 1, "--out", run)
    assert code == 0, err
    assert command("evaluate", run, data)[0] == 0


def test_found_images(tmp_path: Path, photos: Path):
    once = photos / "red" / "00.jpg"
    assert find_images([once, str(once), photos / "red"], {})[0] == str(once)
    assert len(find_images([once, photos / "red"], {})) == 13
    (tmp_path / "none").mkdir()
    for pattern in (tmp_path / "none", "no/such/*.png", tmp_path / "x.png"):
        with pytest.raises(PatchwordError, match="no images at"):
            find_images([pattern], {})
    missing: dict[str, str] = {}
    assert find_images([once, "no/such.png"], missing) == [str(once)]
    assert missing == {"no/such.png": "no such file"}


def test_folders_and_patterns_that_match_them_give_no_hidden_files(
    tmp_path: Path, make_photos: MakePhotos
):
    root = make_photos(tmp_path / "new", 2)
    for name in (".hidden.jpg", "._00.jpg", "__MACOSX/00.jpg", "notes.txt"):
        (root / "red" / name).parent.mkdir(exist_ok=True)
        (root / "red" / name).write_bytes(b"")
    wanted = [str(path) for path in sorted(root.glob("*/0?.*"))]
    assert len(wanted) == 6
    for pattern in (root, f"{root}/", f"{root}/*"):
        assert find_images([pattern], {}) == wanted


def test_names_that_cannot_be_looked_up_do_not_end_the_list(photos: Path):
    once = str(photos / "red" / "00.jpg")
    for name in ("x" * 5000, "a\0b.png"):
        missing: dict[str, str] = {}
        assert find_images([name, once], missing) == [once]
        assert missing == {name: "no such file"}


def test_sigmoid_models_give_their_own_probabilities(tmp_path: Path, photos: Path):
    model = create_model("ViT-mu/8", 3, 16, probability="sigmoid", classes=("a", "b", "c"))
    with torch.no_grad():
        assert model.head is not None
        model.head.bias.copy_(torch.tensor([0.0, 2.0, 1.0]))
    found = patchword.predict(model, photos / "red" / "00.jpg", workers=0)[0]
    wanted = torch.tensor([2.0, 1.0, 0.0]).sigmoid().tolist()
    assert [label for label, _ in found.top] == ["b", "c", "a"]
    assert [p for _, p in found.top] == pytest.approx(wanted)
