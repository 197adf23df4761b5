"""The page: self-contained, well-formed, escaped, true, and lenient."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from patchword.evaluation.classify import Classification, Classify
from patchword.inspection.figures.drawing import encode
from patchword.inspection.figures.run import Series, draw_curves
from patchword.report.blocks import Mistake
from patchword.report.markdown import write_card
from patchword.report.page import write_page
from patchword.report.record import read_run
from patchword.report.sections import Results
from patchword.report.words import wilson
from patchword.spec.batch import Batch

Measured = Callable[..., Classification]
MakeRun = Callable[..., Path]
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that tags balance, and collects text, tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def write_report(run: Path, **results: Any) -> Path:
    return write_page(read_run(run), Results(**results))


def write_model_card(run: Path, **results: Any) -> Path:
    return write_card(read_run(run), Results(**results))


def mistakes_of(result: Classification, count: int = 6) -> list[Mistake]:
    names = list(result.per_class)
    modes = ["RGB", "L", "RGBA", "P", "CMYK", "RGB"]
    return [
        Mistake(
            f"{names[result.labels[i]]}/{i}.jpg",
            names[result.labels[i]],
            names[result.predicted[i]],
            float(result.confidence[i]),
            Image.new(mode, (8, 8) if k % 2 else (300, 200)),
        )
        for k, (i, mode) in enumerate(zip(result.mistakes(count), modes, strict=True))
    ]


@pytest.fixture(scope="module")
def drawn(
    nasty: list[str],
    measured: Measured,
    make_run: MakeRun,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Page, Classification]:
    run = make_run(tmp_path_factory.mktemp("nasty") / "run", nasty)
    result = measured(nasty, skipped=2)
    figure = encode(draw_curves([Series("a", [0, 1], [0, 1])], "A", "a"))
    path = write_report(
        run,
        result=result,
        split="test",
        mistakes=mistakes_of(result),
        figures={'Filters "of" <b>': figure},
        reproduce="patchword train 'a<b>' --seed 0 && echo",
    )
    assert path == run / "report.html"
    text = path.read_text(encoding="utf-8")
    return text, Page(text), result


def test_the_page_is_well_formed_and_self_contained(
    drawn: tuple[str, Page, Classification],
) -> None:
    text, page, _ = drawn
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?://", text)
    assert "@import" not in text
    assert not re.search(r"url\(", text)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object"}
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert attributes.get("href", "#").startswith("#")
        if tag == "img":
            assert attributes["alt"]


def test_links_lead_to_sections_in_order(drawn: tuple[str, Page, Classification]) -> None:
    _, page, _ = drawn
    links = [a["href"][1:] for tag, a in page.tags if tag == "a" and "class" not in a]
    sections = [a["id"] for tag, a in page.tags if tag == "section"]
    assert (
        links
        == sections
        == [
            "curves",
            "classes",
            "confusion",
            "mistakes",
            "calibration",
            "inspection",
            "cost",
            "configuration",
            "reproduce",
            "notes",
        ]
    )
    identities = [a["id"] for _, a in page.tags if "id" in a]
    assert len(identities) == len(set(identities))


def test_nasty_class_names_show_as_they_are(
    nasty: list[str], drawn: tuple[str, Page, Classification]
) -> None:
    _, page, _ = drawn
    for name in nasty:
        assert name.replace("\udc80", "?") in page.text
    assert "patchword train 'a<b>' --seed 0 && echo" in page.text


def test_the_headline_and_the_tables_show_the_measured_figures(
    drawn: tuple[str, Page, Classification],
) -> None:
    _, page, result = drawn
    low, high = wilson(round(result.top1 * 120), 120)
    for expected in (
        f"{100 * result.top1:.2f} %",
        "Top-1 accuracy on 120 test images",
        f"{100 * low:.2f} % to {100 * high:.2f} %",
        f"{100 * result.top5:.2f} %",
        f"{result.loss:.4f}",
        f"{100 * result.ece:.2f} %",
        f"{100 * result.balanced:.2f} %",
        f"{result.brier:.4f}",
        "averaged weights, step 200",
        "5,717,416",
        "1 min 11 s",
        "912 images/s",
        "2,000 images/s",
        "25.0 %",
        "1.25 billion",
        "250 teraFLOPs",
        "abc123",
        "default 0.001",
        "2 images could not be read and were left out",
        "3 images of the data could not be read and were skipped",
        "3 notes on this result",
    ):
        assert expected in page.text, expected
    assert not re.search(r"\bnan\b", page.text.lower())


def test_classes_come_worst_first(tmp_path: Path, make_run: MakeRun, measured: Measured) -> None:
    names = [f"kind{i}" for i in range(9)]
    result = measured(names, n=400)
    run = make_run(tmp_path / "run", names)
    text = write_report(run, result=result, split="test").read_text(encoding="utf-8")
    table = text.split('id="classes"')[1].split("</section>")[0]
    order = re.findall(r'<th scope="row">(kind\d)</th>', table)
    assert sorted(order) == names
    recalls = [result.per_class[name]["recall"] for name in order]
    assert recalls == sorted(recalls)


def test_a_run_that_recorded_little_still_has_a_report(tmp_path: Path, measured: Measured) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"source": "digits", "novel": 1}))
    (tmp_path / "summary.json").write_text(
        '{"seconds": NaN, "parameters": "many", "best_step": null, "exaflops": true}'
    )
    result = measured(["a", "b"], n=3000)
    text = write_report(tmp_path, result=result, split="val").read_text(encoding="utf-8")
    page = Page(text)
    assert "Training time" not in page.text
    assert "Parameters" not in page.text
    assert "Top-5" not in page.text
    assert "3,000 validation images" in page.text
    assert "They also chose the best weights" in page.text
    card = write_model_card(tmp_path, result=result, split="val").read_text(encoding="utf-8")
    assert "Parameters" not in card
    assert "NaN" not in text + card


def test_a_head_alone_has_no_curves(tmp_path: Path, make_run: MakeRun, measured: Measured) -> None:
    """Measured once, at step 0: the page has no section on training, nor a link to it."""
    run = make_run(tmp_path / "run", ["a", "b"])
    result = measured(["a", "b"])
    before = write_report(run, result=result, split="test").read_text(encoding="utf-8")
    assert 'id="curves"' in before
    (run / "metrics.jsonl").write_text("")
    line = {"step": 0, "split": "val", "weights": "raw", "n": 90, "top1": 0.7, "loss": 1.0}
    (run / "evaluations.jsonl").write_text(json.dumps(line) + "\n")
    text = write_report(run, result=result, split="test").read_text(encoding="utf-8")
    assert "curves" not in text


def test_a_perfect_result_says_so(tmp_path: Path, make_run: MakeRun) -> None:
    logits = torch.eye(4)[torch.arange(40) % 4] * 9
    batch = Batch(
        images=torch.zeros(40, 1, 1, 1, dtype=torch.uint8),
        labels=torch.arange(40) % 4,
        mask=torch.ones(40, dtype=torch.bool),
        indices=torch.arange(40),
    )
    result = Classify(lambda: [batch], list("abcd"), torch.Tensor.float).measure(lambda _: logits)
    run = make_run(tmp_path / "run", list("abcd"))
    page = Page(write_report(run, result=result, split="test").read_text(encoding="utf-8"))
    assert "100.00 %" in page.text
    assert "all 40 images were classified rightly" in page.text
    assert "No image was confused" in page.text


def test_a_thousand_classes_stay_under_three_megabytes(
    tmp_path: Path, make_run: MakeRun, measured: Measured
) -> None:
    names = [f"n{i:08d} a rather long name of a class" for i in range(1000)]
    result = measured(names, n=3000)
    run = make_run(tmp_path / "run", names)
    noise = np.random.default_rng(0).integers(0, 255, (400, 300, 3), dtype=np.uint8)
    mistakes = [
        Mistake(f"{i}.jpg", names[0], names[1], 0.9, Image.fromarray(noise)) for i in range(48)
    ]
    path = write_report(run, result=result, split="test", mistakes=mistakes)
    assert path.stat().st_size < 3_000_000
    page = Page(path.read_text(encoding="utf-8"))
    assert page.text.count("a rather long name") >= 1000
    card = write_model_card(run, result=result, split="test").read_text(encoding="utf-8")
    assert len(card) < 20_000
    assert "The ten of 1,000 classes" in card


def test_the_report_leaves_the_callers_thumbnails_alone(
    tmp_path: Path, make_run: MakeRun, measured: Measured
) -> None:
    result = measured(list("abcdef"))
    given_mistakes = mistakes_of(result)
    before = [(m.thumbnail.size, m.thumbnail.mode) for m in given_mistakes]
    run = make_run(tmp_path / "run", list("abcdef"))
    write_report(run, result=result, split="test", mistakes=given_mistakes)
    assert [(m.thumbnail.size, m.thumbnail.mode) for m in given_mistakes] == before
