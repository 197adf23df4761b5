"""Figures in words, and what a reader must know of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patchword.evaluation.classify import Classification, Classify
from patchword.report import words
from patchword.report.record import read_run
from patchword.spec.batch import Batch

Measured = Callable[..., Classification]
MakeRun = Callable[..., Path]


def test_wilson_interval_has_the_published_values() -> None:
    # Brown, Cai and DasGupta 2001; Newcombe 1998, table I, method 3
    assert words.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert words.wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert words.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert words.wilson(29, 29)[1] == 1.0
    assert words.wilson(0, 0) == (0.0, 1.0)


@given(n=st.integers(1, 10**6), share=st.floats(0, 1))
def test_wilson_interval_holds_the_proportion(n: int, share: float) -> None:
    successes = round(share * n)
    low, high = words.wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1


def test_numbers_in_words() -> None:
    assert [words.duration(s) for s in (8.42, 71.4, 59.96, 3599.7, 3900, 90000)] == [
        "8.4 s",
        "1 min 11 s",
        "1 min 00 s",
        "1 h 00 min",
        "1 h 05 min",
        "25 h 00 min",
    ]
    assert [words.significant(v) for v in (0, 0.012345, 1.2345, 912.3, 15800.2)] == [
        "0",
        "0.0123",
        "1.23",
        "912",
        "15,800",
    ]
    assert [words.operations(v) for v in (4262, 2.5, 2.5e-4, 1e-12)] == [
        "4,262 exaFLOPs",
        "2.50 exaFLOPs",
        "250 teraFLOPs",
        "0.00100 gigaFLOPs",
    ]
    assert words.count(1, "class", "classes") == "1 class"
    assert words.count(1200, "class", "classes") == "1,200 classes"
    assert words.images_of("held out", 7) == "7 images of \u201cheld out\u201d"


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("val", "also chose the best weights"),
        ("train", "says nothing of new ones"),
        ("all", "figures are too good"),
    ],
)
def test_notes_on_the_split(
    tmp_path: Path, split: str, expected: str, make_run: MakeRun, measured: Measured
) -> None:
    run = read_run(make_run(tmp_path / "run", ["a", "b"]))
    result = measured(["a", "b"], n=2000)
    assert any(expected in note for note in words.notes(run, result, split))
    assert words.notes(run, result, "test") == [
        "3 images of the data could not be read and were skipped."
    ]


def test_notes_on_classes_without_images(tmp_path: Path, make_run: MakeRun) -> None:
    run = read_run(make_run(tmp_path / "run", ["a", "b"]))
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
    said = " ".join(words.notes(run, result, "test"))
    assert "7 classes without an image here: c1, c2, c3, c4, c5 and 2 more." in said
    assert "1 class never predicted: c0." in said
