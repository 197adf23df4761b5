"""`MODEL_CARD.md`: the model card of a run, in the format of the Hugging Face hub.

YAML front matter with the measured figures, then Markdown. It states what the run directory
records and what was measured, and nothing else; what nobody recorded it says is not stated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from patchword.report import words
from patchword.report.blocks import Block, Code, Items, Pairs, Table, Text
from patchword.report.record import RunRecord
from patchword.report.sections import Results, sections
from patchword.training.checkpoint import replace_text


def write_card(run: RunRecord, results: Results) -> Path:
    """Write `MODEL_CARD.md` into the run directory and return its path."""
    body = [f"# {markdown(run.title)}"]
    for section in sections(run, results):
        if section.card:
            body += [f"## {section.title}", *map(_block, section.blocks)]
    text = f"---\n{_yaml(_front_matter(run, results))}\n---\n\n" + "\n\n".join(body) + "\n"
    path = run.path / "MODEL_CARD.md"
    replace_text(path, text.encode("utf-8", "replace").decode())
    return path


def _front_matter(run: RunRecord, results: Results) -> dict[str, Any]:
    result = results.result
    task, learned = "image-feature-extraction", ["self-supervised", run.objective]
    if result is not None:
        task, learned = "image-classification", ["image-classification"]
    matter = {
        "library_name": "patchword",
        "pipeline_tag": task,
        "tags": [words.family(run.model).lower().replace(" ", "-"), *learned, "pytorch"],
        **({"datasets": [run.data_name]} if run.from_hub else {}),
    }
    if result is None:
        return matter
    measured = {
        "task": {"type": task, "name": "Image classification"},
        "dataset": {
            "name": run.data_name,
            "type": run.data_name if run.from_hub else "local",
            "split": results.split,
        },
        "metrics": [
            {"type": figure.metric, "name": figure.name, "value": value}
            for figure, value in words.figures_of(result)
        ],
    }
    index = [{"name": run.title, "results": [measured]}]
    return matter | {"metrics": ["accuracy"], "model-index": index}


def _block(block: Block) -> str:
    """A block of text; pictures are on the page alone."""
    match block:
        case Text():
            return markdown(block.text)
        case Items():
            return "\n".join(f"- {markdown(item)}" for item in block.items)
        case Code():
            lines = [" ".join(line.splitlines()).replace("```", "` ` `") for line in block.lines]
            return "\n".join([f"```{block.language}", *lines, "```"])
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


def _yaml(value: Mapping[str, Any] | Sequence[Any], indent: int = 0) -> str:
    """Block YAML of nested dicts, lists, strings and numbers; every string in double quotes."""
    pad = "  " * indent
    if isinstance(value, Mapping):
        return "\n".join(
            f"{pad}{key}:\n{_yaml(item, indent + 1)}"
            if isinstance(item, (Mapping, list))
            else f"{pad}{key}: {_scalar(item)}"
            for key, item in value.items()
        )
    return "\n".join(
        f"{pad}- {_yaml(item, indent + 1).lstrip() if isinstance(item, Mapping) else _scalar(item)}"
        for item in value
    )


def _scalar(value: str | float) -> str:
    """A number, or a double-quoted string; whatever YAML forbids or folds is escaped."""
    if not isinstance(value, str):
        return f"{value:.6f}"
    text = value.encode("utf-8", "replace").decode().replace("\\", "\\\\").replace('"', '\\"')
    special = r"[\x00-\x1f\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff]"
    return '"' + re.sub(special, lambda found: f"\\U{ord(found[0]):08x}", text) + '"'
