"""The sections of a run's report and of its model card: one list, of which each shows its part.

A section without content is left out, so that one list serves classifiers and runs without labels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from patchword.evaluation.classify import Classification
from patchword.report import charts, words
from patchword.report.blocks import (
    Block,
    Code,
    Group,
    Headline,
    Items,
    Mistake,
    Pairs,
    Picture,
    Section,
    Table,
    Text,
)
from patchword.report.family import family_of
from patchword.report.record import RunRecord, finite, settings
from patchword.report.words import count, facts, percent, plain

LISTED = 30
"""Up to this many classes are all in the card; of more, the ten with the lowest recall."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """What is shown of a run beside its directory."""

    result: Classification | None = None
    """the figures of a classifier; None where no labels were learned"""
    split: str = "val"
    """what it was measured on: test, val, train, all, or a name of the user's"""
    mistakes: Sequence[Mistake] = ()
    pictures: bytes | None = None
    """a PNG of images as a run without labels predicts them"""
    figures: Mapping[str, bytes] = field(default_factory=dict)
    """PNGs by title, of what is inside the model"""
    reproduce: str = ""
    """the command line that repeats the run"""


def sections(run: RunRecord, results: Results) -> list[Section]:
    """Those that have content, in order."""
    result = results.result
    notes = Items(words.notes(run, result, results.split))
    environment = {name: plain(value) for name, value in run.environment.items()}
    again = Code(results.reproduce)
    inside = [Picture(partial(bytes, png), name, "paper") for name, png in results.figures.items()]
    family = family_of(run.model)
    cited = f"The architecture is that of {family.paper}:"
    listed = [
        Section("", "Model details", [_details(run, result)], card=True),
        Section("", "Intended use and limits", [_use(run, result), notes], card=True),
        Section("", "Training data", [_data(run)], card=True),
        Section("", "Training procedure", _procedure(run, again), card=True),
        Section("", "Evaluation", _evaluation(run, results), card=True),
        Section("runs", "Learning rates and runs", _runs(run), card=True),
        Section("curves", "Training", _training(run, result)),
        *([] if result is None else _of_classifier(result, results.mistakes)),
        Section("predictions", "Predictions", _predictions(run, results.pictures)),
        Section("inspection", "Inside the model", [_row(*inside)]),
        Section("" if result else "next", "How to use", _how(run, result), card=True),
        Section("cost", "Speed and cost", _cost(run)),
        Section("configuration", "Configuration", _configuration(run)),
        Section("reproduce", "Reproduce", [again, Pairs(environment, title="Environment")]),
        Section("notes", "Notes", [notes]),
        Section("", "Environment", [Pairs(environment)], card=True),
        Section("", "Citation", [Text(cited), Code(family.citation, "bibtex")], card=True),
    ]
    filled = [each._replace(blocks=[block for block in each.blocks if block[0]]) for each in listed]
    return [section for section in filled if section.blocks]


def headline(run: RunRecord, results: Results) -> Headline:
    """What stands above the sections of the page."""
    result, chosen = results.result, words.weights(run)
    notes = len(words.notes(run, result, results.split))
    weights = f" Weights: {chosen}." if chosen else ""
    if result is not None:
        tiles = {figure.name: figure.say(value) for figure, value in words.figures_of(result)}
        shown = tiles.pop("Top-1 accuracy")
        tiles |= {"Classes": f"{len(result.per_class):,}"} | facts(run, "parameters", "seconds")
        claim = f"Top-1 accuracy on {words.images_of(results.split, result.n)}"
        aside = f"95 % confidence interval {words.interval(result)}.{weights}"
        return Headline(shown, claim, aside, notes, tiles)
    tiles = {"Objective": run.objective}
    tiles |= {"Patches masked": percent(run.mask_rate, 0)} if run.mask_rate else {}
    tiles |= facts(run, "knn", "loss", "parameters", "images", "seconds")
    linear, n = run.number("linear"), int(run.number("n") or 0)
    if linear is not None:
        aside = f"Trained without labels; they measured progress and chose these weights.{weights}"
        claim = "Top-1 of a linear probe on frozen features"
        return Headline(percent(linear), claim, aside, notes, tiles)
    loss, _ = words.FACTS["loss"]
    claim = f"{loss} on {words.images_of('val', n)}" if n else loss
    shown = tiles.pop(loss, words.NOTHING)
    return Headline(shown, claim, f"Trained without labels.{weights}", notes, tiles)


# About the run -----------------------------------------------------------------------------------


