"""What the commands print: results to standard output, everything else to standard error."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table

if TYPE_CHECKING:
    from patchword.commands.calibrating import Calibrated
    from patchword.commands.checking import Checked
    from patchword.commands.explaining import Explanations
    from patchword.commands.listing import Variant
    from patchword.commands.probing import Probing
    from patchword.evaluation.classify import Classification
    from patchword.models.summary import LayerRow
    from patchword.run.sweep import SweepResult
    from patchword.session.measuring import Prediction
    from patchword.training.recipes import Recipe
    from patchword.weights.pretrained import Pretrained

err = Console(stderr=True, markup=False, emoji=False)  # names are shown as they are
out = Console(markup=False, emoji=False)


def table_of(*names: str, whole: Sequence[str] = ()) -> Table:
    """A table that breaks what is too long for its column, but for those in `whole`, and cuts
    nothing off."""
    return Table(*(Column(name, overflow="fold", no_wrap=name in whole) for name in names))


def percent(share: float | None) -> str:
    """A share as `12.3 %`, `-` for none."""
    return "-" if share is None else f"{100 * share:.1f} %"


def show_run(run: Path, summary: dict[str, Any]) -> None:
    """What a run reached, and where it is."""
    weights = f"{run} ({summary['best_weights']} weights of step {summary['best_step']:,})"
    if "objective" in summary:
        lines = {"result": _learned(summary), "weights": weights}
        lines |= {"report": str(run / "report.html"), "next": summary["next"][0]}
    else:
        lines = {"result": _classified(summary), "weights": weights}
        lines |= {"report": str(run / "report.html")}
    for name, value in lines.items():
        out.print(f"{name:8}{value}", highlight=False, soft_wrap=True)


def _learned(summary: dict[str, Any]) -> str:
    """What a run without labels reached."""
    if summary["split"] is None:
        return "no image was held out to measure on"
    shown = [f"loss {summary['loss']:.4f}"]
    names = {"knn": "nearest neighbours", "linear": "logistic regression"}
    shown += [f"{name} {percent(summary[key])}" for key, name in names.items() if key in summary]
    return f"{', '.join(shown)} on {summary['n']:,} {summary['split']} images"


def _classified(summary: dict[str, Any]) -> str:
    """What a classifier reached."""
    figures = {
        "top-1": "top1",
        "top-5": "top5",
        "balanced accuracy": "balanced",
        "calibration error": "ece",
    }
    shown = [f"{n} {100 * summary[key]:.2f} %" for n, key in figures.items() if key in summary]
    return f"{', '.join(shown)} on {summary['n']:,} {summary['split']} images"


def show_sweep(done: SweepResult, rows: Sequence[Sequence[str]]) -> None:
    """The learning rates, the runs, and where they are."""
    table = table_of("run", "top-1", "measured on")
    for row in rows:
        table.add_row(*row)
    out.print(table)
    for name, value in {"weights": done.run, "report": done.run / "report.html"}.items():
        out.print(f"{name:8}{value}", highlight=False, soft_wrap=True)


def show_classification(result: Classification) -> None:
    """The figures of an evaluation, then each class's."""
    table = table_of("images", "top-1", "top-5", "balanced", "loss", "calibration error", "Brier")
    table.add_row(
        f"{result.n:,}",
        *(f"{100 * share:.2f} %" for share in (result.top1, result.top5, result.balanced)),
        f"{result.loss:.4f}",
        f"{100 * result.ece:.2f} %",
        f"{result.brier:.4f}",
    )
    out.print(table)
    classes = table_of("class", "images", "recall", "precision")
    for name, row in result.per_class.items():
        if row["n"]:
            classes.add_row(name, str(row["n"]), percent(row["recall"]), percent(row["precision"]))
    out.print(classes)


def show_probes(done: Probing) -> None:
    """A row for each probe."""
    table = table_of("probe", "", "top-1", "over seeds", whole=("probe",))
    for shots, row in (done.fewshot or {}).items():
        table.add_row("few-shot", f"{shots} a class", percent(row.mean), f"± {percent(row.std)}")
    for count, share in (done.knn or {}).items():
        table.add_row("nearest neighbours", f"k {count}", percent(share), "")
    if done.logistic_probe is not None:
        regulariser = f"l2 {done.logistic_probe.l2:.0e}"
        table.add_row("logistic regression", regulariser, percent(done.logistic), "")
    out.print(table)


