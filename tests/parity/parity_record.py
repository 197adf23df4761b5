"""The table docs/parity.md: `PARITY_TABLE=docs/parity.md pytest tests/parity` writes it."""

from __future__ import annotations

import os
import re
from pathlib import Path

FORMATS = {
    "test_timm": "timm",
    "test_torchvision": "torchvision",
    "test_huggingface": "Hugging Face",
    "test_google_npz": "Google npz",
    "test_bit_npz": "Google BiT npz",
    "test_big_vision": "big_vision npz",
}
INTRODUCTION = """# Parity

For each format and kind of model: the other library builds a small model with random weights, noise
on all of its parameters; patchword reads them; the figure is the largest difference of float32
logits, over the largest logit. For the Google formats, whose code does not run here, the other side
is the published equations in float64 (`tests/parity/flax_reference.py`). The tests also compare
gradients, write what can be written, let the other library load that, and find the same again.

`PARITY_TABLE=docs/parity.md python -m pytest tests/parity` writes this page.
"""
WORST: dict[tuple[str, str], float] = {}


def noted(difference: float) -> float:
    """Returns the difference of float32 logits that the running test found, and notes the worst
    by format and case, which is what tells the test's parameters apart."""
    test = re.match(r".*?(\w+)\.py::(\w+)(?:\[(.*)\])?", os.environ["PYTEST_CURRENT_TEST"])
    assert test is not None
    form, function, case = FORMATS[test[1]], test[2], test[3] or ""
    if "BiT" in form:
        case = "BiT-R50x1"
    elif "mixer" in function:
        case = "Mixer"
    elif "tower" in function:
        case = "image tower of two"
    elif form == "torchvision":
        case = "ViT"
    case = re.sub(r"-(memory|file|params/|hints\d+)?$|^(memory|file|params/)-", "", case)
    WORST[form, case] = max(difference, WORST.get((form, case), 0.0))
    return difference


def write_table(path: Path) -> None:
    rows = [f"| {form} | {case} | {worst:.1e} |\n" for (form, case), worst in WORST.items()]
    head = INTRODUCTION + "\n| format | model | worst difference of logits |\n|---|---|---|\n"
    path.write_text(head + "".join(rows), encoding="utf-8")
