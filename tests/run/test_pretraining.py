"""Runs without labels from end to end: what they read, what they leave, what comes after."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from patchword import load_model
from patchword.cli import main as cli
from patchword.training.log import read_lines
from patchword.weights.native import load_tensors

Command = Callable[..., tuple[int, str, str]]
AsJson = Callable[..., Any]
MakePhotos = Callable[..., Path]
FLAGS = """--model ViT-mu/8 --image-size 16 --batch-size 8 --steps 12 --lr 3e-3 --workers 0
--width 32 --device cpu --log-every 4 --decoder-width 16 --decoder-heads 2 --average 0.9"""
SMALL = FLAGS.split()
FEW = "--batch-size 8 --steps 2 --workers 0 --device cpu --image-size 16"
OBJECTIVES = ("masked-patch", "mae")
both = pytest.mark.parametrize("objective", OBJECTIVES)


@pytest.fixture(scope="session")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 30 pictures, no folders in it; one of them is broken."""
    root = tmp_path_factory.mktemp("flat") / "pictures"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(30):
        pixels = rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"{i:02}.png")
    (root / "07.png").write_bytes(b"\x89PNG this is no picture")
    return root


@pytest.fixture(scope="session")
def learned(
    make_photos: MakePhotos, tmp_path_factory: pytest.TempPathFactory, reported: None
) -> Callable[[str], tuple[Path, Path]]:
    """`learned(objective)`: a finished run on labelled data, and the data, whose test images cannot
    be read."""
    done: dict[str, tuple[Path, Path]] = {}
    names = [f"{part}/{name}" for part in ("train", "val", "test") for name in ("red", "green")]

    def run(objective: str) -> tuple[Path, Path]:
        if objective not in done:
            root = tmp_path_factory.mktemp(objective)
            data = make_photos(root / "data", 10, names)
            for file in (data / "test").rglob("*.*"):
                file.write_bytes(b"no picture")
            words = ["train", str(data), *SMALL, "--objective", objective]
            words += ["--out", str(root / "run"), "--on-bad-image", "fail"]
            assert cli.main(words) == 0
            done[objective] = root / "run", data
        return done[objective]

    return run


@both
@pytest.mark.usefixtures("reported")
def test_a_flat_folder_is_learned(objective: str, flat: Path, tmp_path: Path, command: Command):
    run = tmp_path / "run"
    words = ["train", flat, *SMALL, "--objective", objective, "--out", run]
    code, out, err = command(*words)
    assert code == 0, err
    assert "data pictures: no labels, 27 train, 3 val images" in err
    assert "no labels are used" in err
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"]
    assert summary["objective"] == objective
    assert (summary["split"], summary["bad_images"]) == ("val", 1)
    assert not {"knn", "linear", "top1", "best_val_top1"} & summary.keys()
    lines = read_lines(run / "evaluations.jsonl")
    assert {line["split"] for line in lines} == {"val"}
    best = min(reversed(lines), key=lambda line: line["loss"])
    chosen = (summary["best_step"], summary["best_weights"], summary["loss"])
    assert chosen == (best["step"], best["weights"], best["loss"])
    assert f"next    patchword train LABELLED_DATA --init {run}" in out
    assert f"loss {summary['loss']:.4f} on {summary['n']} val images" in out
    code, _, err = command(*words)
    assert code == 0
    assert "is finished" in err
    report, card = (run / "report.html").read_text(), (run / "MODEL_CARD.md").read_text()
    for nonsense in ("Confusion", "Calibration", "accuracy on", "Classes", "patchword predict"):
        assert nonsense not in report + card


def test_the_learning_rate_can_be_tried(flat: Path, tmp_path: Path, command: Command):
    words = ["train", flat, *SMALL, "--objective", "mae", "--out", tmp_path / "run"]
    code, _, err = command(*words, "--rates", "1e-3", "1e-30")
    assert code == 0, err
    assert "learning rate 0.001: val loss" in err


