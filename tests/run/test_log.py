"""What a run logs: every line once, and nothing of what it tried and left."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import patchword
from patchword import create_model, save_model
from patchword.run import trials
from patchword.run.inputs import Inputs

Train = Callable[..., list[str]]
TRIALS: dict[str, Any] = {"enlarge": 2.0, "probe": True, "rates": (1e-4, 3e-4), "warmup": 500}


@pytest.fixture
def lines(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> Train:
    """`lines(name, **changes)`: what a run from timm's weights of 16 px logs."""
    monkeypatch.setenv("PATCHWORD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("patchword.run.finish.report_run", lambda *_: None)
    torch.manual_seed(0)
    model = create_model("ViT-mu/8", 10, 16, heads=1, depth=2)
    weights = save_model(model, tmp_path / "timm.safetensors", format="timm")

    def run(name: str, **changes: Any) -> list[str]:
        caplog.clear()
        caplog.set_level("INFO")
        settings: dict[str, Any] = {"init": weights, "batch_size": 8, "workers": 0, "steps": 3}
        settings |= {"precision": "float32", "val_fraction": 0.2} | TRIALS
        patchword.train(photos, out=tmp_path / name, **settings | changes)
        return [record.getMessage() for record in caplog.records]

    return run


@pytest.fixture
def better(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, int]]:
    """The image size at which a head is said to be better."""
    given = {"size": (16, 16)}
    real = trials.probe_head

    def worth(inputs: Inputs, *rest: Any, **options: Any) -> Any:
        found = real(inputs, *rest, **options)
        accuracy = 0.9 if inputs.settled.image_size == given["size"] else 0.8
        assert found is not None
        return dataclasses.replace(found, accuracy=accuracy)

    monkeypatch.setattr(trials, "probe_head", worth)
    return given


@pytest.mark.parametrize("side", [16, 32])
@pytest.mark.parametrize("timed", [False, True])
def test_every_line_comes_once(
    lines: Train,
    better: dict[str, tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    side: int,
    timed: bool,
):
    """Also where the features are there from before, which only the second run meets, and where the
    time of a step is measured; the weights, the warm-up, the broken photo."""
    better["size"] = (side, side)
    monkeypatch.setattr(trials, "pace", lambda *_, **__: 1.0)
    length: dict[str, Any] = {"steps": None, "time": "150s"} if timed else {}
    for name in ("first",) if timed else ("first", "second"):
        found = lines(name, **length)
        assert len(found) == len(set(found)), found
        assert sum("timm weights of ViT-2x32/8, 16x16 px" in line for line in found) == 1
        assert sum("the warm-up takes all" in line for line in found) == 1
        assert sum("position table resampled" in line for line in found) == (side == 32)
        if side == 16:
            assert not any("32x32" in line for line in found)


def test_features_of_the_resolution_that_was_left_are_not_spoken_of(
    lines: Train, better: dict[str, tuple[int, int]]
):
    lines("first")
    assert sum("features of" in line for line in lines("second")) == 2  # train and val


def test_an_unreadable_image_is_named_once_without_labels(lines: Train):
    """Probes and training both meet it."""
    settings = {"probe": False, "enlarge": 1.0, "rates": (), "warmup": 1, "epochs": None}
    found = lines(
        "masked", objective="masked-patch", steps=12, eval_every=4, val_fraction=0.1, **settings
    )
    assert sum("skipped an unreadable image" in line for line in found) == 1
    assert len(found) == len(set(found)), found
