"""Runs of every family, and runs that start from well-known weights."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import patchword
from patchword import Model, UsageError, create_model, load_model, save_model
from patchword.training.loop import Loop
from patchword.training.recipes import recipe_spec
from patchword.weights.pretrained import PRETRAINED

Command = Callable[..., tuple[int, str, str]]
FAMILIES: dict[str, dict[str, Any]] = {
    "R+ViT-Ti/16": {"image_size": 32, "depth": 2, "width": 32, "mlp_width": 64, "heads": 2},
    "BiT-R50x1": {"layers": [1, 1, 1, 1]},
    "Mixer-S/4": {"depth": 2, "width": 32, "tokens_mlp_width": 16, "channels_mlp_width": 64},
}
SHORT: dict[str, Any] = {
    "steps": 6,
    "eval_every": 3,
    "average": 0.0,
    "batch_size": 32,
    "device": "cpu",
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("reported")
def test_a_run_on_digits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Train, stop, resume, evaluate, predict, report; what was stopped ends as what was not."""
    settings: dict[str, Any] = SHORT | FAMILIES[name] | {"model": name}
    whole = patchword.train("digits", out=tmp_path / "whole", **settings)
    save = Loop.save

    def save_and_stop(run: Loop) -> int:
        save(run)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            patchword.train("digits", out=tmp_path / "stopped", **settings)
    assert (tmp_path / "stopped" / "checkpoints" / "step-00000003").is_dir()
    resumed = patchword.train("digits", out=tmp_path / "stopped", **settings)
    first, second = (
        load_model(run / "last").state_dict() for run in (whole.folder, resumed.folder)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)

    assert whole.result is not None
    assert patchword.evaluate(whole.folder, "digits").classification.top1 == whole.result.top1
    Image.new("L", (8, 8), 128).save(tmp_path / "grey.png")
    (prediction,) = patchword.predict(whole.folder, tmp_path / "grey.png")
    assert prediction.label in [str(digit) for digit in range(10)]
    architecture = whole.summary["architecture"]
    assert architecture.startswith(name.partition("-")[0])
    for file in ("report.html", "MODEL_CARD.md"):
        assert architecture in (whole.folder / file).read_text(encoding="utf-8")
    shown = 'class="paper"' in (whole.folder / "report.html").read_text(encoding="utf-8")
    assert shown == (not name.startswith("BiT"))  # which has no patches and no positions


def options(run: Path) -> dict[str, Any]:
    found = json.loads((run / "config.json").read_text())["settled"]["options"]
    return {name: value for name, value in found.items() if value is not None}


def test_a_recipe_gives_a_family_the_options_that_it_has(photos: Path, tmp_path: Path):
    """`photos` gives pool, position and drop_path, which are ViT's; Mixer has the last."""
    assert set(recipe_spec("photos", "").options.given()) == {"pool", "position", "drop_path"}
    settings: dict[str, Any] = SHORT | {"image_size": 16, "steps": 1, "epochs": None, "workers": 0}
    for name, kept in (
        ("ViT-mu/8", {"pool": "gap", "position": "sincos2d", "drop_path": 0.05}),
        ("Mixer-S/8", {"drop_path": 0.05}),
        ("BiT-R50x1", {}),
    ):
        family = {n: v for n, v in FAMILIES.get(name, {}).items() if n != "image_size"}
        out = tmp_path / name.replace("/", "-")
        run = patchword.train(photos, "photos", model=name, out=out, **settings | family).folder
        assert options(run) == kept | family


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("BiT-R50x1", {"pool": "map"}, "BiT-R50x1 has no option 'pool'; valid: layers"),
        ("BiT-R50x1", {"width": 32}, "has no option 'width'; did you mean width_factor"),
        ("Mixer-S/4", {"mlp_width": 32}, "no option 'mlp_width'; did you mean tokens_mlp_width"),
        ("ViT-mu/4", {"layers": [1, 1, 1, 1]}, "has no option 'layers'; did you mean layer_scale"),
        ("R+ViT-Ti/16", {"width_factor": 2}, "has no option 'width_factor'; did you mean width"),
    ],
)
def test_an_option_that_the_family_lacks(
    name: str, given: dict[str, Any], message: str, tmp_path: Path
):
    with pytest.raises(UsageError) as raised:
        patchword.train("digits", model=name, out=tmp_path / "run", **SHORT, **given)
    assert message in str(raised.value)
    assert not (tmp_path / "run" / "config.json").exists()


# Pretrained weights: laid out as in the cache of the hub's library; there is no network -----------


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A tiny model in the place of vit-tiny-augreg, in timm's format."""
    import huggingface_hub.constants as constants

    def blocked(*_: Any, **__: Any) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", blocked)
    monkeypatch.setattr(socket, "getaddrinfo", blocked)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = create_model("ViT-mu/8", 3, 16, heads=1, pool="gap").eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    name = PRETRAINED["vit-tiny-augreg"].hub.replace("/", "--")
    revision = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / f"models--{name}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    (repo / "snapshots" / revision).mkdir(parents=True)
    save_model(model, repo / "snapshots" / revision / "model.safetensors", format="timm")
    return model


def test_a_name_is_taken_wherever_weights_are(
    cached: Model, photos: Path, elsewhere: Path, command: Command, as_json: Callable[..., Any]
):
    images = torch.rand(2, 3, 16, 16)
    assert torch.allclose(load_model("vit-tiny-augreg")(images), cached(images), atol=1e-5)
    (row,) = as_json("predict", "vit-tiny-augreg", photos / "red" / "00.jpg")
    assert row["label"] in ("0", "1", "2")
    code, _, err = command(
        *("train", photos, "--init", "vit-tiny-augreg", "--steps", 2, "--batch-size", 8),
        *("--workers", 0, "--device", "cpu"),
    )
    assert code == 0, err
    assert "from scratch" not in err
    run = elsewhere / "runs" / "photos-from-vit-tiny-augreg"
    assert json.loads((run / "config.json").read_text())["request"]["init"] == "vit-tiny-augreg"
    assert as_json("evaluate", run, photos)["n"] > 0


def test_weights_that_are_not_there_are_one_line(cached: Model, command: Command):
    code, _, err = command("evaluate", "vit-large-augreg", "digits")
    assert code == 1
    assert "hub:timm/vit_large_patch16_224.augreg_in21k_ft_in1k cannot be fetched" in err
    assert len(err.strip().splitlines()) == 1


# Advice ------------------------------------------------------------------------------------------


def test_few_images_from_scratch_are_advised_of_weights(
    photos: Path, flags: list[str], tmp_path: Path, command: Command
):
    """On standard error, once, when the run starts; not where the recipe is for few images."""
    words = ("train", photos, *flags, "--out", tmp_path / "run")
    code, out, err = command(*words, "--json")
    assert code == 0
    (line,) = [line for line in err.splitlines() if "from scratch" in line]
    assert line.startswith("29 images are few to train ViT-mu/8 on from scratch (section 4.3)")
    assert "--init vit-small-augreg would do better" in line
    assert "`patchword models --pretrained` lists more" in line
    json.loads(out)
    assert "from scratch" not in command(*words)[2]
    digits = ("train", "digits", "--steps", 1, "--device", "cpu", "--out", tmp_path / "digits")
    assert "from scratch" not in command(*digits)[2]
