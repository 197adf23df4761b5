"""What a run directory says of itself, read leniently, and how its figures are put into words.

The report and the model card are written from this. What is absent, or not a finite number, is
None and is left out: nothing is guessed.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchword.evaluation.classify import Classification
from patchword.spec.parse import PatchwordError, to_dict
from patchword.spec.train import TrainSpec

_PARTS = {"test": "test", "val": "validation", "train": "training"}


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The files of a run directory (DESIGN section 2), parsed."""

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
        """As the user named it: a path, `digits`, or `hub:NAME`."""
        return str(self.config.get("source", ""))

    @property
    def data_name(self) -> str:
        """The source without its folder or its `hub:`."""
        if self.source.startswith("hub:"):
            return self.source.removeprefix("hub:")
        return Path(self.source).name or self.source or "data"

    def number(self, key: str) -> float | None:
        """A finite number of the summary, else None."""
        return finite(self.summary.get(key))

    def given(self, key: str, how: Callable[[float], str]) -> str | None:
        """A number of the summary as `how` writes it; None where there is none."""
        value = self.number(key)
        return None if value is None else how(value)

    def weights(self) -> str:
        """`"average of the weights, step 2,000"`, as far as the summary says; else empty."""
        kind = {"raw": "raw weights", "average": "averaged weights"}.get(
            str(self.summary.get("best_weights")), ""
        )
        step = self.number("best_step")
        return ", ".join(filter(None, [kind, f"step {step:,.0f}" if step is not None else ""]))

    @property
    def objective(self) -> str:
        """What was learned: `classification`, or without labels `masked-patch` or `mae`."""
        return str(self.config.get("objective") or "classification")

    @property
    def predicts(self) -> str:
        """What a self-supervised run predicts of a patch: `mean`, `4x4`, `pixels`, or `mae`."""
        return "mae" if self.objective == "mae" else str(self._pretrain.get("predict", ""))

    @property
    def mask_rate(self) -> float | None:
        """The share of the patches that such a run hides."""
        return finite(self._pretrain.get("mask_rate"))

    @property
    def _pretrain(self) -> dict[str, Any]:
        return _mapping(self.config.get("pretrain"))


def read_run(path: Path) -> RunFacts:
    """Read a run directory. Raises `PatchwordError` if it has no config.json; any other file may
    be missing, and a line that a kill cut short is left out."""
    if not (path / "config.json").is_file():
        raise PatchwordError(f"{path} is no run directory: it has no config.json; run train first")
    return RunFacts(
        path=path,
        config=_mapping(_json(path / "config.json")),
        environment=_mapping(_json(path / "environment.json")),
        metrics=_lines(path / "metrics.jsonl"),
        evaluations=_lines(path / "evaluations.jsonl"),
        summary=_mapping(_json(path / "summary.json")),
    )


