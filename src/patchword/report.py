"""`report.html`: what a run did and how well, in one self-contained file.

The file names no other: style and images are inside it, it has no script, and its content security
policy forbids the browser to load anything.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from patchword import facts
from patchword.evaluation.classify import Classification
from patchword.facts import RunFacts
from patchword.inspection.figures import (
    BLUE,
    GREEN,
    VERMILLION,
    Series,
    draw_confusion,
    draw_curves,
    draw_reliability,
)
from patchword.training.checkpoint import replace_text

THUMBNAIL = 160
"""Longest side of a thumbnail in the report, pixels."""


@dataclass(frozen=True)
class Mistake:
    """A wrongly classified image."""

    key: str
    """what the source calls it, such as its path"""
    label: str
    predicted: str
    probability: float
    """of the predicted class"""
    thumbnail: Image.Image


def write_report(
    run: Path,
    *,
    result: Classification,
    split: str,
    mistakes: Sequence[Mistake] = (),
    figures: Mapping[str, bytes] | None = None,
    reproduce: str = "",
) -> Path:
    """Write `report.html` into the run directory and return its path.

    `split` names what `result` was measured on: test, val, train, all, or a name of the user's.
    `figures` are PNGs by title, shown as what the model has learned; `reproduce` is the command
    line that repeats the run. Raises `PatchwordError` if `run` is not a run directory.
    """
    about = facts.read_run(run)
    said = facts.notes(about, result, split)
    sections = [
        ("runs", "Learning rates and runs", _runs(about)),
        ("curves", "Training", _curves(about)),
        ("classes", "Classes", _classes(result)),
        ("confusion", "Confusion", _confusion(result)),
        ("mistakes", "Mistakes", _mistakes(result, mistakes)),
        ("calibration", "Calibration", _calibration(result)),
        ("inspection", "Inside the model", _inspection(figures or {})),
        ("cost", "Speed and cost", _cost(about)),
        ("configuration", "Configuration", _configuration(about)),
        ("reproduce", "Reproduce", _reproduce(about, reproduce)),
        ("notes", "Notes", _list(said)),
    ]
    page = _page(about, result, split, len(said), [s for s in sections if s[2]])
    path = run / "report.html"
    replace_text(path, page.encode("utf-8", "replace").decode())
    return path


def _page(
    run: RunFacts,
    result: Classification,
    split: str,
    warnings: int,
    sections: Sequence[tuple[str, str, str]],
) -> str:
    style = resources.files("patchword").joinpath("report.css").read_text(encoding="utf-8")
    title = f"{run.model} on {run.data_name}"
    links = "".join(f'<li><a href="#{key}">{name}</a></li>' for key, name, _ in sections)
    body = "\n".join(
        f'<section id="{key}"{" class=notes" if key == "notes" else ""} '
        f'aria-labelledby="{key}-title">\n<h2 id="{key}-title">{name}</h2>\n{content}\n</section>'
        for key, name, content in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'">
<title>{escape(title)}: patchword report</title>
<style>
{style}</style>
</head>
<body>
<header>
<p class="eyebrow">patchword report</p>
<h1>{escape(title)}</h1>
{_headline(run, result, split, warnings)}
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
<footer><p>Run directory: {escape(run.path.name)}. Fractions of images are given in percent; \
intervals are Wilson's at 95 %.</p></footer>
</body>
</html>
"""


