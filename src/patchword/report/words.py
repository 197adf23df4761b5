"""A run's facts and figures in words, the same ones on the console, on the page and in the card.

Imports neither torch nor matplotlib, so that the command line starts fast.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from patchword.evaluation.classify import Classification
    from patchword.report.record import RunRecord

NOTHING = "\u2013"
"""What stands for a figure that there is not."""


def percent(fraction: float | None, digits: int = 2) -> str:
    return NOTHING if fraction is None else f"{100 * fraction:.{digits}f} %"


def four_places(value: float) -> str:
    return f"{value:.4f}"


def whole(value: float) -> str:
    return f"{value:,.0f}"


def count(number: float, noun: str, plural: str = "") -> str:
    return f"{number:,.0f} {noun if number == 1 else plural or noun + 's'}"


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


def rate(images_per_second: float) -> str:
    return f"{significant(images_per_second)} images/s"


def multiply_adds(gmacs: float) -> str:
    """`"2.31 million"` of a number in units of 10^9."""
    return f"{significant(gmacs)} billion" if gmacs >= 1 else f"{significant(1e3 * gmacs)} million"


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


def first_of(names: Sequence[str], most: int) -> str:
    """`"a, b and 3 more"`."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def images_of(split: str, n: int) -> str:
    """`"360 test images"`; a split of another name is quoted."""
    if split == "all":
        return f"{count(n, 'image')}, all there are"
    known = {"test": "test", "val": "validation", "train": "training"}
    if split in known:
        return count(n, f"{known[split]} image")
    return f"{count(n, 'image')} of \u201c{split}\u201d"


class Figure(NamedTuple):
    """A figure of a classifier: its key in a result, how it is called and written."""

    key: str
    short: str
    """on the console"""
    name: str
    metric: str
    """what the Hugging Face hub calls it"""
    remark: str = ""
    say: Callable[[float], str] = percent


FIGURES = (
    Figure("top1", "top-1", "Top-1 accuracy", "accuracy"),
    Figure("top5", "top-5", "Top-5 accuracy", "accuracy"),
    Figure(
        "balanced",
        "balanced accuracy",
        "Balanced accuracy",
        "accuracy",
        "mean recall of the classes",
    ),
    Figure("loss", "loss", "Loss", "loss", "per image", four_places),
    Figure("ece", "calibration error", "Expected calibration error", "ece", "15 equal-width bins"),
    Figure("brier", "Brier", "Brier score", "brier", "less is better", four_places),
)


def figures_of(result: Classification) -> Iterator[tuple[Figure, float]]:
    """The figures of a result with their values; top-5 only where it says something."""
    for figure in FIGURES:
        if figure.key != "top5" or len(result.per_class) > 5:
            yield figure, getattr(result, figure.key)


def wilson(successes: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927), at 95 % by default; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p, square = successes / n, z * z / n
    centre = (p + square / 2) / (1 + square)
    half = z * math.sqrt(p * (1 - p) / n + square / (4 * n)) / (1 + square)
    # rounding must not move the ends past the proportion itself
    return min(max(centre - half, 0.0), p), max(min(centre + half, 1.0), p)


def interval(result: Classification, between: str = "to") -> str:
    """`"97.5 % to 99.1 %"`: where the accuracy lies, by Wilson."""
    low, high = wilson(round(result.top1 * result.n), result.n)
    return f"{percent(low)} {between} {percent(high)}"


PROBES = {"knn": "10 nearest neighbours", "linear": "logistic regression"}
"""What a run without labels is measured by where there are some: key in the summary -> name."""
FACTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "parameters": ("Parameters", whole),
    "gmacs": ("Multiply-adds per image", multiply_adds),
    "steps": ("Steps", whole),
    "images": ("Images seen", whole),
    "seconds": ("Training time", duration),
    "images_per_second": ("Training speed", rate),
    "evaluate_images_per_second": ("Evaluation speed", rate),
    "exaflops": ("Training cost", operations),
    "bad_images": ("Images that could not be read", whole),
    "loss": ("Loss of the objective", four_places),
    **{key: (f"Top-1, {name}, frozen features", percent) for key, name in PROBES.items()},
}
"""Key in the summary of a run -> its name and how it is written."""


def facts(run: RunRecord, *keys: str) -> dict[str, str]:
    """Those of these facts that the run recorded, by name."""
    known = {key: value for key in keys if (value := run.number(key)) is not None}
    return {FACTS[key][0]: FACTS[key][1](value) for key, value in known.items()}


def weights(run: RunRecord) -> str:
    """`"averaged weights, step 2,000"`, as far as the summary says; else empty."""
    kinds, step = {"raw": "raw weights", "average": "averaged weights"}, run.number("best_step")
    kind = kinds.get(str(run.summary.get("best_weights")), "")
    return ", ".join(filter(None, [kind, "" if step is None else f"step {whole(step)}"]))


# Runs without labels -----------------------------------------------------------------------------