def _details(run: RunRecord, result: Classification | None) -> Pairs:
    size = run.config.get("image_size")
    rows = {"Architecture": f"{family_of(run.model).title}, {run.model}"}
    if isinstance(size, (list, tuple)) and size:
        rows["Input"] = f"images, {size[0]} x {size[-1]} pixels (height x width)"
    if result is None:
        rows["Output"] = "features; there is no head"
    else:
        rows["Classes"] = f"{len(result.per_class):,}"
    rows |= facts(run, "parameters", "gmacs")
    if chosen := words.weights(run):
        rows["Weights"] = chosen
    rows["Licence"] = "not stated by the run: choose one before you share the model"
    return Pairs(rows)


def _use(run: RunRecord, result: Classification | None) -> Text:
    if result is None:
        method = words.METHODS.get(run.objective, run.objective)
        return Text(
            f"The model turns images into features. It was trained without labels, by {method}: it "
            "is to be fine-tuned on a task, or its features to be probed. It names no classes."
        )
    names = list(result.per_class)
    return Text(
        f"The model assigns an image to one of {count(len(names), 'class', 'classes')}: "
        f"{words.first_of(names, LISTED)}. It gives one of them to any image, also to one that "
        "shows none of them. Its figures hold for images like those it was measured on; for others "
        "they are not known."
    )


def _data(run: RunRecord) -> Pairs:
    known = {
        "Source": run.source or None,
        "Fingerprint": run.environment.get("data_fingerprint"),
        **facts(run, "bad_images"),
        "Seed of the division and the order": run.config.get("seed"),
    }
    return Pairs({name: plain(value) for name, value in known.items() if value is not None})


def _procedure(run: RunRecord, again: Code) -> list[Block]:
    shown = {
        f"{group}.{name}" if group else name: plain(value)
        for group, name, value, _, changed in settings(run.config)
        if value is not None
        and (group in ("optim", "preprocess") or (changed and group in ("", "augment", "pretrain")))
    }
    lead = "Settings of the optimiser and the input, and all others that are not the default:"
    taken = Pairs(facts(run, "seconds", "images_per_second", "exaflops"))
    return [taken, again, Text(lead), Pairs(shown, first="Setting")]


def _runs(run: RunRecord) -> list[Block]:
    rows = words.sweep_rows(run.sweep)
    lead = "The weights here, and the figures above and below, are those of run-0."
    if run.sweep.get("rates"):
        chosen = "The learning rate is chosen on held-out images, the runs after that are measured."
        lead = f"{chosen} {lead}"
    table = Table(rows, {"Run": "", "Top-1": "number", "Measured on": ""})
    return [Text(lead, muted=True), table] if rows else []


def _training(run: RunRecord, result: Classification | None) -> list[Block]:
    drawn = charts.curves(run, classifier=result is not None)
    remark = (
        "The training loss is that of the augmented images and of the training objective, so it "
        "may lie above the validation loss."
    )
    if result is None:
        loss = words.LOSSES.get(run.predicts, "")
        remark = f"Loss: {loss}. On val the same patches are masked each time."
    return [_row(*drawn, Text(remark, muted=True))] if drawn else []


def _predictions(run: RunRecord, pictures: bytes | None) -> list[Block]:
    hint, said = "Images, what the model saw of them, and what it predicts.", run.predicts
    if pictures is None:
        return []
    drawn = Picture(partial(bytes, pictures), hint, "paper")
    return [drawn, Text(words.predictions(said), muted=True)]


def _how(run: RunRecord, result: Classification | None) -> list[Block]:
    path, lead = json.dumps(str(run.path), ensure_ascii=False), ""
    use = f'for answer in patchword.predict({path}, ["photo.jpg"]):'
    use += "\n    print(answer.path, answer.label, answer.probability)"
    if result is None:
        lead = "It is a plain model without a head: fine-tune it, or measure its features."
        use = f"model = patchword.load_model({path})"
        use += "\n# normalised images [B, C, H, W] to features [B, D]"
    commands = Code("\n".join(words.next_commands(run)))
    python = Code(f"import patchword\n\n{use}", "python")
    return [Text(lead), Text("In Python:"), python, Text("On the command line:"), commands]


def _cost(run: RunRecord) -> list[Block]:
    waits = [finite(row.get("data_wait")) for row in run.metrics]
    shares = [value for value in waits if value is not None and 0 <= value <= 1]
    rows = facts(run, "seconds", "steps", "images_per_second", "evaluate_images_per_second")
    if shares:
        rows["Waiting for data"] = percent(float(np.mean(shares)), 1)
    rows |= facts(run, "parameters", "gmacs", "exaflops")
    return [_row(Pairs(rows), *charts.speed(run))]