def _headline(run: RunFacts, result: Classification, split: str, warnings: int) -> str:
    low, high = facts.wilson(round(result.top1 * result.n), result.n)
    weights = f" Weights: {escape(run.weights())}." if run.weights() else ""
    pill = ""
    if warnings:
        pill = f'<a class="pill" href="#notes">{facts.count(warnings, "note")} on this result</a>'
    tiles = {
        "Top-5 accuracy": facts.percent(result.top5) if len(result.per_class) > 5 else None,
        "Balanced accuracy": facts.percent(result.balanced),
        "Loss": f"{result.loss:.4f}",
        "Calibration error": facts.percent(result.ece),
        "Brier score": f"{result.brier:.4f}",
        "Classes": f"{len(result.per_class):,}",
        "Parameters": run.given("parameters", facts.whole),
        "Training time": run.given("seconds", facts.duration),
    }
    shown = "".join(
        f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles.items() if value
    )
    return f"""<div class="hero">
<div class="figure-number">{facts.percent(result.top1)}</div>
<div class="said"><p><strong>Top-1 accuracy on {escape(facts.part(split, result.n))}</strong></p>
<p class="muted">95 % confidence interval {facts.percent(low)} to {facts.percent(high)}.\
{weights}</p>{pill}</div>
</div>
<dl class="tiles">{shown}</dl>"""


def _runs(run: RunFacts) -> str:
    """The table of a sweep or of repeated runs; empty for a single run."""
    rows = facts.sweep_rows(run.summary.get("sweep"))
    if not rows:
        return ""
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="number">{escape(top1)}</td>'
        f"<td>{escape(note)}</td></tr>"
        for name, top1, note in rows
    )
    return (
        "<p class=muted>The learning rate is chosen on held-out images, the runs after that are "
        "measured. The weights here, and the figures above and below, are those of run-0.</p>"
        '<table><thead><tr><th scope="col">Run</th><th scope="col" class="number">Top-1</th>'
        f'<th scope="col">Measured on</th></tr></thead><tbody>{body}</tbody></table>'
    )


def _curves(run: RunFacts) -> str:
    best = run.number("best_step")
    mark = None if best is None else (best, f"best, step {best:,.0f}")
    loss = [_series("training", run.metrics, "loss", smooth=True)]
    accuracy: list[Series | None] = []
    for kind, colour in (("raw", VERMILLION), ("average", GREEN)):
        rows = [row for row in run.evaluations if row.get("weights", "raw") == kind]
        name = f"validation, {kind} weights"
        loss.append(_series(name, rows, "loss", colour))
        accuracy.append(_series(name, rows, "top1", colour))
    rate = [_series("learning rate", run.metrics, "lr")]
    plots = [
        _plot(loss, "Loss", "loss per image", mark=mark),
        _plot(accuracy, "Validation accuracy", "top-1 accuracy", percent=True, mark=mark),
        _plot(rate, "Learning rate", "learning rate"),
    ]
    if not any(plots):
        return ""
    remark = (
        "The training loss is that of the augmented images and of the training objective, so it "
        "may lie above the validation loss."
    )
    return f'<div class="plots">{"".join(plots)}<p class="muted">{remark}</p></div>'


def _series(
    name: str,
    rows: Iterable[Mapping[str, object]],
    key: str,
    colour: str = BLUE,
    *,
    smooth: bool = False,
) -> Series | None:
    points = [(facts.finite(row.get("step")), facts.finite(row.get(key))) for row in rows]
    kept = [(x, y) for x, y in points if x is not None and y is not None]
    if not kept:
        return None
    return Series(name, [x for x, _ in kept], [y for _, y in kept], colour, smooth)


def _plot(
    series: Sequence[Series | None],
    title: str,
    y_label: str,
    *,
    percent: bool = False,
    mark: tuple[float, str] | None = None,
) -> str:
    drawn = [item for item in series if item is not None]
    if len({x for item in drawn for x in item.x}) < 2:  # one step is no curve
        return ""
    png = draw_curves(drawn, title, y_label, percent=percent, mark=mark)
    last = "; ".join(
        f"{item.name} ends at "
        + (facts.percent(item.y[-1]) if percent else facts.plain(float(item.y[-1])))
        for item in drawn
    )
    return _picture(png, f"{title} against the training step: {last}.")


