"""`patchword calibrate` and `predict --abstain`, on a finished run and on weights alone."""

from __future__ import annotations

import csv
import io
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchword
from patchword import Model, PatchwordError, UsageError, load_model, save_model
from patchword.commands.calibrating import calibrate_model
from patchword.training.checkpoint import damage
from patchword.weights.load import describe_weights

Command = Callable[..., tuple[int, str, str]]
AsJson = Callable[..., Any]
MakePhotos = Callable[..., Path]
FIGURES = ("loss", "ece", "brier")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run to change."""
    return Path(shutil.copytree(finished, tmp_path / "first", symlinks=True))


@pytest.fixture
def doubtful(finished: Path) -> Model:
    """The run's model with logits so small, and labels so mixed, that it is never sure."""
    model = load_model(finished)
    assert model.head is not None
    with torch.no_grad():
        model.head.weight.mul_(0.3)
        model.head.bias.copy_(0.3 * torch.randn(3))
    return model


@pytest.fixture
def divided(make_photos: MakePhotos, tmp_path: Path) -> Path:
    """Data that divide themselves into val and test."""
    names = [f"{part}/{name}" for part in ("val", "test") for name in ("red", "green", "blue")]
    return make_photos(tmp_path / "divided", 6, names, 300)


def test_the_fields_of_the_json(finished: Path, photos: Path, as_json: AsJson):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    found = as_json("calibrate", finished, photos, "--workers", 0)
    assert found.keys() == {"temperature", "parts", "abstain", "stored"}
    assert found["stored"] is None
    assert [(p["part"], p["role"], p["n"]) for p in found["parts"]] == [
        ("val", "fitted", 4),
        ("test", "test", 4),
    ]
    for part in found["parts"]:
        assert part.keys() == {"part", "role", "n", "top1", "before", "after"}
        assert part["before"].keys() == part["after"].keys() == set(FIGURES)
    assert found["parts"][0]["after"]["loss"] <= found["parts"][0]["before"]["loss"]
    assert found["abstain"]["curve"][0]["coverage"] == 1
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_before_and_after_are_what_evaluate_says(doubtful: Model, divided: Path):
    wanted = [
        patchword.evaluate(doubtful, divided, split=part, workers=0).classification
        for part in ("val", "test")
    ]
    done = calibrate_model(doubtful, divided, workers=0)
    assert doubtful.calibration == done.calibration
    assert done.calibration.temperature < 1  # too small logits have to grow
    for part, plain in zip(done.parts, wanted, strict=True):
        now = patchword.evaluate(doubtful, divided, split=part.part, workers=0).classification
        assert part.before.to_dict() == plain.to_dict()
        assert part.after.to_dict() == now.to_dict()
        assert now.top1 == plain.top1
    assert done.parts[0].after.loss < done.parts[0].before.loss
    again = calibrate_model(doubtful, divided, workers=0)  # starts from 1, whatever is stored
    assert again.calibration == done.calibration
    assert again.parts[0].before.loss == done.parts[0].before.loss


def test_the_curve_is_that_of_the_images(doubtful: Model, divided: Path):
    done = calibrate_model(doubtful, divided, workers=0)
    result = patchword.evaluate(doubtful, divided, split="val", workers=0).classification
    found = done.calibration
    assert found.measured_on == "18 images (val)"
    for threshold in (0.01, 0.4, 0.6, 0.9):
        sure = result.confidence >= threshold
        coverage, accuracy = found.expected(threshold)
        assert coverage == pytest.approx(sure.mean())
        if sure.any():
            right = (result.labels == result.predicted)[sure].mean()
            assert accuracy == pytest.approx(right)
        else:
            assert accuracy is None


def test_the_best_weights_of_a_run_are_replaced(run: Path, photos: Path, command: Command):
    plain, file = load_model(run), run / "best" / "model.safetensors"
    extra = describe_weights(run).extra
    code, out, err = command("calibrate", run, photos, "--overwrite", "--workers", 0)
    assert code == 0, err
    assert str(file) in "".join(out.split())
    model = load_model(run)
    assert model.calibration is not None
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)
    )
    assert describe_weights(run).extra == extra
    assert damage(file.parent.resolve()) is None
    assert not list(file.parent.glob(".*"))
    last = load_model(run / "last")
    assert last.calibration is None


def test_a_finished_run_stays_finished(run: Path, photos: Path, flags: list[str], command: Command):
    assert command("calibrate", run, photos, "--overwrite", "--workers", 0)[0] == 0
    words = ("train", photos, *flags, "--out", run, "--average", "0.9")
    code, _, err = command(*words)
    assert code == 0
    assert "is finished" in " ".join(err.split())
    assert load_model(run).calibration is not None


