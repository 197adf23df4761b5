"""The pictures of the page, which are drawn when it is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from patchword.evaluation.classify import Classification
from patchword.inspection.figures.drawing import BLUE, GREEN, ORANGE, VERMILLION, encode
from patchword.inspection.figures.run import (
    Series,
    draw_confusion,
    draw_curves,
    draw_reliability,
)
from patchword.report import words
from patchword.report.blocks import Picture
from patchword.report.record import RunRecord, finite


def curves(run: RunRecord, *, classifier: bool) -> list[Picture]:
    """Loss, what measures progress, and the learning rate over the steps."""
    best = run.number("best_step")
    mark = None if best is None else (best, f"best, step {words.whole(best)}")
    measures = {"top1": "validation"} if classifier else words.PROBES
    losses = _series("training", run.metrics, "loss", smooth=True)
    shares: list[Series] = []
    for kind, colours in {"raw": (VERMILLION, ORANGE), "average": (GREEN, BLUE)}.items():
        rows = [row for row in run.evaluations if row.get("weights", "raw") == kind]
        losses += _series(f"validation, {kind} weights", rows, "loss", colours[0])
        for (key, name), colour in zip(measures.items(), colours, strict=False):
            shares += _series(f"{name}, {kind} weights", rows, key, colour)
    title = "Validation accuracy" if classifier else "Frozen features"
    return [
        *_plot(losses, "Loss", "loss per image" if classifier else "loss", mark=mark),
        *_plot(shares, title, "top-1 accuracy", percent=True, mark=mark),
        *_plot(_series("learning rate", run.metrics, "lr"), "Learning rate", "learning rate"),
    ]


def speed(run: RunRecord) -> list[Picture]:
    """Images per second over the steps."""
    lines = _series("images/s", run.metrics, "images_per_s")
    return _plot(lines, "Training speed", "images per second")


def confusion(result: Classification) -> Picture:
    """The confusion matrix."""
    names = list(result.per_class)
    hint = f"Confusion matrix of {len(names)} classes: rows true, columns predicted."
    return Picture(lambda: encode(draw_confusion(result.confusion(), names)), hint)


def reliability(result: Classification) -> Picture:
    """Accuracy against confidence."""
    hint = f"Reliability diagram; expected calibration error {words.percent(result.ece)}."
    return Picture(lambda: encode(draw_reliability(*result.reliability(), result.ece)), hint)


def _series(
    name: str,
    rows: Iterable[Mapping[str, object]],
    key: str,
    colour: str = BLUE,
    *,
    smooth: bool = False,
) -> list[Series]:
    """A figure of log lines over their steps; none where no line has it."""
    points = [(finite(row.get("step")), finite(row.get(key))) for row in rows]
    kept = [(x, y) for x, y in points if x is not None and y is not None]
    xs, ys = [x for x, _ in kept], [y for _, y in kept]
    return [Series(name, xs, ys, colour, smooth)] if kept else []


def _plot(
    lines: Sequence[Series],
    title: str,
    y_label: str,
    *,
    percent: bool = False,
    mark: tuple[float, str] | None = None,
) -> list[Picture]:
    """The picture of curves; none where all have the same single step."""
    if len({x for line in lines for x in line.x}) < 2:
        return []
    say = words.percent if percent else words.plain
    ends = "; ".join(f"{line.name} ends at {say(line.y[-1])}" for line in lines)
    hint = f"{title} against the training step: {ends}."
    figure = partial(draw_curves, lines, title, y_label, percent=percent, mark=mark)
    return [Picture(lambda: encode(figure()), hint)]