def test_time_becomes_steps(flat: Path, tmp_path: Path, command: Command):
    words = [word for word in SMALL if word not in ("--steps", "12")]
    words += ["--objective", "masked-patch", "--time", "8s", "--out", str(tmp_path / "run")]
    code, _, err = command("train", flat, *words)
    assert code == 0, err
    assert "steps of" in err


@both
def test_labels_measure_progress_alone(objective: str, learned: Callable[[str], tuple[Path, Path]]):
    """And the test part is not read: no image there can be."""
    run, _ = learned(objective)
    lines = read_lines(run / "evaluations.jsonl")
    assert {line["split"] for line in lines} == {"val"}
    assert all(0 <= line[name] <= 1 for line in lines for name in ("knn", "linear"))
    summary = json.loads((run / "summary.json").read_text())
    best = max(reversed(lines), key=lambda line: line["linear"])
    assert (summary["best_step"], summary["best_weights"]) == (best["step"], best["weights"])
    assert {n: summary[n] for n in ("knn", "linear", "loss")} == {
        n: best[n] for n in ("knn", "linear", "loss")
    }
    assert summary["n"] == 20


@both
def test_the_report_shows_predictions(objective: str, learned: Callable[[str], tuple[Path, Path]]):
    run, data = learned(objective)
    report = (run / "report.html").read_text()
    for shown in ("Frozen features", "Predictions", "what it predicts", "nearest neighbours"):
        assert shown in report
    assert f"patchword train {data} --init {run}" in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    card = (run / "MODEL_CARD.md").read_text()
    assert "image-feature-extraction" in card
    assert "It names no classes" in card
    assert "image-classification" not in card


@both
def test_what_is_left_is_a_plain_model(
    objective: str,
    learned: Callable[[str], tuple[Path, Path]],
    as_json: AsJson,
    command: Command,
    tmp_path: Path,
):
    """To load, convert, probe; the objective's own parts lie beside it."""
    run, data = learned(objective)
    for folder in ("best", "last"):
        model = load_model(run / folder)
        assert model.spec.num_classes == 0
        assert model.classes == ()
        tensors, _ = load_tensors(run / folder / "objective.safetensors")
        assert "mask_token" in tensors
        assert "mask_token" not in model.state_dict()
    model = load_model(run)
    with torch.no_grad():
        assert model(torch.randn(2, 3, 16, 16)).shape == (2, 32)
    done = as_json("evaluate", run, data, "--probe", "knn", "--split", "val", "--device", "cpu")
    assert 0 <= done["knn"]["10"] <= 1
    code, _, err = command("convert", run, tmp_path / "out.safetensors", "--format", "timm")
    assert code == 0, err


@both
def test_fine_tuning_starts_from_it_with_a_new_head(
    objective: str,
    learned: Callable[[str], tuple[Path, Path]],
    photos: Path,
    tmp_path: Path,
    command: Command,
):
    """Before the first step the weights are the pre-trained ones, the head is zero."""
    run, _ = learned(objective)
    tuned = tmp_path / "tuned"
    words = ["--no-probe", "--steps", "2", "--lr", "1e-30", "--workers", "0", "--device", "cpu"]
    code, _, err = command("train", photos, "--init", run, *words, "--out", tuned)
    assert code == 0, err
    before, after = load_model(run).state_dict(), load_model(tuned).state_dict()
    assert set(after) - set(before) == {"head.weight", "head.bias"}
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-8)
    assert after["head.weight"].abs().max() < 1e-6
    assert load_model(tuned).classes == ("blue", "green", "red")


@both
def test_pretraining_goes_on_from_weights(
    objective: str,
    learned: Callable[[str], tuple[Path, Path]],
    finished: Path,
    flat: Path,
    tmp_path: Path,
    command: Command,
):
    """From those of another objective, and from a classifier's, whose head goes."""
    other = learned(OBJECTIVES[objective == "masked-patch"])[0]
    for number, init in enumerate((other, finished)):
        out = tmp_path / str(number)
        words = [*FEW.split(), "--init", str(init), "--objective", objective, "--out", str(out)]
        code, _, err = command("train", flat, *words)
        assert code == 0, err
        assert load_model(out).spec.num_classes == 0


