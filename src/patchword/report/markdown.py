"""`MODEL_CARD.md`: the model card of a run, in the format of the Hugging Face hub.

YAML front matter with the measured figures, then Markdown. It states what the run directory
records and what was measured, and nothing else; what nobody recorded it says is not stated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from patchword.report import words
from patchword.report.blocks import Block, Code, Items, Pairs, Table, Text
from patchword.report.family import family_of
from patchword.report.record import RunRecord
from patchword.report.sections import Results, sections
from patchword.training.checkpoint import replace_text


def write_card(run: RunRecord, results: Results) -> Path:
    """Write `MODEL_CARD.md` into the run directory and return its path."""
    body = [f"# {markdown(run.title)}"]
    for section in sections(run, results):
        if section.card:
            body += [f"## {section.title}", *map(_block, section.blocks)]
    lines = ["---", *_front_matter(run, results), "---", "", "\n\n".join(body), ""]
    path = run.path / "MODEL_CARD.md"
    replace_text(path, "\n".join(lines).encode("utf-8", "replace").decode())
    return path


def _front_matter(run: RunRecord, results: Results) -> list[str]:
    """What the hub reads: a few lines of YAML."""
    result, name = results.result, _quoted(run.data_name)
    task, learned = "image-feature-extraction", f"self-supervised, {_quoted(run.objective)}"
    if result is not None:
        task = learned = "image-classification"
    tags = ", ".join((*family_of(run.model).tags, learned, "pytorch"))
    lines = ["library_name: patchword", f"pipeline_tag: {task}"]
    lines.append(f"tags: [{tags}]")
    if run.from_hub:
        lines.append(f"datasets: [{name}]")
    if result is None:
        return lines
    kind, split = name if run.from_hub else "local", _quoted(results.split)
    return [
        *lines,
        "metrics: [accuracy]",
        "model-index:",
        f"- name: {_quoted(run.title)}",
        "  results:",
        "  - task: {type: image-classification, name: Image classification}",
        f"    dataset: {{name: {name}, type: {kind}, split: {split}}}",
        "    metrics:",
        *(
            f"    - {{type: {figure.metric}, name: {figure.name}, value: {value:.6f}}}"
            for figure, value in words.figures_of(result)
        ),
    ]


def _quoted(text: str) -> str:
    """A string in YAML; whatever that forbids or folds is escaped."""
    text = text.encode("utf-8", "replace").decode().replace("\\", "\\\\").replace('"', '\\"')
    special = r"[\x00-\x1f\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff]"
    return '"' + re.sub(special, lambda found: f"\\U{ord(found[0]):08x}", text) + '"'


def _block(block: Block) -> str:
    """A block of text; pictures are on the page alone."""
    match block:
        case Text():
            return markdown(block.text)
        case Items():
            return "\n".join(f"- {markdown(item)}" for item in block.items)
        case Code():
            text = block.text.replace("```", "` ` `")
            return f"```{block.language}\n{text}\n```"
        case Pairs():
            return _table({block.first: "", "Value": ""}, block.rows.items())
        case Table():
            return _table(block.columns, block.rows)
        case _:
            raise TypeError(f"a model card shows no {type(block).__name__}")


def _table(columns: Mapping[str, str], rows: Iterable[Sequence[str | float | None]]) -> str:
    rule = ["---:" if kind in ("number", "meter") else "---" for kind in columns.values()]
    shown = [
        [markdown(c) if isinstance(c, str) else words.percent(c, 1) for c in row] for row in rows
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *shown))


def markdown(text: str) -> str:
    """`text` as Markdown that shows it as it is, on one line and safe within a table."""
    line = " ".join(text.split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#$!])", r"\\\1", line)
