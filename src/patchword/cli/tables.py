"""What the commands print: results to standard output, everything else to standard error."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table

from patchword.report.words import FIGURES, PROBES, count, four_places, percent

if TYPE_CHECKING:
    from patchword.commands.calibrating import Calibrated
    from patchword.commands.checking import Checked
    from patchword.commands.explaining import Explanations
    from patchword.commands.listing import Variant
    from patchword.commands.probing import Probing
    from patchword.evaluation.classify import Classification
    from patchword.models.summary import LayerRow
    from patchword.run.sweep import SweepResult
    from patchword.session.session import Prediction
    from patchword.training.recipes import Recipe
    from patchword.weights.pretrained import Pretrained

err = Console(stderr=True, markup=False, emoji=False)  # names are shown as they are
out = Console(markup=False, emoji=False)


def say(line: str) -> None:
    """A line of the result, never broken."""
    out.print(line, highlight=False, soft_wrap=True)


def say_pairs(pairs: Mapping[str, object], width: int = 8) -> None:
    """A line for each name and value; the values stand below each other."""
    for name, value in pairs.items():
        say(f"{name:{width}}{value}")


def show_table(
    names: Sequence[str], rows: Iterable[Sequence[str] | None], whole: Sequence[str] = ()
) -> None:
    """A table that breaks what is too long for its column, but for those in `whole`, and cuts
    nothing off. None among the rows is a line."""
    table = Table(*(Column(name, overflow="fold", no_wrap=name in whole) for name in names))
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*row)
    out.print(table)


def show_run(run: Path, summary: dict[str, Any]) -> None:
    """What a run reached, and where it is."""
    learned = "objective" in summary
    weights = f"{run} ({summary['best_weights']} weights of step {summary['best_step']:,})"
    lines = {"result": _learned(summary) if learned else _classified(summary), "weights": weights}
    lines["report"] = str(run / "report.html")
    say_pairs(lines | ({"next": summary["next"][0]} if learned else {}))


def _learned(summary: dict[str, Any]) -> str:
    """What a run without labels reached."""
    if summary["split"] is None:
        return "no image was held out to measure on"
    shown = [f"loss {four_places(summary['loss'])}"]
    shown += [f"{name} {percent(summary[key])}" for key, name in PROBES.items() if key in summary]
    return f"{', '.join(shown)} on {summary['n']:,} {summary['split']} images"


def _classified(summary: dict[str, Any]) -> str:
    """What a classifier reached."""
    shown = [
        f"{figure.short} {figure.say(summary[figure.key])}"
        for figure in FIGURES
        if figure.key in ("top1", "top5", "balanced", "ece") and figure.key in summary
    ]
    return f"{', '.join(shown)} on {summary['n']:,} {summary['split']} images"


def show_sweep(swept: SweepResult, rows: Sequence[Sequence[str]]) -> None:
    """The learning rates, the runs, and where they are."""
    show_table(("run", "top-1", "measured on"), rows)
    say_pairs({"weights": swept.folder, "report": swept.folder / "report.html"})


def show_classification(result: Classification) -> None:
    """The figures of an evaluation, then each class's."""
    figures = [figure.say(getattr(result, figure.key)) for figure in FIGURES]
    show_table(["images", *(figure.short for figure in FIGURES)], [[f"{result.n:,}", *figures]])
    classes = [
        (name, str(row["n"]), percent(row["recall"], 1), percent(row["precision"], 1))
        for name, row in result.per_class.items()
        if row["n"]
    ]
    show_table(("class", "images", "recall", "precision"), classes)


def show_probes(probing: Probing) -> None:
    """A row for each probe."""
    rows = [
        ("few-shot", f"{shots} a class", percent(row.mean, 1), f"± {percent(row.std, 1)}")
        for shots, row in (probing.fewshot or {}).items()
    ]
    for k, share in (probing.knn or {}).items():
        rows.append(("nearest neighbours", f"k {k}", percent(share, 1), ""))
    if probing.logistic_probe is not None:
        regulariser = f"l2 {probing.logistic_probe.l2:.0e}"
        rows.append(("logistic regression", regulariser, percent(probing.logistic, 1), ""))
    show_table(("probe", "", "top-1", "over seeds"), rows, whole=("probe",))


def show_predictions(predictions: Sequence[Prediction]) -> None:
    """Images with their likeliest classes."""
    rows: list[tuple[str, str, str, str]] = []
    for prediction in predictions:
        rest = prediction.top if prediction.label is None else prediction.top[1:]
        then = ", ".join(f"{label} {percent(p, 1)}" for label, p in rest)
        label = "uncertain" if prediction.label is None else prediction.label
        rows.append((prediction.path, label, percent(prediction.probability, 1), then))
    show_table(("image", "label", "probability", "then"), rows)