@both
def test_parts_without_labels(objective: str, flat: Path, tmp_path: Path, command: Command):
    """train/ and val/ of pictures are parts, not classes."""
    for part, count in (("train", 8), ("val", 4)):
        (tmp_path / "data" / part).mkdir(parents=True)
        for i in range(count):
            name = f"{i + 10:02}.png"
            (tmp_path / "data" / part / name).write_bytes((flat / name).read_bytes())
    words = ["train", tmp_path / "data", *SMALL, "--objective", objective]
    code, _, err = command(*words, "--out", tmp_path / "run")
    assert code == 0, err
    assert "no labels, 8 train, 4 val images" in err


def test_runs_of_an_objective_have_a_folder_of_their_own(
    flat: Path, elsewhere: Path, command: Command
):
    code, out, err = command("train", flat, *SMALL, "--objective", "masked-patch")
    assert code == 0, err
    assert "runs/pictures-ViT-mu-8-masked-patch" in out


@pytest.mark.usefixtures("reported")
def test_nothing_held_out(flat: Path, tmp_path: Path, command: Command):
    """There is nothing to choose on: the last weights stay."""
    words = ["train", flat, *SMALL, "--objective", "mae", "--out", tmp_path / "run"]
    code, out, err = command(*words, "--val-fraction", 0, "--test-fraction", 0)
    assert code == 0, err
    assert "no image was held out" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["best_step"], summary["split"]) == (12, None)
    assert "Predictions" in (tmp_path / "run" / "report.html").read_text()
    assert load_model(tmp_path / "run").spec.num_classes == 0


def test_the_config_reads_back(
    learned: Callable[[str], tuple[Path, Path]], tmp_path: Path, command: Command
):
    run, _ = learned("mae")
    stored = json.loads((run / "config.json").read_text())
    assert stored["settled"]["mask_rate"] == 0.75
    assert stored["request"]["pretrain"]["mask_rate"] is None
    for more in ([], ["--settled"]):
        again = tmp_path / f"again{len(more)}"
        code, _, err = command("train", "--config", run / "config.json", *more, "--out", again)
        assert code == 0, err
        for name in ("last", "best"):
            one, two = (load_model(path / name).state_dict() for path in (run, again))
            assert all(torch.equal(one[key], two[key]) for key in one)


def test_json_is_the_summary(flat: Path, tmp_path: Path, as_json: AsJson):
    done = as_json("train", flat, *SMALL, "--objective", "mae", "--out", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert done == {"run": str(tmp_path / "run")} | summary
    assert done["next"][0].startswith("patchword train ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep"], "--sweep and --runs compare accuracies"),
        (["--runs", "2"], "--sweep and --runs compare accuracies"),
        (["--mixup", "0.2"], "--mixup goes with --objective classification"),
        (["--position", "rotary", "--objective", "mae"], "added at the stem"),
        (["--model", "Mixer-S/16", "--image-size", "32", "--recipe", "cifar10"], "is for a ViT"),
        (["--mask-rate", "1.5"], "mask_rate is 1.5"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(
    words: list[str], message: str, flat: Path, tmp_path: Path, command: Command
):
    small = SMALL[2:] if "--model" in words else SMALL
    given = ["train", flat, *small, "--objective", "masked-patch", *words, "--out", tmp_path / "r"]
    code, _, err = command(*given)
    assert code == 2, err
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_labels_are_needed_to_classify(flat: Path, tmp_path: Path, command: Command):
    code, _, err = command("train", flat, *FEW.split(), "--out", tmp_path / "run")
    assert code == 1
    assert "no images in class folders" in err