METHODS = {
    "masked-patch": "masked patch prediction (section 4.6 of the Vision Transformer's paper)",
    "mae": "a masked autoencoder (He et al., arXiv 2111.06377)",
}
LOSSES = {
    "mae": "squared error of a pixel of the masked patches, normalised by patch",
    "mean": "cross-entropy of the mean colour of a corrupted patch, 512 classes in RGB",
    "4x4": "cross-entropy of one of 16 colours of a corrupted patch, 512 classes in RGB",
    "pixels": "squared error of a normalised pixel of the corrupted patches",
}


def predictions(predicts: str) -> str:
    """What the pictures of a run without labels show."""
    if predicts == "mae":
        return (
            "Visible patches are shown as they were. Each predicted patch has the mean and the "
            "contrast of the true one, which the objective leaves out."
        )
    colours = "" if predicts == "pixels" else " The most probable of 512 colours is shown."
    return (
        "Of the corrupted patches most are grey, [mask]; some are replaced by other patches of the "
        f"image, some are left as they were. All of them are predicted.{colours}"
    )


def next_commands(run: RunRecord) -> list[str]:
    """What to do with the weights of a run: try a classifier, teach features a task."""
    path, data = shlex.quote(str(run.path)), shlex.quote(run.source)
    if run.objective == "classification":
        return [
            f"patchword predict {path} photo.jpg",
            f"patchword evaluate {path} {data if run.source else 'DATA'}",
        ]
    if run.number("linear") is None or not run.source:
        data = "LABELLED_DATA"
    return [
        f"patchword train {data} --init {path}",
        f"patchword evaluate {path} {data} --probe fewshot --probe knn --probe logistic",
    ]


def sweep_rows(sweep: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(run, top-1, what it was measured on) of a sweep's runs, of the final ones, and of their
    mean, from what `sweep.json` has; none for a single run."""
    split = str(sweep.get("split", ""))
    rows: list[tuple[str, str, str]] = []
    for value, row in sweep.get("rates", {}).items():
        shown = percent(row["top1"]) if row else "loss not finite"
        mark = ", chosen" if float(value) == sweep.get("chosen") else ""
        rows.append((f"learning rate {float(value):g}", shown, f"held-out images{mark}"))
    for row in sweep.get("runs", []):
        rows.append((f"{row['run']}, seed {row['seed']}", percent(row["top1"]), split))
    mean, std = sweep.get("mean"), sweep.get("std")
    if mean is not None and std is not None:
        rows.append(("mean, standard deviation", f"{percent(mean)} \u00b1 {percent(std)}", split))
    return rows


# What a reader must know before trusting the figures ---------------------------------------------

SPLITS = {
    "val": "Measured on the validation images. They also chose the best weights, so the figures "
    "are optimistic; measure on a test split before you quote them.",
    "train": "Measured on images the model was trained on: this says nothing of new ones.",
    "all": "Measured on all images of the data. If the model was trained on any of them, the "
    "figures are too good.",
}


def notes(run: RunRecord, result: Classification | None, split: str) -> list[str]:
    """A sentence or two each, on a classifier's result, or without one on the features."""
    bad = int(run.number("bad_images") or 0)
    said = _of_features(run) if result is None else _of_figures(result, split)
    said += [f"{_unread(bad, 'of the data ')} skipped."] if bad else []
    rows = {} if result is None else result.per_class
    missing = [name for name, row in rows.items() if not row["n"]]
    never = [name for name, row in rows.items() if row["n"] and row["precision"] is None]
    for names, what in ((missing, "without an image here"), (never, "never predicted")):
        number = count(len(names), "class", "classes")
        said += [f"{number} {what}: {first_of(names, 5)}."] if names else []
    if run.environment.get("git_dirty") is True:
        said.append("The code had changes that were not committed: the commit does not show them.")
    return said


def _of_figures(result: Classification, split: str) -> list[str]:
    said = [SPLITS[split]] if split in SPLITS else []
    if result.n < 1000:
        said.append(
            f"Only {count(result.n, 'image')}: chance alone moves the accuracy between "
            f"{interval(result, 'and')} (Wilson 95 % interval)."
        )
    if result.skipped:
        said.append(f"{_unread(result.skipped)} left out of the figures.")
    return said


def _of_features(run: RunRecord) -> list[str]:
    probed = run.number("linear") is not None
    said = "No image was held out: nothing says how well the model does on new ones."
    if run.number("n"):
        said = (
            "Measured on validation images, which also chose the best weights by "
            f"{'a linear probe' if probed else 'the loss'}: the figures are a little optimistic. "
            "No test image was looked at."
        )
    unknown = "Without labels nothing tells what the features are worth for a task."
    return [said] if probed else [said, unknown]


def _unread(number: int, of: str = "") -> str:
    verb = "was" if number == 1 else "were"
    return f"{count(number, 'image')} {of}could not be read and {verb}"