def _classes(result: Classification) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="number">{row["n"]:,}</td>'
        f"{_meter(row['recall'])}{_meter(row['precision'])}</tr>"
        for name, row in facts.worst_first(result)
    )
    return (
        "<p class=muted>Lowest recall first. Recall: the share of a class's images that were "
        "recognised. Precision: the share of the images given this class that belong to it.</p>"
        + _scroll(
            "Figures of each class",
            '<table><thead><tr><th scope="col">Class</th><th scope="col" class="number">Images</th>'
            '<th scope="col">Recall</th><th scope="col">Precision</th></tr></thead>'
            f"<tbody>{rows}</tbody></table>",
        )
    )


def _meter(fraction: float | None) -> str:
    if fraction is None:
        return '<td class="meter">\u2013</td>'
    return (
        f'<td class="meter"><span class="bar"><i style="width:{100 * fraction:.1f}%"></i></span>'
        f"{facts.percent(fraction, 1)}</td>"
    )


def _confusion(result: Classification) -> str:
    matrix, names = result.confusion(), list(result.per_class)
    off = matrix.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:12]
    rows = ""
    for true, given in zip(*np.unravel_index(order, off.shape), strict=True):
        number = int(off[true, given])
        if number:
            share = number / int(matrix[true].sum())
            rows += (
                f'<tr><th scope="row">{escape(names[true])}</th>'
                f'<td class="name">{escape(names[given])}</td>'
                f'<td class="number">{number:,}</td>'
                f'<td class="number extra">{facts.percent(share, 1)}</td></tr>'
            )
    hint = f"Confusion matrix of {len(names)} classes: rows true, columns predicted."
    picture = _picture(draw_confusion(matrix, names), hint)
    if not rows:
        return f"{picture}\n<p class=muted>No image was confused with another class.</p>"
    return (
        f"<div{' class=beside' if len(names) <= 12 else ''}>{picture}"
        "<div><h3>Most frequent confusions</h3>"
        '<table><thead><tr><th scope="col">True</th><th scope="col">Predicted</th>'
        '<th scope="col" class="number">Images</th>'
        '<th scope="col" class="number extra">Of class</th>'
        f"</tr></thead><tbody>{rows}</tbody></table></div></div>"
    )


def _mistakes(result: Classification, mistakes: Sequence[Mistake]) -> str:
    wrong = int((result.labels != result.predicted).sum())
    if not wrong:
        return f"<p>None: all {facts.count(result.n, 'image')} were classified rightly.</p>"
    share = f"{facts.count(wrong, 'mistake')} in {facts.count(result.n, 'image')}"
    if not mistakes:
        return f"<p>{share}.</p>"
    items = "".join(_mistake(mistake) for mistake in mistakes)
    return (
        f"<p class=muted>{share}. Here are the {len(mistakes):,} in which the model was surest "
        "of its wrong answer: look for wrong labels and for what it has overlooked.</p>"
        f'<ul class="mistakes">{items}</ul>'
    )


def _mistake(mistake: Mistake) -> str:
    picture = mistake.thumbnail.convert("RGB")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    tiny = max(picture.size) <= 64
    picture.save(stream, "PNG" if tiny else "JPEG", **({} if tiny else {"quality": 85}))
    sure = facts.percent(mistake.probability, 1)
    hint = f"{mistake.key}: {mistake.label}, taken for {mistake.predicted}"
    return (
        f'<li><img{" class=tiny" if tiny else ""} alt="{escape(hint)}" '
        f'src="{_data_uri(stream.getvalue(), "png" if tiny else "jpeg")}">'
        f"<dl><div><dt>true</dt><dd>{escape(mistake.label)}</dd></div>"
        f"<div><dt>said</dt><dd>{escape(mistake.predicted)}</dd></div>"
        f"<div><dt>sure</dt><dd>{sure}</dd></div></dl>"
        f'<span class="key">{escape(mistake.key)}</span></li>'
    )


