"""The report's sections on how well the model does: classes, confusions, mistakes, calibration."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from patchword.evaluation.classify import Classification
from patchword.inspection.figures.drawing import encode
from patchword.inspection.figures.run import draw_confusion, draw_reliability
from patchword.report import record as facts
from patchword.report.markup import data_uri, picture, scroll

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


def classes(result: Classification) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="number">{row["n"]:,}</td>'
        f"{_meter(row['recall'])}{_meter(row['precision'])}</tr>"
        for name, row in facts.worst_first(result)
    )
    return (
        "<p class=muted>Lowest recall first. Recall: the share of a class's images that were "
        "recognised. Precision: the share of the images given this class that belong to it.</p>"
        + scroll(
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


def confusion(result: Classification) -> str:
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
    drawn = picture(encode(draw_confusion(matrix, names)), hint)
    if not rows:
        return f"{drawn}\n<p class=muted>No image was confused with another class.</p>"
    return (
        f"<div{' class=beside' if len(names) <= 12 else ''}>{drawn}"
        "<div><h3>Most frequent confusions</h3>"
        '<table><thead><tr><th scope="col">True</th><th scope="col">Predicted</th>'
        '<th scope="col" class="number">Images</th>'
        '<th scope="col" class="number extra">Of class</th>'
        f"</tr></thead><tbody>{rows}</tbody></table></div></div>"
    )


def mistakes(result: Classification, mistakes: Sequence[Mistake]) -> str:
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
        f'src="{data_uri(stream.getvalue(), "png" if tiny else "jpeg")}">'
        f"<dl><div><dt>true</dt><dd>{escape(mistake.label)}</dd></div>"
        f"<div><dt>said</dt><dd>{escape(mistake.predicted)}</dd></div>"
        f"<div><dt>sure</dt><dd>{sure}</dd></div></dl>"
        f'<span class="key">{escape(mistake.key)}</span></li>'
    )


def calibration(result: Classification) -> str:
    diagram = result.reliability()
    sure = float(result.confidence.mean(dtype=np.float64))
    gap = sure - result.top1
    lean = "more sure than right" if gap > 0 else "less sure than right"
    hint = f"Reliability diagram; expected calibration error {facts.percent(result.ece)}."
    return (
        f'<div class="beside">{picture(encode(draw_reliability(*diagram, result.ece)), hint)}'
        "<div><p>Of the images the model is 80 % sure of, 80 % should be right. The expected "
        f"calibration error, the mean distance from that over {len(diagram[-1])} equal bins of "
        f"confidence, is <strong>{facts.percent(result.ece)}</strong>.</p>"
        f"<p>Mean confidence is {facts.percent(sure)}, accuracy {facts.percent(result.top1)}: the "
        f"model is {lean} by {facts.percent(abs(gap))}.</p></div></div>"
    )
