"""The report's sections on what the run did: curves, insights, cost, configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

import numpy as np

from patchword.inspection.figures.drawing import BLUE, GREEN, VERMILLION, encode
from patchword.inspection.figures.run import Series, draw_curves
from patchword.report import record as facts
from patchword.report.markup import data_uri, pairs, picture
from patchword.report.record import RunFacts


def runs(run: RunFacts) -> str:
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


def curves(run: RunFacts) -> str:
    best = run.number("best_step")
    mark = None if best is None else (best, f"best, step {best:,.0f}")
    loss = [series("training", run.metrics, "loss", smooth=True)]
    accuracy: list[Series | None] = []
    for kind, colour in (("raw", VERMILLION), ("average", GREEN)):
        rows = [row for row in run.evaluations if row.get("weights", "raw") == kind]
        name = f"validation, {kind} weights"
        loss.append(series(name, rows, "loss", colour))
        accuracy.append(series(name, rows, "top1", colour))
    rate = [series("learning rate", run.metrics, "lr")]
    plots = [
        plot(loss, "Loss", "loss per image", mark=mark),
        plot(accuracy, "Validation accuracy", "top-1 accuracy", percent=True, mark=mark),
        plot(rate, "Learning rate", "learning rate"),
    ]
    if not any(plots):
        return ""
    remark = (
        "The training loss is that of the augmented images and of the training objective, so it "
        "may lie above the validation loss."
    )
    return f'<div class="plots">{"".join(plots)}<p class="muted">{remark}</p></div>'


def series(
    name: str,
    rows: Iterable[Mapping[str, object]],
    key: str,
    colour: str = BLUE,
    *,
    smooth: bool = False,
) -> Series | None:
    """A figure of log lines over their steps; None where no line has it."""
    points = [(facts.finite(row.get("step")), facts.finite(row.get(key))) for row in rows]
    kept = [(x, y) for x, y in points if x is not None and y is not None]
    if not kept:
        return None
    return Series(name, [x for x, _ in kept], [y for _, y in kept], colour, smooth)


def plot(
    lines: Sequence[Series | None],
    title: str,
    y_label: str,
    *,
    percent: bool = False,
    mark: tuple[float, str] | None = None,
) -> str:
    """The picture of curves of which one has two points at least; else empty."""
    drawn = [item for item in lines if item is not None]
    if len({x for item in drawn for x in item.x}) < 2:  # one step is no curve
        return ""
    png = encode(draw_curves(drawn, title, y_label, percent=percent, mark=mark))
    last = "; ".join(
        f"{item.name} ends at "
        + (facts.percent(item.y[-1]) if percent else facts.plain(float(item.y[-1])))
        for item in drawn
    )
    return picture(png, f"{title} against the training step: {last}.")


def inspection(figures: Mapping[str, bytes]) -> str:
    shown = "".join(
        f'<figure><img class="paper" alt="{escape(title)}" src="{data_uri(png, "png")}"></figure>'
        for title, png in figures.items()
    )
    return f'<div class="plots">{shown}</div>' if shown else ""


def cost(run: RunFacts) -> str:
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
    table = pairs({name: value for name, value in rows.items() if value is not None})
    speed = series("images/s", run.metrics, "images_per_s")
    drawn = plot([speed], "Training speed", "images per second") if speed else ""
    return f'<div class="plots"><div>{table}</div>{drawn}</div>' if table or drawn else ""


def configuration(run: RunFacts) -> str:
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


def reproduce(run: RunFacts, command: str) -> str:
    shown = f"<pre><code>{escape(command)}</code></pre>" if command else ""
    environment = {key: facts.plain(value) for key, value in run.environment.items()}
    table = f"<h3>Environment</h3>{pairs(environment)}" if environment else ""
    return shown + table