def write_csv(predictions: Sequence[Prediction], may_abstain: bool) -> None:
    """The table as comma-separated values; where the model may abstain, with what it settled on."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    ranks = range(1, 1 + max(len(p.top) for p in predictions))
    settled = ["label", "abstained"] if may_abstain else []
    names = (f"{what}{k}" for k in ranks for what in ("label", "probability"))
    writer.writerow(["path", *settled, *names])
    for p in predictions:
        said = [p.label, str(p.abstained).lower()] if may_abstain else []
        writer.writerow([p.path, *said, *(x for pair in p.top for x in pair)])


def show_inspection(folder: Path, summary: dict[str, Any]) -> None:
    """What each figure says, in numbers."""
    rows = [(name, tell(summary[name])) for name, tell in _SAID.items() if name in summary]
    show_table(("figure", "what it says"), rows, whole=("figure",))
    written = count(len(summary["files"]), "file")
    say(f"{written} in {folder}, the numbers in {folder / 'summary.json'}")


def _said_positions(row: dict[str, Any]) -> str:
    names = {"row": "same row", "column": "same column", "neighbour": "neighbours", "far": "far"}
    shown = [f"{text} {row[k]:.2f}" for k, text in names.items() if row[k] is not None]
    return f"{row['position']}: {', '.join(shown)}"


def _said_distance(row: dict[str, Any]) -> str:
    first = [value for value in row["pixels"][0] if value is not None] or [math.nan]
    last = row["layer_means"][-1]
    return (
        f"over {row['images']:,} images: heads of layer 0 {min(first):.1f} to {max(first):.1f} px, "
        f"mean of the last layer {math.nan if last is None else last:.1f} px, uniform attention "
        f"{row['uniform']:.1f} px"
    )


def _said_map(row: dict[str, Any]) -> str:
    same = percent(row["nearest_of_same_class"], 1)
    return (
        f"{row['images']:,} images of {row['part']}: nearest neighbour of the same class {same}, "
        f"{len(row['mistakes']):,} mistakes by the {row['mistakes_by']}"
    )


def _said_pictures(row: dict[str, Any]) -> str:
    return count(len(row["pictures"]), "picture")


_SAID: dict[str, Callable[[dict[str, Any]], str]] = {
    "filters": lambda row: (
        f"{len(row['explained'])} components explain {percent(row['total'], 1)} of the variance"
    ),
    "position_similarity": _said_positions,
    "attention_distance": _said_distance,
    "rollout": _said_pictures,
    "attention": lambda row: f"{_said_pictures(row)}; query: {row['of']}",
    "tokens": _said_pictures,
    "embedding": _said_map,
}


def show_explanations(explained: Explanations) -> None:
    """Each image's class, and what the maps are worth; the last row is the mean."""
    rows: list[Sequence[str] | None] = []
    for row in explained.images:
        found = row.explanation
        about = f"{row.path}\n{row.label} {percent(found.probability, 1)}"
        rows += [_scores(about, found.agreement, found.scores), None]
    mean, number = explained.mean(), len(explained.images)
    if number > 1:
        scores = {name: (area, mean["insertion"][name]) for name, area in mean["deletion"].items()}
        rows.append(_scores(f"mean of {number:,} images", mean["agreement"], scores))
    show_table(("image", "map", "deletion", "insertion"), rows, whole=("map",))
    folders = {str(row.picture.parent) for row in explained.images}
    lines = {
        "patches": f"taken away by {explained.taken_away_by}",
        "scores": "areas under the curves, 0 to 1: deletion small, insertion large is good",
        "pictures": explained.images[0].picture if number == 1 else ", ".join(folders),
    }
    say_pairs(lines, width=9)


def _scores(
    about: str, agreement: float | None, scores: Mapping[str, tuple[float, float]]
) -> list[str]:
    """The maps line by line, beside what goes for all of them."""
    if agreement is not None:
        about += f"\nagreement {agreement:.2f}"
    columns = zip(*((f"{a:.3f}", f"{b:.3f}") for a, b in scores.values()), strict=True)
    return [about, "\n".join(scores), *map("\n".join, columns)]


def show_calibration(calibrated: Calibrated) -> None:
    """Each part before and after."""
    figures = [figure for figure in FIGURES if figure.key in ("top1", "loss", "ece", "brier")]
    rows: list[Sequence[str] | None] = []
    for part in calibrated.parts:
        temperatures = (1.0, calibrated.calibration.temperature)
        for t, result in zip(temperatures, (part.before, part.after), strict=True):
            shown = (figure.say(getattr(result, figure.key)) for figure in figures)
            rows.append([f"{result.n:,}", part.role, f"{t:.4g}", *shown])
        rows.append(None)
    show_table(["images", "", "temperature", *(figure.short for figure in figures)], rows)
    nowhere = "nowhere; --out FILE writes the calibrated model, --overwrite replaces"
    say_pairs({"stored": calibrated.stored or nowhere}, width=9)


