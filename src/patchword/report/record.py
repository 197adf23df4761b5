"""What a run directory says, read once and leniently: what is absent, or is no finite number, is
left out, and nothing is guessed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchword.spec.parse import PatchwordError, to_dict
from patchword.spec.settled import flatten
from patchword.spec.train import TrainSpec
from patchword.training.log import read_lines


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The files of a run directory, parsed."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    """one per log point"""
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def model(self) -> str:
        """The architecture that was trained; the named variant may have been changed."""
        return str(self.summary.get("architecture") or self.config.get("model") or "model")

    @property
    def source(self) -> str:
        """As the user named it: a path, `digits`, or `hub:NAME`; empty if that is unknown."""
        return str(self.config.get("source", ""))

    @property
    def from_hub(self) -> bool:
        return self.source.startswith("hub:")

    @property
    def data_name(self) -> str:
        """The source without its folder or its `hub:`."""
        if self.from_hub:
            return self.source.removeprefix("hub:")
        return Path(self.source).name or self.source or "data"

    @property
    def title(self) -> str:
        return f"{self.model} on {self.data_name}"

    @property
    def objective(self) -> str:
        """What was learned: `classification`, or without labels `masked-patch` or `mae`."""
        return str(self.config.get("objective") or "classification")

    @property
    def predicts(self) -> str:
        """What a self-supervised run predicts of a patch: `mean`, `4x4`, `pixels`, or `mae`."""
        pretrain = _mapping(self.config.get("pretrain"))
        return "mae" if self.objective == "mae" else str(pretrain.get("predict", ""))

    @property
    def mask_rate(self) -> float | None:
        """The share of the patches that such a run hides."""
        return finite(_mapping(self.config.get("pretrain")).get("mask_rate"))

    @property
    def sweep(self) -> dict[str, Any]:
        """What `sweep.json` has of a sweep or of repeated runs; empty for a single run."""
        return _mapping(self.summary.get("sweep"))

    def number(self, key: str) -> float | None:
        """A finite number of the summary, else None."""
        return finite(self.summary.get(key))


def read_run(path: Path) -> RunRecord:
    """Read a run directory. Raises `PatchwordError` if it has no config.json; any other file may
    be missing, and a line that a kill cut short is left out."""
    if not (path / "config.json").is_file():
        raise PatchwordError(f"{path} is no run directory: it has no config.json; run train first")
    config = _read(path / "config.json")
    if "request" in config and "settled" not in config:  # of several runs: the first is shown
        config |= {"settled": _read(path / "run-0" / "config.json").get("settled")}
    return RunRecord(
        path=path,
        config=flatten(config),
        environment=_read(path / "environment.json"),
        metrics=read_lines(path / "metrics.jsonl"),
        evaluations=read_lines(path / "evaluations.jsonl"),
        summary=_read(path / "summary.json"),
    )


def settings(config: Mapping[str, Any]) -> list[tuple[str, str, Any, Any, bool]]:
    """(group, name, value, default, changed) of every setting. The group is empty at top level;
    a setting without a default, or unknown to `TrainSpec`, does not count as changed."""
    known = to_dict(TrainSpec(source=""))
    known.pop("source")
    single = {name: value for name, value in config.items() if not isinstance(value, dict)}
    groups = {name: value for name, value in config.items() if isinstance(value, dict)}
    return [
        (group, name, value, defaults.get(name), value != defaults.get(name, value))
        for group, values in ({"": single} | groups).items()
        for defaults in [_mapping(known.get(group)) if group else known]
        for name, value in values.items()
    ]


def finite(value: Any) -> float | None:
    """`value` as a float if it is a finite number (no bool), else None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise PatchwordError(f"{path} is not valid JSON ({error}); restore or remove it") from error


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