def test_evaluate_and_predict_use_it(
    doubtful: Model,
    divided: Path,
    tmp_path: Path,
    as_json: AsJson,
    caplog: pytest.LogCaptureFixture,
):
    path = save_model(doubtful, tmp_path / "m.safetensors")
    plain = as_json("predict", path, divided / "val", "--workers", 0)
    found = as_json("calibrate", path, divided, "--overwrite", "--workers", 0)
    assert found["stored"] == str(path)
    assert 0.05 < found["temperature"] < 0.9
    caplog.set_level(logging.INFO)
    after = as_json("evaluate", path, divided, "--workers", 0)
    assert {k: after[k] for k in FIGURES} == pytest.approx(found["parts"][1]["after"])
    assert f"at temperature {found['temperature']:.4g}, measured on 18 images (val)" in caplog.text
    now = as_json("predict", path, divided / "val", "--workers", 0)
    assert [row["label"] for row in now] == [row["label"] for row in plain]
    for old, new in zip(plain, now, strict=True):
        shares = np.array([entry["probability"] for entry in old["top"]])
        wanted = shares ** (1 / found["temperature"])
        got = [entry["probability"] for entry in new["top"]]
        assert got == pytest.approx(list(wanted / wanted.sum()), rel=1e-6)


def test_half_and_half(doubtful: Model, make_photos: MakePhotos, tmp_path: Path, as_json: AsJson):
    """A lone set of images: one half fits, the other reports and gives the curve."""
    data = make_photos(tmp_path / "lone", 10, first=400)
    path = save_model(doubtful, tmp_path / "m.safetensors")
    found = as_json("calibrate", path, data, "--split", "half/half", "--workers", 0)
    assert [(p["part"], p["role"], p["n"]) for p in found["parts"]] == [
        ("all, 50 %", "fitted", 15),
        ("all, the rest", "held out", 15),
    ]
    assert found["abstain"]["measured_on"] == "15 images (all, the rest)"
    same = as_json("calibrate", path, data, "--split", "50/50", "--workers", 0)
    other = as_json("calibrate", path, data, "--split", "half/half", "--seed", 1, "--workers", 0)
    assert same == found
    assert other["temperature"] != found["temperature"]
    third = calibrate_model(path, data, split="20/80", workers=0)
    assert [part.before.n for part in third.parts] == [6, 24]
    for part in third.parts:  # stratified
        assert {row["n"] for row in part.before.per_class.values()} == {part.before.n // 3}
    fitted, rest = (set(part.before.indices.tolist()) for part in third.parts)
    assert fitted | rest == set(range(30))
    assert not fitted & rest


def test_half_and_half_of_a_run_leaves_test_to_report(finished: Path, photos: Path):
    done = calibrate_model(finished, photos, split="half/half", workers=0)
    fitted, rest, test = done.parts
    assert [part.role for part in done.parts] == ["fitted", "held out", "test"]
    assert fitted.before.n + rest.before.n == test.before.n == 4


@pytest.mark.parametrize("split", ["test", "all"])
def test_test_images_are_never_fitted_on(
    finished: Path, divided: Path, photos: Path, split: str, command: Command
):
    for data in (divided, photos):
        code, out, err = command("calibrate", finished, data, "--split", split)
        assert code == 2
        assert out == ""
        assert "not fitted on test images" in err


def test_what_cannot_be_fitted_on(
    finished: Path, make_photos: MakePhotos, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    plain = make_photos(tmp_path / "plain", 2)
    path = save_model(load_model(finished), tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="no 'val' part to fit on; --split half/half"):
        calibrate_model(path, plain, workers=0)
    for split in ("0/5", "3/0"):
        with pytest.raises(UsageError, match="leaves one side empty"):
            calibrate_model(path, plain, split=split, workers=0)
    names = [f"{part}/{name}" for part in ("train", "val") for name in ("red", "green", "blue")]
    data = make_photos(tmp_path / "parts", 2, names)
    for split in ("train", "all"):
        caplog.clear()
        calibrate_model(path, data, split=split, workers=0)
        assert "surer of the images it was trained on" in caplog.text


def test_doubtful_temperatures_are_said(
    finished: Path, make_photos: MakePhotos, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """With every image right the temperature stays 1, with every one wrong it is at its bound."""
    data = make_photos(tmp_path / "lone", 6, first=400)
    model = load_model(finished)
    assert model.head is not None

    def fitted() -> float:
        caplog.clear()
        done = calibrate_model(model, data, split="half/half", workers=0)
        right.append(done.parts[0].before.top1)
        return done.calibration.temperature

    right: list[float] = []
    with torch.no_grad():
        model.head.bias.add_(torch.tensor([2.0, 0.0, -2.0]))
    assert 0.05 < fitted() < 20
    assert "9 images are few to fit a temperature on" in caplog.text
    with torch.no_grad():
        model.head.bias.sub_(torch.tensor([2.0, 0.0, -2.0]))
    assert fitted() == 1
    assert "all 9 images are right, which does not tell how unsure to be" in caplog.text
    model.classes = (*model.classes[1:], model.classes[0])
    assert fitted() == 20
    assert "no better than chance" in caplog.text
    assert right[0] < right[1] == 1
    assert right[2] == 0


def test_a_file_of_its_own(finished: Path, divided: Path, tmp_path: Path, command: Command):
    out = tmp_path / "new" / "calibrated.safetensors"
    words = ("calibrate", finished, divided, "--workers", 0, "--out", out)
    assert command(*words)[0] == 0
    model = load_model(out)
    assert model.calibration is not None
    assert load_model(finished).calibration is None
    code, _, err = command(*words)
    assert code == 1
    assert "pass --overwrite" in err
    assert command(*words, "--overwrite")[0] == 0
    # and in place
    code, _, err = command("calibrate", out, divided, "--split", "half/half", "--overwrite")
    assert code == 0, err
    again = load_model(out)
    assert again.calibration is not None
    assert again.calibration.measured_on == "9 images (val, the rest)"


def test_what_is_not_replaced(run: Path, divided: Path, tmp_path: Path):
    def refused(model: Path, match: str, **options: Any) -> None:
        with pytest.raises(PatchwordError, match=match):
            calibrate_model(model, divided, workers=0, **options)

    refused(run / "last", "only the best weights can be replaced", overwrite=True)
    refused(run, "store it with --out", overwrite=True, image_size=32)
    inside = run / "best" / "other.safetensors"
    refused(run, "one of the checkpoints", out=inside)
    foreign = save_model(load_model(run), tmp_path / "hf", format="huggingface")
    refused(foreign, "patchword's own format", overwrite=True)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"finished": False}))
    refused(run, "is not finished", overwrite=True)
    assert load_model(run).calibration is None