def show_check(checked: Checked) -> None:
    """The findings with examples and advice, and a count."""
    if checked.moved:
        moved = count(len(checked.moved), "file")
        say(f"moved {moved} to {checked.aside}; --undo brings them back")
    rows: list[Sequence[str] | None] = []
    for finding in checked.findings:
        examples = [" = ".join(item.names[:3]) for item in finding.items[:3]]
        about = [f" ({item.about})" if item.about else "" for item in finding.items]
        shown = "\n".join(a + b for a, b in zip(examples, about, strict=False))
        row = (finding.severity, finding.what, f"{finding.count:,}", shown, finding.advice)
        rows += [row, None]
    if rows:
        names = ("", "finding", "how many", "examples", "what to do")
        show_table(names, rows, whole=("", "how many"))
    kinds = {kind: checked.count(kind) for kind in ("error", "warning", "note")}
    named = ", ".join(count(number, kind) for kind, number in kinds.items() if number)
    classes = len(checked.source.classes)
    say(f"{checked.images:,} images of {classes:,} classes: found {named or 'nothing wrong'}")


def show_variants(variants: Sequence[Variant]) -> None:
    """The named models, family by family."""
    rows: list[Sequence[str] | None] = []
    for row, following in zip(variants, [*variants[1:], variants[-1]], strict=True):
        size = (f"{row.parameters:,}", f"{row.macs / 1e9:.2f}")
        rows.append((row.name, row.family, *row.cells, *size))
        if row.family != following.family:
            rows.append(None)
    columns = ("model", "family", "layers", "width", "MLP", "heads", "parameters", "GMACs")
    show_table(columns, rows, whole=("model", "family", "parameters", "GMACs"))
    say("GMACs for one image of 224 x 224 pixels")


def show_layers(variant: Variant, layers: Sequence[LayerRow]) -> None:
    """A model's layers, with a total."""
    rows: list[Sequence[str] | None] = []
    for row in layers:
        shape, memory = " x ".join(map(str, row.shape)), f"{row.activation_bytes / 2**20:.2f}"
        rows.append((row.name, shape, f"{row.parameters:,}", f"{row.macs:,}", memory))
    columns = ("layer", "output", "parameters", "MACs", "activations (MiB)")
    show_table(columns, [*rows[:-1], None, rows[-1]], whole=("layer", "parameters"))
    height, width = variant.spec.image_size
    say(f"for one image of {height} x {width} pixels, in float32")


def show_pretrained(pretrained: Sequence[Pretrained], *, detail: bool) -> None:
    """Well-known weights; in `detail` the first of them alone."""
    if detail:
        about = {key.replace("_", " "): value for key, value in vars(pretrained[0]).items()}
        shown = {key: "none: features" if value is None else value for key, value in about.items()}
        say_pairs(shown, width=11)
        return
    rows = [
        (
            *(row.name, row.hub, row.licence, str(row.image_size)),
            "features" if row.top1 is None else f"{row.top1:.2f} %",
        )
        for row in pretrained
    ]
    show_table(("name", "hub id", "licence", "pixels", "top-1"), rows, whole=("name", "licence"))
    say("top-1 on ImageNet, measured by timm; --init, evaluate and predict take the name")


def show_recipes(recipes: Sequence[Recipe], cost: Callable[[Recipe], str], *, detail: bool) -> None:
    """The recipes; in `detail` the first of them alone, with its settings."""
    if detail:
        row = recipes[0]
        about = {key: getattr(row, key) for key in ("title", "source", "expected")}
        say_pairs(about | {"cost": cost(row), "command": row.command}, width=9)
        out.print_json(data=row.settings)
    else:
        show_table(("recipe", "what", "source"), [(r.name, r.title, r.source) for r in recipes])


def show_machine(machine: dict[str, Any]) -> None:
    """What `doctor` found."""
    table = Table(show_header=False)
    for key, value in machine.items():
        if isinstance(value, dict):
            value = "\n".join(f"{name}: {state}" for name, state in value.items())
        elif isinstance(value, list):
            value = "\n".join(f"{row['name']}, {row['memory_gib']} GiB" for row in value)
        table.add_row(key.replace("_gib", " (GiB)").replace("_", " "), str(value or "none"))
    out.print(table)