def _configuration(run: RunRecord) -> list[Block]:
    groups: dict[str, tuple[dict[str, str], dict[str, str]]] = {}
    for group, name, value, default, changed in settings(run.config):
        rows, defaults = groups.setdefault(group or "run", ({}, {}))
        rows[name] = plain(value)
        if changed:
            defaults[name] = plain(default)
    lead = (
        "Everything as it was resolved when the run began. Bold: not the default, which is given "
        "below it."
    )
    tables = [[Pairs(*rows, title=group)] for group, rows in groups.items()]
    return [Text(lead, muted=True), Group(tables, "groups")]


# How good it is ----------------------------------------------------------------------------------


def _evaluation(run: RunRecord, results: Results) -> list[Block]:
    result = results.result
    if result is None:
        rows = facts(run, "loss", "knn", "linear")
        return [Text("Measured on validation images."), Pairs(rows, first="Figure")] if rows else []
    rows = {
        figure.name: figure.say(value) + (f" ({figure.remark})" if figure.remark else "")
        for figure, value in words.figures_of(result)
    }
    rows["Top-1 accuracy"] += f" (95 % interval {words.interval(result)})"
    rows[words.FACTS["bad_images"][0]] = f"{result.skipped:,}"
    number, lead = len(result.per_class), "Each class, lowest recall first:"
    if number > LISTED:
        lead = f"The ten of {number:,} classes with the lowest recall:"
    classes = _class_table(result, number if number <= LISTED else 10)
    measured = f"Measured on {words.images_of(results.split, result.n)}."
    return [Text(measured), Pairs(rows, first="Figure"), Text(lead), classes]


def _of_classifier(result: Classification, mistakes: Sequence[Mistake]) -> list[Section]:
    lead = (
        "Lowest recall first. Recall: the share of a class's images that were recognised. "
        "Precision: the share of the images given this class that belong to it."
    )
    table = _class_table(result, len(result.per_class), "Figures of each class")
    return [
        Section("classes", "Classes", [Text(lead, muted=True), table]),
        Section("confusion", "Confusion", _confusion(result)),
        Section("mistakes", "Mistakes", _mistakes(result, mistakes)),
        Section("calibration", "Calibration", _calibration(result)),
    ]


def _class_table(result: Classification, most: int, scroll: str = "") -> Table:
    """Classes by rising recall, then by falling number of images; those without images last."""
    ordered = sorted(
        result.per_class.items(),
        key=lambda item: (item[1]["recall"] is None, item[1]["recall"] or 0.0, -item[1]["n"]),
    )
    columns = {"Class": "", "Images": "number", "Recall": "meter", "Precision": "meter"}
    rows = [(name, f"{row['n']:,}", row["recall"], row["precision"]) for name, row in ordered]
    return Table(rows[:most], columns, scroll=scroll)


def _confusion(result: Classification) -> list[Block]:
    matrix, names = result.confusion(), list(result.per_class)
    off, drawn = matrix.copy(), charts.confusion(result)
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:12]
    rows = [
        (names[true], names[said], f"{number:,}", percent(number / int(matrix[true].sum()), 1))
        for true, said in zip(*np.unravel_index(order, off.shape), strict=True)
        if (number := int(off[true, said]))
    ]
    if not rows:
        return [drawn, Text("No image was confused with another class.", muted=True)]
    columns = {"True": "", "Predicted": "name", "Images": "number", "Of class": "number extra"}
    table = Table(rows, columns, "Most frequent confusions")
    return [Group([[drawn], [table]], "beside")] if len(names) <= 12 else [drawn, table]


def _mistakes(result: Classification, mistakes: Sequence[Mistake]) -> list[Block]:
    wrong, images = int((result.labels != result.predicted).sum()), count(result.n, "image")
    if not wrong:
        return [Text(f"None: all {images} were classified rightly.")]
    share = f"{count(wrong, 'mistake')} in {images}."
    if not mistakes:
        return [Text(share)]
    lead = (
        f"{share} Here are the {len(mistakes):,} in which the model was surest of its wrong "
        "answer: look for wrong labels and for what it has overlooked."
    )
    return [Text(lead, muted=True), Group([[mistake] for mistake in mistakes], "mistakes")]


def _calibration(result: Classification) -> list[Block]:
    bins, error = len(result.reliability()[-1]), percent(result.ece)
    sure = float(result.confidence.mean(dtype=np.float64))
    gap = sure - result.top1
    meaning = (
        "Of the images the model is 80 % sure of, 80 % should be right. The expected calibration "
        f"error, the mean distance from that over {bins} equal bins of confidence, is {error}."
    )
    lean = (
        f"Mean confidence is {percent(sure)}, accuracy {percent(result.top1)}: the model is "
        f"{'more' if gap > 0 else 'less'} sure than right by {percent(abs(gap))}."
    )
    said = [Text(meaning, strong=error), Text(lean)]
    return [Group([[charts.reliability(result)], said], "beside")]


def _row(*blocks: Block) -> Group:
    return Group([[block] for block in blocks if block[0]])
