"""The report of a self-supervised run: how far it came, what it predicts, what to do with it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from patchword.inspection.figures.drawing import BLUE, GREEN, ORANGE, VERMILLION
from patchword.inspection.figures.run import Series
from patchword.report import record as facts
from patchword.report import run as of_run
from patchword.report import write_page
from patchword.report.markup import data_uri, listed
from patchword.report.record import RunFacts

LOSSES = {
    "mae": "squared error of a pixel of the masked patches, normalised by patch",
    "mean": "cross-entropy of the mean colour of a corrupted patch, 512 classes in RGB",
    "4x4": "cross-entropy of one of 16 colours of a corrupted patch, 512 classes in RGB",
    "pixels": "squared error of a normalised pixel of the corrupted patches",
}
PROBES = {"knn": "10 nearest neighbours", "linear": "logistic regression"}


def write_pretraining_report(
    run: Path,
    *,
    pictures: bytes | None = None,
    figures: Mapping[str, bytes] | None = None,
    reproduce: str = "",
) -> Path:
    """Write `report.html` into the directory of a run that learned no labels, and return its path.

    `pictures` is a PNG of images as the model predicts them, `figures` are PNGs by title of what is
    inside it, `reproduce` the command line that repeats the run. Raises `PatchwordError` if `run`
    is not a run directory.
    """
    about = facts.read_run(run)
    said = facts.pretraining_notes(about)
    sections = [
        ("curves", "Training", _curves(about)),
        ("predictions", "Predictions", _predictions(about, pictures)),
        ("inspection", "Inside the model", of_run.inspection(figures or {})),
        ("next", "What to do with the weights", _next(about)),
        ("cost", "Speed and cost", of_run.cost(about)),
        ("configuration", "Configuration", of_run.configuration(about)),
        ("reproduce", "Reproduce", of_run.reproduce(about, reproduce)),
        ("notes", "Notes", listed(said)),
    ]
    return write_page(about, _headline(about, len(said)), sections)


def _headline(run: RunFacts, notes: int) -> str:
    linear, n = run.number("linear"), run.number("n")
    value, what = run.given("loss", lambda loss: f"{loss:.4f}") or "\u2013", "Loss on val"
    if linear is not None:
        value, what = facts.percent(linear), "Top-1 of a linear probe on frozen features"
    use = "" if linear is None else "; they measured progress and chose these weights"
    on = f" on {escape(facts.part('val', int(n)))}" if n and linear is None else ""
    weights = f" Weights: {escape(run.weights())}." if run.weights() else ""
    pill = f'<a class="pill" href="#notes">{facts.count(notes, "note")}</a>' if notes else ""
    tiles = {
        "Objective": escape(run.objective),
        "Patches masked": facts.percent(run.mask_rate, 0) if run.mask_rate else None,
        "Nearest neighbours": run.given("knn", facts.percent),
        "Loss on val": run.given("loss", lambda loss: f"{loss:.4f}"),
        "Parameters": run.given("parameters", facts.whole),
        "Images seen": run.given("images", facts.whole),
        "Training time": run.given("seconds", facts.duration),
    }
    shown = "".join(
        f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles.items() if value
    )
    return f"""<div class="hero">
<div class="figure-number">{value}</div>
<div class="said"><p><strong>{what}{on}</strong></p>
<p class="muted">Trained without labels{use}.{weights}</p>{pill}</div>
</div>
<dl class="tiles">{shown}</dl>"""


def _curves(run: RunFacts) -> str:
    best = run.number("best_step")
    mark = None if best is None else (best, f"best, step {best:,.0f}")
    loss = [of_run.series("training", run.metrics, "loss", smooth=True)]
    probes: list[Series | None] = []
    colours = {"raw": (VERMILLION, ORANGE), "average": (GREEN, BLUE)}
    for kind, pair in colours.items():
        rows = [row for row in run.evaluations if row.get("weights", "raw") == kind]
        loss.append(of_run.series(f"validation, {kind} weights", rows, "loss", pair[0]))
        for (key, name), colour in zip(PROBES.items(), pair, strict=True):
            probes.append(of_run.series(f"{name}, {kind} weights", rows, key, colour))
    rate = [of_run.series("learning rate", run.metrics, "lr")]
    plots = [
        of_run.plot(loss, "Loss", "loss", mark=mark),
        of_run.plot(probes, "Frozen features", "top-1 accuracy", percent=True, mark=mark),
        of_run.plot(rate, "Learning rate", "learning rate"),
    ]
    if not any(plots):
        return ""
    remark = f"Loss: {LOSSES.get(run.predicts, '')}. On val the same patches are masked each time."
    return f'<div class="plots">{"".join(plots)}<p class="muted">{escape(remark)}</p></div>'


def _predictions(run: RunFacts, pictures: bytes | None) -> str:
    if pictures is None:
        return ""
    remark = {
        "mae": "Visible patches are shown as they were. Each predicted patch has the mean and the "
        "contrast of the true one, which the objective leaves out.",
        "pixels": "Of the corrupted patches most are grey, [mask]; some are replaced by other "
        "patches of the image, some are left as they were. All of them are predicted.",
    }
    colours = "The most probable of 512 colours is shown."
    said = remark.get(run.predicts) or f"{remark['pixels']} {colours}"
    hint = "Images, what the model saw of them, and what it predicts."
    drawn = f'<img class="paper" alt="{hint}" src="{data_uri(pictures, "png")}">'
    return f"<figure>{drawn}<figcaption>{escape(said)}</figcaption></figure>"


def _next(run: RunFacts) -> str:
    commands = "\n".join(facts.pretraining_commands(run))
    return (
        "<p>The run holds a plain model without a head: fine-tune it on labels, or measure its "
        f"features.</p><pre><code>{escape(commands)}</code></pre>"
    )