def show_predictions(found: Sequence[Prediction]) -> None:
    """Images with their likeliest classes."""
    table = table_of("image", "label", "probability", "then")
    for prediction in found:
        rest = prediction.top if prediction.label is None else prediction.top[1:]
        then = ", ".join(f"{label} {100 * p:.1f} %" for label, p in rest)
        label = "uncertain" if prediction.label is None else prediction.label
        table.add_row(prediction.path, label, f"{100 * prediction.probability:.1f} %", then)
    out.print(table)


def write_csv(found: Sequence[Prediction], may_abstain: bool) -> None:
    """The table as comma-separated values; where the model may abstain, with what it settled on."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    ranks = range(1, 1 + max(len(p.top) for p in found))
    settled = ["label", "abstained"] if may_abstain else []
    names = (f"{what}{k}" for k in ranks for what in ("label", "probability"))
    writer.writerow(["path", *settled, *names])
    for p in found:
        said = [p.label, str(p.abstained).lower()] if may_abstain else []
        writer.writerow([p.path, *said, *(x for pair in p.top for x in pair)])


def show_inspection(folder: Path, summary: dict[str, Any]) -> None:
    """What each figure says, in numbers."""
    table = table_of("figure", "what it says", whole=("figure",))
    for name, say in _SAID.items():
        if name in summary:
            table.add_row(name, say(summary[name]))
    out.print(table)
    number = len(summary["files"])
    where = f"{files(number)} in {folder}, the numbers in {folder / 'summary.json'}"
    out.print(where, highlight=False, soft_wrap=True)


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
    same = percent(row["nearest_of_same_class"])
    return (
        f"{row['images']:,} images of {row['part']}: nearest neighbour of the same class {same}, "
        f"{len(row['mistakes']):,} mistakes by the {row['mistakes_by']}"
    )


def _said_pictures(row: dict[str, Any]) -> str:
    count = len(row["pictures"])
    return f"{count} picture{'s' * (count != 1)}"


_SAID: dict[str, Callable[[dict[str, Any]], str]] = {
    "filters": lambda row: (
        f"{len(row['explained'])} components explain {percent(row['total'])} of the variance"
    ),
    "position_similarity": _said_positions,
    "attention_distance": _said_distance,
    "rollout": _said_pictures,
    "attention": lambda row: f"{_said_pictures(row)}; query: {row['of']}",
    "tokens": _said_pictures,
    "embedding": _said_map,
}


def show_explanations(done: Explanations) -> None:
    """Each image's class, and what the maps are worth; the last row is the mean."""
    table = table_of("image", "map", "deletion", "insertion", whole=("map",))
    for row in done.images:
        found = row.explanation
        about = f"{row.path}\n{row.label} {percent(found.probability)}"
        _add_scores(table, about, found.agreement, found.scores)
    mean = done.mean()
    if len(done.images) > 1:
        scores = {name: (area, mean["insertion"][name]) for name, area in mean["deletion"].items()}
        _add_scores(table, f"mean of {len(done.images):,} images", mean["agreement"], scores)
    out.print(table)
    folders = {str(row.picture.parent) for row in done.images}
    lines = {
        "patches": f"taken away by {done.taken_away_by}",
        "scores": "areas under the curves, 0 to 1: deletion small, insertion large is good",
        "pictures": done.images[0].picture if len(done.images) == 1 else ", ".join(folders),
    }
    for name, value in lines.items():
        out.print(f"{name:9}{value}", highlight=False, soft_wrap=True)


def _add_scores(
    table: Table, about: str, agreement: float | None, scores: Mapping[str, tuple[float, float]]
) -> None:
    """The maps line by line, beside what goes for all of them."""
    if agreement is not None:
        about += f"\nagreement {agreement:.2f}"
    columns = zip(*((f"{a:.3f}", f"{b:.3f}") for a, b in scores.values()), strict=True)
    table.add_row(about, "\n".join(scores), *map("\n".join, columns), end_section=True)


def show_calibration(done: Calibrated) -> None:
    """Each part before and after."""
    table = table_of("images", "", "temperature", "top-1", "loss", "ECE", "Brier")
    for part in done.parts:
        temperatures = (1.0, done.calibration.temperature)
        for t, result in zip(temperatures, (part.before, part.after), strict=True):
            table.add_row(
                f"{result.n:,}",
                part.role,
                f"{t:.4g}",
                f"{100 * result.top1:.2f} %",
                f"{result.loss:.4f}",
                f"{100 * result.ece:.2f} %",
                f"{result.brier:.4f}",
            )
        table.add_section()
    out.print(table)
    stored = done.stored or "nowhere; --out FILE writes the calibrated model, --overwrite replaces"
    out.print(f"stored   {stored}", highlight=False, soft_wrap=True)


