"""`patchword explain`: pictures, numbers, and what can go wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from patchword.commands.explaining import explain_images
from patchword.models.zoo import create_model
from patchword.spec.parse import PatchwordError, UsageError
from patchword.weights.save import save_model

Command = Callable[..., tuple[int, str, str]]


def test_an_image_is_explained_with_a_picture(
    finished: Path, photos: Path, elsewhere: Path, as_json: Callable[..., Any]
) -> None:
    found = as_json("explain", finished, photos / "red" / "00.jpg")
    assert found["taken_away_by"] == "leaving out tokens"
    (row,) = found["images"]
    assert row["path"] == str(photos / "red" / "00.jpg")
    assert row["class"] == row["predicted"] == "red"
    assert 0 < row["probability"] == pytest.approx(row["predicted_probability"], rel=1e-5)
    assert set(row["maps"]) == {"rollout", "occlusion"}
    assert all(np.shape(values) == (2, 2) for values in row["maps"].values())
    assert -1 <= row["agreement"] <= 1
    assert set(row["curves"]) == {"rollout", "occlusion", "random"}
    for curves in row["curves"].values():
        assert curves["shares"] == [0, 0.25, 0.5, 0.75, 1]
        assert curves["deletion"][0] == pytest.approx(row["probability"], rel=1e-4)
        area = np.trapezoid(curves["deletion"], curves["shares"])
        assert curves["deletion_score"] == pytest.approx(area, abs=1e-5)
    assert found["mean"]["agreement"] == row["agreement"]
    assert found["mean"]["deletion"]["occlusion"] == row["curves"]["occlusion"]["deletion_score"]
    assert row["picture"] == "explain-00.png"
    with Image.open(elsewhere / "explain-00.png") as picture:
        assert picture.width > 800


def test_several_images_of_a_class_that_is_named(
    finished: Path, photos: Path, tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "new" / "folder"
    names = [photos / "red" / "broken.jpg", photos / "red" / "00.jpg", photos / "blue" / "00.jpg"]
    code, said, err = command("explain", finished, *names, "--class", "blue", "--out", out)
    assert code == 0, err
    assert sorted(path.name for path in out.iterdir()) == ["00-2.png", "00.png"]
    assert "mean of 2 images" in said
    assert "blue" in said
    assert "random" in said
    assert "1 file could not be read" in err
    code, _, err = command("explain", finished, *names, "--out", out)
    assert code == 1
    assert "exists; give another --out, or pass --overwrite" in " ".join(err.split())
    assert command("explain", finished, *names, "--out", out, "--overwrite")[0] == 0


def test_a_pdf(finished: Path, photos: Path, tmp_path: Path, command: Command) -> None:
    code, _, err = command("explain", finished, photos / "red/00.jpg", "--out", tmp_path / "a.pdf")
    assert code == 0
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    assert "subset" not in err  # what fontTools notes of each font


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--class", "bleu"], 2, "no class 'bleu'; did you mean blue"),
        (["--window", 0], 2, "--window is 0; use 1 or more"),
        (["--batch-size", 0], 2, "--batch-size is 0"),
        (["--out", "{photos}/blue/01.png"], 1, "exists"),
        (["--out", "{photos}/blue/00.jpg"], 1, "is a file; give a .png, a .pdf or a folder"),
    ],
)
def test_what_makes_no_sense_is_refused(
    words: list[Any], code: int, message: str, finished: Path, photos: Path, command: Command
) -> None:
    words = [str(word).format(photos=photos) for word in words]
    before = (photos / "blue" / "01.png").read_bytes()
    found, said, err = command("explain", finished, photos / "red" / "00.jpg", *words)
    assert (found, said) == (code, "")
    assert message in " ".join(err.split())
    assert (photos / "blue" / "01.png").read_bytes() == before


def test_several_images_do_not_go_into_one_picture(
    finished: Path, photos: Path, tmp_path: Path, command: Command
) -> None:
    code, _, err = command("explain", finished, photos / "red", "--out", tmp_path / "a.png")
    assert code == 2
    assert "13 images do not go into" in err
    code, _, err = command("explain", finished)
    assert code == 2
    assert "no images given" in err


def test_no_readable_image_is_an_error(finished: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(PatchwordError, match="none of 1 images can be read"):
        explain_images(finished, photos / "red" / "broken.jpg", out=tmp_path / "out")


@pytest.mark.parametrize("name", ["Mixer-S/8", "BiT-R50x1"])
def test_models_without_attention_say_that_rollout_does_not_apply(
    name: str,
    photos: Path,
    tmp_path: Path,
    command: Command,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mixer = name.startswith("Mixer")
    small: dict[str, Any] = {"depth": 1, "width": 16} if mixer else {"layers": (1, 1, 1, 1)}
    model = create_model(name, 2, 16, classes=("cat", "dog"), **small)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    save_model(model, tmp_path / "m.safetensors")
    with caplog.at_level("INFO"):
        code, said, err = command(
            *("explain", tmp_path / "m.safetensors", photos / "red" / "00.jpg"),
            *("--json", "--out", tmp_path / "out"),
        )
    assert code == 0, err
    assert "rollout does not apply" in caplog.text
    found = json.loads(said)
    assert found["taken_away_by"] == "painting in the mean colour"
    assert list(found["images"][0]["maps"]) == ["occlusion"]
    assert found["mean"]["agreement"] is None
    side = 2 if mixer else 14
    assert np.shape(found["images"][0]["maps"]["occlusion"]) == (side, side)


def test_a_model_in_memory_and_a_window(photos: Path, tmp_path: Path) -> None:
    model = create_model("ViT-mu/4", 3, 16, classes=("blue", "green", "red"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    image = photos / "red" / "00.jpg"
    (fine,) = explain_images(model, image, out=tmp_path / "a.png").images
    (wide,) = explain_images(model, image, out=tmp_path / "b.png", window=2).images
    assert fine.predicted == wide.predicted
    assert not np.allclose(fine.explanation.maps["occlusion"], wide.explanation.maps["occlusion"])
    (whole,) = explain_images(model, image, out=tmp_path / "c.png", window=9).images
    assert np.ptp(whole.explanation.maps["occlusion"]) == 0  # all patches at once
    assert whole.explanation.agreement is None
    with pytest.raises(UsageError, match="window is 0; use 1 or more"):
        explain_images(model, image, out=tmp_path / "d.png", window=0)
    with pytest.raises(UsageError, match="batch_size is 0; use 1 or more"):
        explain_images(model, image, out=tmp_path / "d.png", batch_size=0)


def test_a_class_of_imagenet_is_named_by_its_id_or_in_english(
    photos: Path, tmp_path: Path, command: Command, as_json: Callable[..., Any]
) -> None:
    path = save_model(create_model("ViT-mu/8", 1000, 16), tmp_path / "m.safetensors")
    words = ("explain", path, photos / "red" / "00.jpg", "--classes", "imagenet", "--overwrite")
    out = ("--out", tmp_path / "p.png", "--class")
    for name in ("n01443537", "goldfish", "Goldfish"):
        (row,) = as_json(*words, *out, name)["images"]
        assert row["class"] == "goldfish"
    code, _, err = command(*words, *out, "crane")
    assert code == 1
    assert "n02012849 and n03126707" in " ".join(err.split())
    assert command(*words, *out, "goldfishes")[0] == 2