# Abstaining --------------------------------------------------------------------------------------


@pytest.fixture
def unsure(doubtful: Model, divided: Path, tmp_path: Path) -> tuple[Path, float]:
    """A calibrated model, and a threshold that some images of `divided` do not reach."""
    done = calibrate_model(doubtful, divided, workers=0)
    confidence = np.sort(done.parts[0].after.confidence)
    threshold = round(float(confidence[6] + confidence[7]) / 2, 6)
    return save_model(doubtful, tmp_path / "unsure.safetensors"), threshold


def test_unsure_images_get_no_label(
    unsure: tuple[Path, float], divided: Path, as_json: AsJson, caplog: pytest.LogCaptureFixture
):
    path, threshold = unsure
    plain = as_json("predict", path, divided / "val", "--workers", 0)
    caplog.set_level(logging.INFO)
    found = as_json("predict", path, divided / "val", "--abstain", threshold, "--workers", 0)
    assert sum(row["abstained"] for row in found) == 7
    for row, old in zip(found, plain, strict=True):
        assert row["abstained"] == (row["probability"] < threshold)
        assert row["label"] == (None if row["abstained"] else old["label"])
        assert row["top"] == old["top"]
    assert f"to expect at {threshold:g}, by 18 images (val): " in caplog.text


def test_what_to_expect_is_what_was_measured(
    unsure: tuple[Path, float], divided: Path, caplog: pytest.LogCaptureFixture
):
    path, _ = unsure
    result = patchword.evaluate(path, divided, split="val", workers=0).classification
    threshold = round(float(np.median(result.confidence)), 2)
    sure = result.confidence >= threshold
    right = (result.labels == result.predicted)[sure].mean()
    caplog.set_level(logging.INFO)
    patchword.predict(path, divided / "val", abstain=threshold, workers=0)
    wanted = f"{100 * sure.mean():.1f} % of images get a label, {100 * right:.1f} % of them right"
    assert wanted in caplog.text


def test_abstaining_in_csv_and_in_the_table(
    unsure: tuple[Path, float], divided: Path, command: Command
):
    path, threshold = unsure
    words = ("predict", path, divided / "val", "--abstain", threshold, "--workers", 0)
    code, out, err = command(*words, "--csv", "--top", 1)
    assert code == 0, err
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == ["path", "label", "abstained", "label1", "probability1"]
    for row in rows:
        doubt = float(row["probability1"]) < threshold
        assert row["abstained"] == str(doubt).lower()
        assert row["label"] == ("" if doubt else row["label1"])
    assert "7 of 18 images are uncertain" in err
    code, out, _ = command(*words)
    assert code == 0
    assert out.count("uncertain") == 7


def test_without_calibration_nothing_is_promised(
    finished: Path, photos: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    patchword.predict(finished, photos / "red" / "00.jpg", abstain=0.9, workers=0)
    assert "not known" in caplog.text
    assert "`patchword calibrate MODEL DATA` measures it" in caplog.text


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, "nan"])
def test_thresholds_out_of_range(finished: Path, photos: Path, threshold: object, command: Command):
    code, _, err = command("predict", finished, photos / "red", "--abstain", threshold)
    assert code == 2
    assert "above 0, at most 1" in err
