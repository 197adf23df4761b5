"""`report.html`: what a run did and how well, in one self-contained file.

The file names no other: style and images are inside it, it has no script, and its content security
policy forbids the browser to load anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from patchword.evaluation.classify import Classification
from patchword.report import record as facts
from patchword.report import result as of_result
from patchword.report import run as of_run
from patchword.report.markup import listed
from patchword.report.record import RunFacts
from patchword.report.result import THUMBNAIL, Mistake
from patchword.training.checkpoint import replace_text

__all__ = ["THUMBNAIL", "Mistake", "write_page", "write_report"]


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
        ("runs", "Learning rates and runs", of_run.runs(about)),
        ("curves", "Training", of_run.curves(about)),
        ("classes", "Classes", of_result.classes(result)),
        ("confusion", "Confusion", of_result.confusion(result)),
        ("mistakes", "Mistakes", of_result.mistakes(result, mistakes)),
        ("calibration", "Calibration", of_result.calibration(result)),
        ("inspection", "Inside the model", of_run.inspection(figures or {})),
        ("cost", "Speed and cost", of_run.cost(about)),
        ("configuration", "Configuration", of_run.configuration(about)),
        ("reproduce", "Reproduce", of_run.reproduce(about, reproduce)),
        ("notes", "Notes", listed(said)),
    ]
    return write_page(about, _headline(about, result, split, len(said)), sections)


def write_page(run: RunFacts, headline: str, sections: Sequence[tuple[str, str, str]]) -> Path:
    """Write `report.html` from a headline and sections (anchor, title, content), all in HTML, of
    which those without content are left out."""
    page = _page(run, headline, [section for section in sections if section[2]])
    path = run.path / "report.html"
    replace_text(path, page.encode("utf-8", "replace").decode())
    return path


def _page(run: RunFacts, headline: str, sections: Sequence[tuple[str, str, str]]) -> str:
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
{headline}
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
