"""What may be looked at when: nothing that a run decides is decided on test images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchword
from patchword.commands.probing import measure_probes, probe_parts
from patchword.data.registry import open_source
from patchword.data.sources import Source
from patchword.evaluation.probe import sweep_logistic
from patchword.models.zoo import create_model
from patchword.run import sweep, train
from patchword.run.inputs import Inputs
from patchword.session.features import extract
from patchword.training.log import read_lines
from patchword.weights.save import save_model

MakePhotos = Callable[..., Path]
QUICK: dict[str, Any] = {"batch_size": 8, "workers": 0, "precision": "float32"}


class Guarded:
    """The images of a source, of which those of test raise until `opened`."""

    def __init__(self, source: Source) -> None:
        self.reader = source.reader
        self.closed = set(source.parts["test"].tolist())
        self.opened = False
        self.read_since: list[int] = []

    def read(self, index: int) -> bytes | np.ndarray:
        if index in self.closed:
            assert self.opened, f"{self.location(index)} is read before the final measurement"
            self.read_since.append(index)
        return self.reader.read(index)

    def location(self, index: int) -> str:
        return self.reader.location(index)

    def digest(self, *, whole: bool) -> str:
        return self.reader.digest(whole=whole)


@pytest.fixture
def divided(make_photos: MakePhotos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """10 pictures of two colours in each of train, val and test; no features of them are kept."""
    monkeypatch.setenv("PATCHWORD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("patchword.run.finish.report_run", lambda *_: None)
    names = [f"{part}/{name}" for part in ("train", "val", "test") for name in ("red", "green")]
    return make_photos(tmp_path / "divided", 10, names, first=500)


@pytest.fixture
def guard(divided: Path, monkeypatch: pytest.MonkeyPatch) -> Guarded:
    """Of the source that every command opens."""
    source = open_source(str(divided))
    guarded = Guarded(source)
    given = dataclasses.replace(source, reader=guarded)
    for module in (train, sweep):
        monkeypatch.setattr(module, "open_source", lambda name: given)
    return guarded


def opens(guard: Guarded, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        guard.opened = True
        return real(*args, **kwargs)

    return call


def test_a_run_decides_everything_without_the_test_part(
    finished: Path, divided: Path, guard: Guarded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The resolution, the head and its regulariser, the learning rate, the best weights."""
    monkeypatch.setattr(train, "finish", opens(guard, train.finish))
    settings = QUICK | {"init": finished, "steps": 4, "rates": (1e-4, 1e-3), "enlarge": 2.0}
    result = patchword.train(divided, out=tmp_path / "run", eval_every=2, average=0.9, **settings)
    lines = read_lines(tmp_path / "run" / "evaluations.jsonl")
    assert {line["step"] for line in lines} == {0, 2, 4}
    assert result.split == "test"
    assert len(guard.read_since) == 20


def test_a_sweep_decides_without_the_test_part(
    finished: Path, divided: Path, guard: Guarded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    job = sweep._Sweep
    monkeypatch.setattr(sweep, "report_run", lambda *_: None)
    monkeypatch.setattr(job, "train_on_all", opens(guard, job.train_on_all))
    spec = train.base_spec(str(divided), None, str(finished), None)
    asked = QUICK | {"init": str(finished), "steps": 2, "rates": [1e-4, 1e-3]}
    found = sweep.sweep(train.changed(spec, **asked), out=tmp_path / "sweep")
    assert len(found.rates) == 2
    assert len(guard.read_since) >= 20


def test_learning_rates_are_compared_in_evaluation_mode(
    finished: Path, divided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On the val part, with no module dropping anything."""
    measured: list[tuple[str, bool]] = []
    real = Inputs.evaluator

    def spy(self: Inputs, part: str, some: Any = None) -> Any:
        evaluator = real(self, part, some)

        def measure(network: torch.nn.Module) -> dict[str, float]:
            training = any(module.training for module in network.modules())
            measured.append((part, training))
            return evaluator(network)

        return evaluator if some is None else measure

    monkeypatch.setattr(Inputs, "evaluator", spy)
    settings = QUICK | {"init": finished, "steps": 1, "rates": (1e-4, 1e-3), "dropout": 0.5}
    patchword.train(divided, out=tmp_path / "run", enlarge=1.0, **settings)
    assert measured == [("val", False)] * 2


@pytest.mark.parametrize("split", ["test", "val"])
def test_a_probe_learns_from_none_of_its_development_images(
    divided: Path, tmp_path: Path, split: str
):
    """Whether those are the val part, or where that is measured on some of train."""
    model = create_model("ViT-mu/8", 0, 16, depth=1)
    bare = save_model(model, tmp_path / "bare.safetensors")
    source = open_source(str(divided))
    parts = probe_parts(source, None, split, 0)
    learned = np.setdiff1d(parts.train, parts.development)
    assert len(learned) == (20 if split == "test" else 18)
    fitted, held = (
        extract(model, source, at, device="cpu", cache=False) for at in (learned, parts.development)
    )
    wanted = sweep_logistic(fitted.pooled, fitted.labels, held.pooled, held.labels, 2)
    found = measure_probes(bare, divided, ["logistic"], split=split, device="cpu", workers=0)
    assert found.logistic_probe is not None
    np.testing.assert_allclose(found.logistic_probe.table, wanted.table, rtol=1e-5)
    torch.testing.assert_close(found.logistic_probe.weight, wanted.weight, rtol=1e-4, atol=1e-5)
