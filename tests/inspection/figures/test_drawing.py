"""Figures into files: the same bytes each time, whole PDFs, no global state."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from patchword.inspection.figures.drawing import Format, encode
from patchword.inspection.figures.run import draw_confusion


@pytest.mark.parametrize("kind", ["png", "pdf"])
def test_the_same_figure_has_the_same_bytes(kind: Format) -> None:
    matrix = np.eye(3, dtype=np.int64)
    first, second = (encode(draw_confusion(matrix, list("abc")), kind) for _ in range(2))
    assert first == second


def test_a_pdf_is_whole_and_its_fonts_are_inside() -> None:
    drawn = encode(draw_confusion(np.eye(3, dtype=np.int64), list("abc")), "pdf")
    assert drawn.startswith(b"%PDF-")
    assert drawn.rstrip().endswith(b"%%EOF")
    assert b"/FontFile2" in drawn


def test_pyplot_is_never_loaded() -> None:
    code = "import sys, patchword.inspection.figures.run; print('matplotlib.pyplot' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.strip() == "False", answer.stderr
