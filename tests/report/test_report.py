"""The report and the model card: self-contained, well-formed, escaped, true, and lenient."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from patchword.evaluation.classify import Classification, Classify
from patchword.inspection.figures.drawing import encode
from patchword.inspection.figures.run import Series, draw_curves
from patchword.report import Mistake, write_report
from patchword.report import record as facts
from patchword.report.card import markdown, write_model_card
from patchword.report.pretraining_card import write_pretraining_card
from patchword.spec.batch import Batch
from patchword.spec.parse import PatchwordError, to_dict
from patchword.spec.train import OptimSpec, TrainSpec

NASTY = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a & b</td></table>",
    "pipe | `tick` *star* $x_1$",
    "日本語 \u2028 line",
    "colon: {yaml} # [list]\n---\nnew",
    "lone \udc80 surrogate",
]
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


def measured(names: Sequence[str], n: int = 120, seed: int = 0, skipped: int = 0) -> Classification:
    rng = np.random.default_rng(seed)
    size = len(names)
    labels = torch.from_numpy(rng.integers(0, size, n))
    logits = torch.from_numpy(rng.normal(size=(n, size)).astype(np.float32))
    logits[torch.arange(n), labels] += 2
    batch = Batch(
        images=torch.zeros(n, 1, 1, 1, dtype=torch.uint8),
        labels=labels,
        mask=torch.ones(n, dtype=torch.bool),
        indices=torch.arange(n),
        bad=tuple((n + i, "truncated") for i in range(skipped)),
    )
    return Classify(lambda: [batch], names, torch.Tensor.float).measure(lambda _: logits)


def make_run(path: Path, names: Sequence[str], **changes: Any) -> Path:
    path.mkdir()
    spec = TrainSpec(
        source="photos/birds",
        model="ViT-Ti/16",
        steps=300,
        optim=OptimSpec(lr=0.0025, average=0.99),
        **changes,
    )
    (path / "config.json").write_text(json.dumps(to_dict(spec)))
    (path / "environment.json").write_text(
        json.dumps({"torch": "2.13.0", "git_commit": "abc123", "data_fingerprint": "sha256:77"})
    )
    (path / "classes.json").write_text(json.dumps(list(names)))
    metrics = [
        {"step": s, "loss": math.exp(-s / 99), "lr": 1e-3, "images_per_s": 900, "data_wait": 0.25}
        for s in range(10, 301, 10)
    ]
    lines = [json.dumps(row) for row in metrics] + ['{"step": 310, "lo']  # cut by a kill
    (path / "metrics.jsonl").write_text("\n".join(lines))
    evaluations = [
        {"step": s, "split": "val", "weights": w, "n": 90, "top1": s / 400, "loss": 1.0}
        for s in (100, 200, 300)
        for w in ("raw", "average")
    ]
    (path / "evaluations.jsonl").write_text("".join(json.dumps(r) + "\n" for r in evaluations))
    summary = {
        "steps": 300,
        "seconds": 71.4,
        "images_per_second": 912.3,
        "parameters": 5717416,
        "gmacs": 1.2545,
        "exaflops": 2.5e-4,
        "best_step": 200,
        "best_weights": "average",
        "bad_images": 3,
        "evaluate_images_per_second": 2000.0,
    }
    (path / "summary.json").write_text(json.dumps(summary))
    return path


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
def nasty(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page, Classification]:
    run = make_run(tmp_path_factory.mktemp("nasty") / "run", NASTY)
    result = measured(NASTY, skipped=2)
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
    nasty: tuple[str, Page, Classification],
) -> None:
    text, page, _ = nasty
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


def test_links_lead_to_sections_in_order(nasty: tuple[str, Page, Classification]) -> None:
    _, page, _ = nasty
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


def test_nasty_class_names_show_as_they_are(nasty: tuple[str, Page, Classification]) -> None:
    _, page, _ = nasty
    for name in NASTY:
        assert name.replace("\udc80", "?") in page.text
    assert "patchword train 'a<b>' --seed 0 && echo" in page.text


def test_the_headline_and_the_tables_show_the_measured_figures(
    nasty: tuple[str, Page, Classification],
) -> None:
    _, page, result = nasty
    low, high = facts.wilson(round(result.top1 * 120), 120)
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


def test_classes_come_worst_first(tmp_path: Path) -> None:
    names = [f"kind{i}" for i in range(9)]
    result = measured(names, n=400)
    run = make_run(tmp_path / "run", names)
    text = write_report(run, result=result, split="test").read_text(encoding="utf-8")
    table = text.split('id="classes"')[1].split("</section>")[0]
    order = re.findall(r'<th scope="row">(kind\d)</th>', table)
    assert sorted(order) == names
    recalls = [result.per_class[name]["recall"] for name in order]
    assert recalls == sorted(recalls)


def test_a_run_that_recorded_little_still_has_a_report(tmp_path: Path) -> None:
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


def test_a_head_alone_has_no_curves(tmp_path: Path) -> None:
    """Measured once, at step 0: the page has no section on training, nor a link to it."""
    run = make_run(tmp_path / "run", ["a", "b"])
    result = measured(["a", "b"])
    drawn = write_report(run, result=result, split="test").read_text(encoding="utf-8")
    assert 'id="curves"' in drawn
    (run / "metrics.jsonl").write_text("")
    line = {"step": 0, "split": "val", "weights": "raw", "n": 90, "top1": 0.7, "loss": 1.0}
    (run / "evaluations.jsonl").write_text(json.dumps(line) + "\n")
    text = write_report(run, result=result, split="test").read_text(encoding="utf-8")
    assert "curves" not in text


def test_a_perfect_result_says_so(tmp_path: Path) -> None:
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


def test_a_thousand_classes_stay_under_three_megabytes(tmp_path: Path) -> None:
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


def test_the_report_leaves_the_callers_thumbnails_alone(tmp_path: Path) -> None:
    result = measured(list("abcdef"))
    given_mistakes = mistakes_of(result)
    before = [(m.thumbnail.size, m.thumbnail.mode) for m in given_mistakes]
    run = make_run(tmp_path / "run", list("abcdef"))
    write_report(run, result=result, split="test", mistakes=given_mistakes)
    assert [(m.thumbnail.size, m.thumbnail.mode) for m in given_mistakes] == before


def test_no_run_directory(tmp_path: Path) -> None:
    result = measured(["a", "b"])
    for write in (write_report, write_model_card):
        with pytest.raises(PatchwordError, match=r"no config\.json; run train first"):
            write(tmp_path, result=result, split="test")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PatchwordError, match="not valid JSON"):
        write_report(tmp_path, result=result, split="test")


def front_matter(card: str) -> dict[str, Any]:
    _, matter, _ = card.split("---\n", 2)
    return yaml.safe_load(matter)


def test_the_model_card_carries_the_measured_figures(tmp_path: Path) -> None:
    result = measured(NASTY, skipped=1)
    run = make_run(tmp_path / "run", NASTY)
    path = write_model_card(run, result=result, split="test", reproduce="patchword train x")
    assert path == run / "MODEL_CARD.md"
    card = path.read_text(encoding="utf-8")
    matter = front_matter(card)
    assert matter["library_name"] == "patchword"
    assert matter["pipeline_tag"] == "image-classification"
    assert "datasets" not in matter
    (entry,) = matter["model-index"]
    (measurement,) = entry["results"]
    assert measurement["dataset"] == {"name": "birds", "type": "local", "split": "test"}
    values = {metric["name"]: metric["value"] for metric in measurement["metrics"]}
    assert values["Top-1 accuracy"] == pytest.approx(result.top1, abs=1e-6)
    assert values["Loss"] == pytest.approx(result.loss, abs=1e-6)
    assert values["Expected calibration error"] == pytest.approx(result.ece, abs=1e-6)
    assert values["Balanced accuracy"] == pytest.approx(result.balanced, abs=1e-6)
    assert values["Brier score"] == pytest.approx(result.brier, abs=1e-6)
    titles = re.findall(r"^## (.+)$", card, re.MULTILINE)
    assert titles == [
        "Model details",
        "Intended use and limits",
        "Training data",
        "Training procedure",
        "Evaluation",
        "How to use",
        "Environment",
        "Citation",
    ]
    assert "<script>" not in card
    assert "<img" not in card
    assert "| optim.lr | 0.0025 |" in card
    assert "patchword train x" in card
    for line in card.splitlines():
        if line.startswith("|"):  # nothing in a cell adds a column
            columns = len(re.findall(r"(?<!\\)\|", line)) - 1
            assert columns in (2, 4), line


def test_a_hub_data_set_is_linked(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ["a", "b"])
    config = json.loads((run / "config.json").read_text())
    config["source"] = "hub:some/flowers"
    (run / "config.json").write_text(json.dumps(config))
    card = write_model_card(run, result=measured(["a", "b"]), split="test").read_text()
    matter = front_matter(card)
    assert matter["datasets"] == ["some/flowers"]
    assert matter["model-index"][0]["results"][0]["dataset"]["type"] == "some/flowers"


@settings(max_examples=60, deadline=None)
@given(source=st.text(st.characters(blacklist_characters="/\x00"), min_size=1, max_size=30))
def test_any_name_of_the_data_survives_yaml_and_html(
    source: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("run")
    (run / "config.json").write_text(json.dumps({"source": f"folder/{source}"}))
    result = measured(["a", "b"], n=20)
    card = write_model_card(run, result=result, split="test").read_bytes().decode("utf-8")
    name = front_matter(card.replace("\r\n", "\n"))["model-index"][0]["results"][0]["dataset"][
        "name"
    ]
    expected = "folder" if source == "." else source
    assert name == expected.encode("utf-8", "replace").decode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a|b", r"a\|b"),
        ("<b> & `c`", r"&lt;b&gt; &amp; \`c\`"),
        ("two\n\nlines", "two lines"),
        ("snake_case*", r"snake\_case\*"),
    ],
)
def test_markdown_is_escaped(text: str, expected: str) -> None:
    assert markdown(text) == expected


def test_wilson_interval_has_the_published_values() -> None:
    # Brown, Cai and DasGupta 2001; Newcombe 1998, table I, method 3
    assert facts.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert facts.wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert facts.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert facts.wilson(29, 29)[1] == 1.0
    assert facts.wilson(0, 0) == (0.0, 1.0)


@given(n=st.integers(1, 10**6), share=st.floats(0, 1))
def test_wilson_interval_holds_the_proportion(n: int, share: float) -> None:
    successes = round(share * n)
    low, high = facts.wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1


def test_numbers_in_words() -> None:
    assert [facts.duration(s) for s in (8.42, 71.4, 59.96, 3599.7, 3900, 90000)] == [
        "8.4 s",
        "1 min 11 s",
        "1 min 00 s",
        "1 h 00 min",
        "1 h 05 min",
        "25 h 00 min",
    ]
    assert [facts.significant(v) for v in (0, 0.012345, 1.2345, 912.3, 15800.2)] == [
        "0",
        "0.0123",
        "1.23",
        "912",
        "15,800",
    ]
    assert [facts.operations(v) for v in (4262, 2.5, 2.5e-4, 1e-12)] == [
        "4,262 exaFLOPs",
        "2.50 exaFLOPs",
        "250 teraFLOPs",
        "0.00100 gigaFLOPs",
    ]
    assert facts.count(1, "class", "classes") == "1 class"
    assert facts.count(1200, "class", "classes") == "1,200 classes"
    assert facts.part("held out", 7) == "7 images of \u201cheld out\u201d"


def test_settings_mark_what_is_not_the_default() -> None:
    config = to_dict(TrainSpec(source="x", seed=3, optim=OptimSpec(lr=0.1)))
    changed = {(group, name) for group, name, *_, mark in facts.settings(config) if mark}
    assert changed == {("", "seed"), ("optim", "lr")}
    rows = {(group, name): default for group, name, _, default, _ in facts.settings(config)}
    assert rows["optim", "lr"] == OptimSpec().lr


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("val", "also chose the best weights"),
        ("train", "says nothing of new ones"),
        ("all", "figures are too good"),
    ],
)
def test_notes_on_the_split(tmp_path: Path, split: str, expected: str) -> None:
    run = facts.read_run(make_run(tmp_path / "run", ["a", "b"]))
    result = measured(["a", "b"], n=2000)
    assert any(expected in note for note in facts.notes(run, result, split))
    assert facts.notes(run, result, "test") == [
        "3 images of the data could not be read and were skipped."
    ]


def test_notes_on_classes_without_images(tmp_path: Path) -> None:
    run = facts.read_run(make_run(tmp_path / "run", ["a", "b"]))
    labels = torch.zeros(10, dtype=torch.int64)
    batch = Batch(
        images=torch.zeros(10, 1, 1, 1, dtype=torch.uint8),
        labels=labels,
        mask=labels == 0,
        indices=torch.arange(10),
    )
    names = [f"c{i}" for i in range(8)]
    result = Classify(lambda: [batch], names, torch.Tensor.float).measure(
        lambda _: torch.eye(8)[torch.ones(10, dtype=torch.int64)]
    )
    said = " ".join(facts.notes(run, result, "test"))
    assert "7 classes without an image here: c1, c2, c3, c4, c5 and 2 more." in said
    assert "1 class never predicted: c0." in said


@pytest.mark.parametrize(
    ("model", "title", "tag", "cited"),
    [
        ("ViT-Ti/16", "Vision Transformer, ViT-Ti/16", "vision-transformer", "2021image"),
        ("R26+ViT-S/32", "Hybrid of ResNet and Vision Transformer, ", "hybrid", "2021image"),
        ("BiT-R50x1", "ResNet of Big Transfer (BiT), BiT-R50x1", "resnet", "2020big"),
        ("Mixer-B/16", "MLP-Mixer, Mixer-B/16", "mlp-mixer", "2021mixer"),
    ],
)
def test_the_model_card_names_the_family(
    tmp_path: Path, model: str, title: str, tag: str, cited: str
) -> None:
    run = make_run(tmp_path / "run", ["a", "b"])
    summary = json.loads((run / "summary.json").read_text()) | {"architecture": model}
    (run / "summary.json").write_text(json.dumps(summary))
    writers = (
        lambda: write_model_card(run, result=measured(["a", "b"]), split="test"),
        lambda: write_pretraining_card(run),
    )
    for write in writers:
        card = write().read_text()
        assert f"| Architecture | {title}" in card
        assert tag in front_matter(card)["tags"]
        assert re.findall(r"@inproceedings\{[a-z]+(\w+),", card) == [cited]
        vit = "ViT" in model
        assert ("Vision Transformer" in card) == ("vision-transformer" in card) == vit
