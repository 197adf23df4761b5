"""`MODEL_CARD.md`: the model card of a run, in the format of the Hugging Face hub.

YAML front matter with the measured figures, then Markdown. It states what the run directory
records and what was measured, and nothing else; what nobody recorded it says is not stated.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patchword.evaluation.classify import Classification
from patchword.report import record as facts
from patchword.report.card.family import family_of
from patchword.report.record import RunFacts
from patchword.training.checkpoint import replace_text

LISTED = 30
"""Up to this many classes are all listed; of more, the ten with the lowest recall."""


def write_model_card(run: Path, *, result: Classification, split: str, reproduce: str = "") -> Path:
    """Write `MODEL_CARD.md` into the run directory and return its path.

    `split` names what `result` was measured on and `reproduce` is the command line that repeats the
    run, as for `write_report`. Raises `PatchwordError` if `run` is not a run directory.
    """
    about = facts.read_run(run)
    title = f"{about.model} on {about.data_name}"
    sections = [
        ("Model details", details(about, {"Classes": f"{len(result.per_class):,}"})),
        ("Intended use and limits", _limits(about, result, split)),
        ("Training data", training_data(about)),
        ("Training procedure", procedure(about, reproduce)),
        ("Evaluation", _evaluation(result, split)),
        ("Learning rates and runs", _runs(about)),
        ("How to use", _use(about)),
        ("Environment", table("Item", about.environment)),
        ("Citation", family_of(about.model).citation),
    ]
    return write_card(run, title, _front_matter(about, result, split, title), sections)


def write_card(
    run: Path, title: str, matter: Mapping[str, Any], sections: Sequence[tuple[str, str]]
) -> Path:
    """Write `MODEL_CARD.md` from front matter and sections (title, Markdown), of which those
    without text are left out."""
    body = "\n\n".join(f"## {name}\n\n{text}" for name, text in sections if text)
    text = f"---\n{_yaml(matter)}\n---\n\n# {markdown(title)}\n\n{body}\n"
    path = run / "MODEL_CARD.md"
    replace_text(path, text.encode("utf-8", "replace").decode())
    return path


def _front_matter(run: RunFacts, result: Classification, split: str, title: str) -> dict[str, Any]:
    metrics = [("accuracy", "Top-1 accuracy", result.top1)]
    if len(result.per_class) > 5:
        metrics.append(("accuracy", "Top-5 accuracy", result.top5))
    metrics.append(("accuracy", "Balanced accuracy", result.balanced))
    metrics.append(("loss", "Loss", result.loss))
    metrics.append(("ece", "Expected calibration error", result.ece))
    metrics.append(("brier", "Brier score", result.brier))
    hub = run.source.startswith("hub:")
    measured = {
        "task": {"type": "image-classification", "name": "Image classification"},
        "dataset": {
            "name": run.data_name,
            "type": run.data_name if hub else "local",
            "split": split,
        },
        "metrics": [{"type": t, "name": name, "value": value} for t, name, value in metrics],
    }
    return {
        "library_name": "patchword",
        "pipeline_tag": "image-classification",
        "tags": [*family_of(run.model).tags, "image-classification", "pytorch"],
        **({"datasets": [run.data_name]} if hub else {}),
        "metrics": ["accuracy"],
        "model-index": [{"name": title, "results": [measured]}],
    }


def details(run: RunFacts, more: Mapping[str, str]) -> str:
    """The table of what the model is."""
    rows = {
        "Architecture": f"{family_of(run.model).title}, {run.model}",
        "Input": _size(run.config.get("image_size")),
        **more,
        "Parameters": run.given("parameters", facts.whole),
        "Multiply-adds per image": run.given("gmacs", facts.multiply_adds),
        "Weights": run.weights() or None,
        "Licence": "not stated by the run: choose one before you share the model",
    }
    return table("Item", rows)


def _size(value: Any) -> str | None:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        return None
    return f"images, {value[0]} x {value[-1]} pixels (height x width)"


def _limits(run: RunFacts, result: Classification, split: str) -> str:
    names = list(result.per_class)
    use = (
        f"The model assigns an image to one of {facts.count(len(names), 'class', 'classes')}: "
        f"{_names(names)}. It gives one of them to any image, also to one that shows none of them. "
        "Its figures hold for images like those it was measured on; for others they are not known."
    )
    said = "".join(f"\n- {markdown(note)}" for note in facts.notes(run, result, split))
    return f"{use}\n{said}" if said else use


def training_data(run: RunFacts) -> str:
    """The table of the images it was trained on."""
    rows = {
        "Source": run.source or None,
        "Fingerprint": run.environment.get("data_fingerprint"),
        "Images that could not be read": run.given("bad_images", facts.whole),
        "Seed of the division and the order": run.config.get("seed"),
    }
    return table("Item", rows)


def procedure(run: RunFacts, reproduce: str) -> str:
    """How it was trained."""
    rows = {
        "Training time": run.given("seconds", facts.duration),
        "Training speed": run.given("images_per_second", facts.rate),
        "Training cost": run.given("exaflops", facts.operations),
    }
    shown = {"", "optim", "augment", "preprocess", "pretrain"}
    settings = {
        f"{group}.{name}" if group else name: facts.plain(value)
        for group, name, value, _, changed in facts.settings(run.config)
        if group in shown and (changed or group in ("optim", "preprocess")) and value is not None
    }
    command = f"```sh\n{code(reproduce)}\n```" if reproduce else ""
    heading = "Settings of the optimiser and the input, and all others that are not the default:"
    parts = [table("Item", rows), command, f"{heading}\n\n{table('Setting', settings)}"]
    return "\n\n".join(part for part in parts if part)


def _evaluation(result: Classification, split: str) -> str:
    low, high = facts.wilson(round(result.top1 * result.n), result.n)
    rows = {
        "Top-1 accuracy": f"{facts.percent(result.top1)} (95 % interval {facts.percent(low)} to "
        f"{facts.percent(high)})",
        "Top-5 accuracy": facts.percent(result.top5) if len(result.per_class) > 5 else None,
        "Balanced accuracy": f"{facts.percent(result.balanced)} (mean recall of the classes)",
        "Loss per image": f"{result.loss:.4f}",
        "Expected calibration error": f"{facts.percent(result.ece)} (15 equal-width bins)",
        "Brier score": f"{result.brier:.4f} (less is better)",
        "Images that could not be read": f"{result.skipped:,}",
    }
    ordered = facts.worst_first(result)
    listed = ordered if len(ordered) <= LISTED else ordered[:10]
    lead = (
        "Each class, lowest recall first:"
        if len(ordered) <= LISTED
        else f"The ten of {len(ordered):,} classes with the lowest recall:"
    )
    each = "\n".join(
        f"| {markdown(name)} | {row['n']:,} | {facts.percent(row['recall'], 1)} "
        f"| {facts.percent(row['precision'], 1)} |"
        for name, row in listed
    )
    return (
        f"Measured on {markdown(facts.part(split, result.n))}.\n\n{table('Figure', rows)}\n\n"
        f"{lead}\n\n| Class | Images | Recall | Precision |\n| --- | ---: | ---: | ---: |\n{each}"
    )


def _runs(run: RunFacts) -> str:
    rows = "\n".join(
        f"| {name} | {top1} | {on} |"
        for name, top1, on in facts.sweep_rows(run.summary.get("sweep"))
    )
    lead = "The weights, and the figures above, are those of run-0."
    head = "| Run | Top-1 | Measured on |\n| --- | ---: | --- |"
    return f"{lead}\n\n{head}\n{rows}" if rows else ""


def _use(run: RunFacts) -> str:
    folder = str(run.path)
    source = run.source or "DATA"
    literal = json.dumps(folder, ensure_ascii=False)
    return (
        "In Python:\n\n"
        f"```python\nimport patchword\n\n"
        f'for answer in patchword.predict({literal}, ["photo.jpg"]):\n'
        f"    print(answer.path, answer.label, answer.probability)\n```\n\n"
        "On the command line:\n\n"
        f"```sh\npatchword predict {code(shlex.quote(folder))} photo.jpg\n"
        f"patchword evaluate {code(shlex.quote(folder))} {code(shlex.quote(source))}\n```"
    )


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return ", ".join(markdown(name) for name in names[:LISTED]) + more


def table(first: str, rows: Mapping[str, Any]) -> str:
    """A Markdown table of two columns, without the rows that are None."""
    kept = {key: facts.plain(value) for key, value in rows.items() if value is not None}
    lines = [f"| {markdown(key)} | {markdown(value)} |" for key, value in kept.items()]
    return "\n".join([f"| {first} | Value |", "| --- | --- |", *lines]) if lines else ""


def markdown(text: str) -> str:
    """`text` as Markdown that shows it as it is, on one line and safe within a table."""
    line = " ".join(text.split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#$!])", r"\\\1", line)


def code(text: str) -> str:
    """A command on one line and without the fence of a code block."""
    return " ".join(text.splitlines()).replace("```", "` ` `")


def _yaml(value: Any, indent: int = 0) -> str:
    """Block YAML of nested dicts, lists, strings and numbers; every string in double quotes."""
    pad = "  " * indent
    if isinstance(value, Mapping):
        lines: list[str] = []
        for key, item in value.items():
            nested = isinstance(item, (Mapping, list))
            lines.append(
                f"{pad}{key}:" + (f"\n{_yaml(item, indent + 1)}" if nested else _scalar(item))
            )
        return "\n".join(lines)
    return "\n".join(
        f"{pad}- {_yaml(item, indent + 1).lstrip()}"
        if isinstance(item, Mapping)
        else f"{pad}-{_scalar(item)}"
        for item in value
    )


def _scalar(value: Any) -> str:
    return f" {_quoted(value)}" if isinstance(value, str) else f" {value:.6f}"


def _quoted(text: str) -> str:
    """A double-quoted YAML scalar; whatever YAML forbids or folds is escaped."""

    def escaped(match: re.Match[str]) -> str:
        return f"\\U{ord(match[0]):08x}"

    plain = text.encode("utf-8", "replace").decode().replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff]", escaped, plain) + '"'
