"""The one list of sections that the page and the card show parts of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from patchword.evaluation.classify import Classification
from patchword.report.blocks import Text
from patchword.report.markdown import write_card
from patchword.report.page import write_page
from patchword.report.record import read_run
from patchword.report.sections import Results, headline, sections

Measured = Callable[..., Classification]
MakeRun = Callable[..., Path]


def add(run: Path, name: str, **values: Any) -> None:
    """Change a JSON file of a run."""
    path = run / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def learned(make_run: MakeRun, tmp_path: Path) -> Path:
    """A run without labels."""
    run = make_run(tmp_path / "run", [])
    add(run, "config.json", objective="mae", pretrain={"mask_rate": 0.75})
    add(run, "summary.json", loss=0.5, n=40, knn=0.25, linear=0.375)
    return run


def test_a_run_without_labels_has_no_section_on_classes(learned: Path) -> None:
    listed = sections(read_run(learned), Results(pictures=b"png"))
    assert [section.anchor for section in listed if section.anchor] == [
        "curves",
        "predictions",
        "next",
        "cost",
        "configuration",
        "reproduce",
        "notes",
    ]
    titles = [section.title for section in listed if section.card]
    assert titles[-4:] == ["Evaluation", "How to use", "Environment", "Citation"]


@pytest.mark.parametrize(
    ("missing", "figure", "claim"),
    [
        ([], "37.50 %", "Top-1 of a linear probe on frozen features"),
        (["linear"], "0.5000", "Loss of the objective on 40 validation images"),
        (["linear", "loss", "n"], "\u2013", "Loss of the objective"),
    ],
)
def test_what_a_run_without_labels_is_known_by(
    learned: Path, missing: list[str], figure: str, claim: str
) -> None:
    add(learned, "summary.json", **dict.fromkeys(missing))
    said = headline(read_run(learned), Results())
    assert (said.figure, said.claim) == (figure, claim)
    assert said.tiles["Patches masked"] == "75 %"


def test_page_and_card_of_a_run_without_labels_say_the_same(learned: Path) -> None:
    run = read_run(learned)
    page, card = (write(run, Results()).read_text() for write in (write_page, write_card))
    for said in ("Top-1, 10 nearest neighbours, frozen features", "25.00 %", "0.5000", "--init"):
        assert said in page
        assert said in card
    assert "a masked autoencoder" in card


@pytest.mark.parametrize("rates", [{}, {"0.1": {"top1": 0.5}}])
def test_repeated_runs_choose_no_learning_rate(
    rates: dict[str, Any], make_run: MakeRun, measured: Measured, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", ["a", "b"])
    seeds = [{"run": "run-0", "seed": 0, "top1": 0.75}]
    add(run, "summary.json", sweep={"rates": rates, "runs": seeds, "split": "test"})
    listed = sections(read_run(run), Results(result=measured(["a", "b"])))
    (runs,) = (section for section in listed if section.anchor == "runs")
    lead = runs.blocks[0]
    assert isinstance(lead, Text)
    assert ("The learning rate is chosen" in lead.text) == bool(rates)