def settings(config: Mapping[str, Any]) -> list[tuple[str, str, Any, Any, bool]]:
    """(group, name, value, default, changed) of every setting. The group is empty at top level;
    a setting without a default, or unknown to `TrainSpec`, does not count as changed."""
    known = to_dict(TrainSpec(source=""))
    known.pop("source")
    rows: list[tuple[str, str, Any, Any, bool]] = []

    def add(group: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        for name, value in values.items():
            default = defaults.get(name)
            rows.append((group, name, value, default, name in defaults and value != default))

    add("", {k: v for k, v in config.items() if not isinstance(v, dict)}, known)
    for group, values in config.items():
        if isinstance(values, dict):
            add(group, values, _mapping(known.get(group)))
    return rows


def notes(run: RunFacts, result: Classification, split: str) -> list[str]:
    """What a reader must know before trusting the figures, one sentence or two each."""
    found: list[str] = []
    if split == "val":
        found.append(
            "Measured on the validation images. They also chose the best weights, so the figures "
            "are optimistic; measure on a test split before you quote them."
        )
    elif split == "train":
        found.append("Measured on images the model was trained on: this says nothing of new ones.")
    elif split == "all":
        found.append(
            "Measured on all images of the data. If the model was trained on any of them, the "
            "figures are too good."
        )
    if result.n < 1000:
        low, high = wilson(round(result.top1 * result.n), result.n)
        found.append(
            f"Only {count(result.n, 'image')}: chance alone moves the accuracy between "
            f"{percent(low)} and {percent(high)} (Wilson 95 % interval)."
        )
    if result.skipped:
        verb = "was" if result.skipped == 1 else "were"
        found.append(
            f"{count(result.skipped, 'image')} could not be read and {verb} left out of the "
            "figures."
        )
    found += _note_skipped(run)
    rows = result.per_class.items()
    _note_classes(found, "without an image here", [k for k, row in rows if not row["n"]])
    never = [name for name, row in rows if row["n"] and row["precision"] is None]
    _note_classes(found, "never predicted", never)
    return found + _note_code(run)


def pretraining_notes(run: RunFacts) -> list[str]:
    """What a reader must know before trusting the figures of a self-supervised run."""
    found: list[str] = []
    linear, n = run.number("linear"), int(run.number("n") or 0)
    if n:
        by = "a linear probe" if linear is not None else "the loss"
        found.append(
            f"Measured on validation images, which also chose the best weights by {by}: the "
            "figures are a little optimistic. No test image was looked at."
        )
    else:
        found.append("No image was held out: nothing says how well the model does on new ones.")
    if linear is None:
        found.append("Without labels nothing tells what the features are worth for a task.")
    return found + _note_skipped(run) + _note_code(run)


def pretraining_commands(run: RunFacts) -> list[str]:
    """What to do with the weights of a self-supervised run."""
    known = run.number("linear") is not None and run.source
    data, path = shlex.quote(run.source) if known else "LABELLED_DATA", shlex.quote(str(run.path))
    return [
        f"patchword train {data} --init {path}",
        f"patchword evaluate {path} {data} --probe fewshot --probe knn --probe logistic",
    ]


def _note_skipped(run: RunFacts) -> list[str]:
    bad = run.number("bad_images")
    if not bad:
        return []
    verb = "was" if bad == 1 else "were"
    return [f"{count(bad, 'image')} of the data could not be read and {verb} skipped."]


def _note_code(run: RunFacts) -> list[str]:
    dirty = run.environment.get("git_dirty") is True
    said = "The code had changes that were not committed: the commit does not show them."
    return [said] if dirty else []


def sweep_rows(found: object) -> list[tuple[str, str, str]]:
    """(run, top-1, what it was measured on) of a sweep's runs, of the final ones, and of their
    mean, from `sweep` in the summary; empty for a single run."""
    sweep = _mapping(found)
    chosen, split = finite(sweep.get("chosen")), str(sweep.get("split", ""))
    rows: list[tuple[str, str, str]] = []
    for rate, row in _mapping(sweep.get("rates")).items():
        shown = percent(row["top1"]) if row else "loss not finite"
        mark = ", chosen" if float(rate) == chosen else ""
        rows.append((f"learning rate {float(rate):g}", shown, f"held-out images{mark}"))
    for row in sweep.get("runs", []):
        rows.append((f"{row['run']}, seed {row['seed']}", percent(row["top1"]), split))
    mean, std = finite(sweep.get("mean")), finite(sweep.get("std"))
    if mean is not None and std is not None:
        rows.append(("mean, standard deviation", f"{percent(mean)} \u00b1 {percent(std)}", split))
    return rows


def _note_classes(found: list[str], what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
        listed = ", ".join(names[:5])
        found.append(f"{count(len(names), 'class', 'classes')} {what}: {listed}{more}.")


def wilson(successes: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927), at 95 % by default; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p, square = successes / n, z * z / n
    centre = (p + square / 2) / (1 + square)
    half = z * math.sqrt(p * (1 - p) / n + square / (4 * n)) / (1 + square)
    # rounding must not move the ends past the proportion itself
    return min(max(centre - half, 0.0), p), max(min(centre + half, 1.0), p)


def worst_first(result: Classification) -> list[tuple[str, dict[str, Any]]]:
    """Classes by rising recall, then by falling number of images; those without images last."""
    return sorted(
        result.per_class.items(),
        key=lambda item: (
            item[1]["recall"] is None,
            item[1]["recall"] or 0.0,
            -item[1]["n"],
        ),
    )


def finite(value: Any) -> float | None:
    """`value` as a float if it is a finite number (no bool), else None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def percent(fraction: float | None, digits: int = 2) -> str:
    return "\u2013" if fraction is None else f"{100 * fraction:.{digits}f} %"


def count(number: float, noun: str, plural: str = "") -> str:
    return f"{number:,.0f} {noun if number == 1 else plural or noun + 's'}"


def part(split: str, n: int) -> str:
    """`"360 test images"`; a split of another name is quoted."""
    if split == "all":
        return f"{count(n, 'image')}, all there are"
    if split in _PARTS:
        return count(n, f"{_PARTS[split]} image")
    return f"{count(n, 'image')} of \u201c{split}\u201d"


def duration(seconds: float) -> str:
    """`"1 h 05 min"`, `"1 min 12 s"`, `"8.4 s"`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    if round(seconds) < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def significant(value: float, digits: int = 3) -> str:
    """A number to so many significant digits, without an exponent, thousands separated."""
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def operations(exaflops: float) -> str:
    """`"12.3 teraFLOPs"` of a number of exaFLOPs."""
    scales = ((1.0, "exa"), (1e-3, "peta"), (1e-6, "tera"), (1e-9, "giga"))
    scale, prefix = next((s for s in scales if exaflops >= s[0]), scales[-1])
    return f"{significant(exaflops / scale)} {prefix}FLOPs"


def whole(value: float) -> str:
    return f"{value:,.0f}"


def rate(images_per_second: float) -> str:
    return f"{significant(images_per_second)} images/s"


def multiply_adds(gmacs: float) -> str:
    """`"2.31 million"` of a number in units of 10^9."""
    if gmacs >= 1:
        return f"{significant(gmacs)} billion"
    return f"{significant(1000 * gmacs)} million"


def plain(value: Any) -> str:
    """A JSON value as a person would write it in a table."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    return str(value)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise PatchwordError(f"{path} is not valid JSON ({error}); restore or remove it") from error


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
