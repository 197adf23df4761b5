"""The model card: well-formed, escaped, true."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from patchword.evaluation.classify import Classification
from patchword.report.markdown import markdown, write_card
from patchword.report.record import read_run
from patchword.report.sections import Results

Measured = Callable[..., Classification]
MakeRun = Callable[..., Path]


def write_model_card(run: Path, **results: Any) -> Path:
    return write_card(read_run(run), Results(**results))


def front_matter(card: str) -> dict[str, Any]:
    _, matter, _ = card.split("---\n", 2)
    return yaml.safe_load(matter)


def test_the_model_card_carries_the_measured_figures(
    tmp_path: Path, nasty: list[str], make_run: MakeRun, measured: Measured
) -> None:
    result = measured(nasty, skipped=1)
    run = make_run(tmp_path / "run", nasty)
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


def test_a_hub_data_set_is_linked(tmp_path: Path, make_run: MakeRun, measured: Measured) -> None:
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
    source: str, tmp_path_factory: pytest.TempPathFactory, measured: Measured
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


@pytest.mark.parametrize(
    ("model", "title", "tag", "cited"),
    [
        ("ViT-Ti/16", "Vision Transformer, ViT-Ti/16", "vision-transformer", "2021image"),
        ("R26+ViT-S/32", "Hybrid of ResNet and Vision Transformer, ", "hybrid", "2021image"),
        ("BiT-R50x1", "ResNet of Big Transfer (BiT), BiT-R50x1", "resnet", "2020big"),
        ("Mixer-B/16", "MLP-Mixer, Mixer-B/16", "mlp-mixer", "2021mixer"),
    ],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_the_model_card_names_the_family(
    tmp_path: Path,
    make_run: MakeRun,
    measured: Measured,
    model: str,
    title: str,
    tag: str,
    cited: str,
    labelled: bool,
) -> None:
    run = make_run(tmp_path / "run", ["a", "b"])
    summary = json.loads((run / "summary.json").read_text()) | {"architecture": model}
    (run / "summary.json").write_text(json.dumps(summary))
    results = {"result": measured(["a", "b"]), "split": "test"} if labelled else {}
    card = write_model_card(run, **results).read_text()
    assert f"| Architecture | {title}" in card
    assert tag in front_matter(card)["tags"]
    assert re.findall(r"@inproceedings\{[a-z]+(\w+),", card) == [cited]
    vit = "ViT" in model
    assert ("Vision Transformer" in card) == ("vision-transformer" in card) == vit
