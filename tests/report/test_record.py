"""What a run directory says."""

from __future__ import annotations

from pathlib import Path

import pytest

from patchword.report.record import read_run, settings
from patchword.spec.parse import PatchwordError, to_dict
from patchword.spec.train import OptimSpec, TrainSpec


def test_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(PatchwordError, match=r"no config\.json; run train first"):
        read_run(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PatchwordError, match="not valid JSON"):
        read_run(tmp_path)


def test_settings_mark_what_is_not_the_default() -> None:
    config = to_dict(TrainSpec(source="x", seed=3, optim=OptimSpec(lr=0.1)))
    changed = {(group, name) for group, name, *_, mark in settings(config) if mark}
    assert changed == {("", "seed"), ("optim", "lr")}
    rows = {(group, name): default for group, name, _, default, _ in settings(config)}
    assert rows["optim", "lr"] == OptimSpec().lr