def files(count: int) -> str:
    """`1 file`, `2 files`."""
    return "1 file" if count == 1 else f"{count:,} files"


def show_check(done: Checked) -> None:
    """The findings with examples and advice, and a count."""
    if done.moved:
        moved = f"moved {files(len(done.moved))} to {done.aside}; --undo brings them back"
        out.print(moved, highlight=False, soft_wrap=True)
    if done.findings:
        table = table_of(
            "", "finding", "how many", "examples", "what to do", whole=("", "how many")
        )
        for finding in done.findings:
            examples = [" = ".join(item.names[:3]) for item in finding.items[:3]]
            about = [f" ({item.about})" if item.about else "" for item in finding.items]
            shown = "\n".join(a + b for a, b in zip(examples, about, strict=False))
            row = (finding.what, f"{finding.count:,}", shown, finding.advice)
            table.add_row(finding.severity, *row, end_section=True)
        out.print(table)
    counts = {kind: done.count(kind) for kind in ("error", "warning", "note")}
    named = [f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts.items() if count]
    found = f"found {', '.join(named)}" if named else "found nothing wrong"
    about = f"{done.images:,} images of {len(done.source.classes):,} classes: {found}"
    out.print(about, highlight=False, soft_wrap=True)


def show_variants(rows: Sequence[Variant]) -> None:
    """The named models, family by family."""
    columns = ("model", "family", "layers", "width", "MLP", "heads", "parameters", "GMACs")
    table = table_of(*columns, whole=("model", "family", "parameters", "GMACs"))
    for row, following in zip(rows, [*rows[1:], rows[-1]], strict=True):
        table.add_row(
            *(row.name, row.family, *row.cells),
            *(f"{row.parameters:,}", f"{row.macs / 1e9:.2f}"),
            end_section=row.family != following.family,
        )
    out.print(table)
    out.print("GMACs for one image of 224 x 224 pixels", highlight=False)


def show_layers(found: Variant, rows: Sequence[LayerRow]) -> None:
    """A model's layers, with a total."""
    columns = ("layer", "output", "parameters", "MACs", "activations (MiB)")
    table = table_of(*columns, whole=("layer", "parameters"))
    for row in rows:
        if row is rows[-1]:
            table.add_section()
        shape = " x ".join(map(str, row.shape))
        memory = f"{row.activation_bytes / 2**20:.2f}"
        table.add_row(row.name, shape, f"{row.parameters:,}", f"{row.macs:,}", memory)
    out.print(table)
    height, width = found.spec.image_size
    out.print(f"for one image of {height} x {width} pixels, in float32", highlight=False)


def show_pretrained(rows: Sequence[Pretrained], *, detail: bool) -> None:
    """Well-known weights; in `detail` the first of them alone."""
    if detail:
        for key, value in vars(rows[0]).items():
            shown = "none: features" if value is None else value
            out.print(f"{key.replace('_', ' '):11}{shown}", highlight=False, soft_wrap=True)
    else:
        columns = ("name", "hub id", "licence", "pixels", "top-1")
        table = table_of(*columns, whole=("name", "licence"))
        for row in rows:
            top1 = "features" if row.top1 is None else f"{row.top1:.2f} %"
            table.add_row(row.name, row.hub, row.licence, str(row.image_size), top1)
        out.print(table)
        about = "top-1 on ImageNet, measured by timm; --init, evaluate and predict take the name"
        out.print(about, highlight=False, soft_wrap=True)


def show_recipes(rows: Sequence[Recipe], cost: Callable[[Recipe], str], *, detail: bool) -> None:
    """The recipes; in `detail` the first of them alone, with its settings."""
    if detail:
        row = rows[0]
        about = {
            "title": row.title,
            "source": row.source,
            "expected": row.expected,
            "cost": cost(row),
            "command": row.command,
        }
        for key, value in about.items():
            out.print(f"{key:9}{value}", highlight=False, soft_wrap=True)
        out.print_json(data=row.settings)
    else:
        table = table_of("recipe", "what", "source")
        for row in rows:
            table.add_row(row.name, row.title, row.source)
        out.print(table)


def show_machine(found: dict[str, Any]) -> None:
    """What `doctor` found."""
    table = Table(show_header=False)
    for key, value in found.items():
        if isinstance(value, dict):
            value = "\n".join(f"{name}: {state}" for name, state in value.items())
        elif isinstance(value, list):
            value = "\n".join(f"{row['name']}, {row['memory_gib']} GiB" for row in value)
        table.add_row(key.replace("_gib", " (GiB)").replace("_", " "), str(value or "none"))
    out.print(table)