def _calibration(result: Classification) -> str:
    diagram = result.reliability()
    sure = float(result.confidence.mean(dtype=np.float64))
    gap = sure - result.top1
    lean = "more sure than right" if gap > 0 else "less sure than right"
    hint = f"Reliability diagram; expected calibration error {facts.percent(result.ece)}."
    return (
        f'<div class="beside">{_picture(draw_reliability(*diagram, result.ece), hint)}'
        "<div><p>Of the images the model is 80 % sure of, 80 % should be right. The expected "
        f"calibration error, the mean distance from that over {len(diagram[-1])} equal bins of "
        f"confidence, is <strong>{facts.percent(result.ece)}</strong>.</p>"
        f"<p>Mean confidence is {facts.percent(sure)}, accuracy {facts.percent(result.top1)}: the "
        f"model is {lean} by {facts.percent(abs(gap))}.</p></div></div>"
    )


def _inspection(figures: Mapping[str, bytes]) -> str:
    shown = "".join(
        f'<figure><img class="paper" alt="{escape(title)}" src="{_data_uri(png, "png")}"></figure>'
        for title, png in figures.items()
    )
    return f'<div class="plots">{shown}</div>' if shown else ""


def _cost(run: RunFacts) -> str:
    waits = [facts.finite(row.get("data_wait")) for row in run.metrics]
    shares = [value for value in waits if value is not None and 0 <= value <= 1]
    rows = {
        "Training time": run.given("seconds", facts.duration),
        "Steps": run.given("steps", facts.whole),
        "Training speed": run.given("images_per_second", facts.rate),
        "Evaluation speed": run.given("evaluate_images_per_second", facts.rate),
        "Waiting for data": facts.percent(float(np.mean(shares)), 1) if shares else None,
        "Parameters": run.given("parameters", facts.whole),
        "Multiply-adds per image": run.given("gmacs", facts.multiply_adds),
        "Training cost": run.given("exaflops", facts.operations),
    }
    table = _pairs({name: value for name, value in rows.items() if value is not None})
    speed = _series("images/s", run.metrics, "images_per_s")
    plot = _plot([speed], "Training speed", "images per second") if speed else ""
    return f'<div class="plots"><div>{table}</div>{plot}</div>' if table or plot else ""


def _configuration(run: RunFacts) -> str:
    groups: dict[str, str] = {}
    for group, name, value, default, changed in facts.settings(run.config):
        aside = f'<span class="default">default {escape(facts.plain(default))}</span>'
        groups[group] = groups.get(group, "") + (
            f'<tr{" class=changed" if changed else ""}><th scope="row">{escape(name)}</th>'
            f"<td>{escape(facts.plain(value))}{aside if changed else ''}</td></tr>"
        )
    tables = "".join(
        f"<div><h3>{escape(group) or 'run'}</h3>"
        f'<table class="pairs"><tbody>{rows}</tbody></table></div>'
        for group, rows in groups.items()
    )
    return (
        "<p class=muted>Everything as it was resolved when the run began. Bold: not the default, "
        f'which is given below it.</p><div class="groups">{tables}</div>'
    )


def _reproduce(run: RunFacts, command: str) -> str:
    shown = f"<pre><code>{escape(command)}</code></pre>" if command else ""
    environment = {key: facts.plain(value) for key, value in run.environment.items()}
    table = f"<h3>Environment</h3>{_pairs(environment)}" if environment else ""
    return shown + table


def _pairs(rows: Mapping[str, str]) -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in rows.items()
    )
    return f'<table class="pairs"><tbody>{body}</tbody></table>' if body else ""


def _list(items: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>" if items else ""


def _scroll(label: str, content: str) -> str:
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{content}</div>'


def _picture(png: bytes, hint: str) -> str:
    return (
        f'<figure><img class="chart" alt="{escape(hint)}" src="{_data_uri(png, "png")}"></figure>'
    )


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
