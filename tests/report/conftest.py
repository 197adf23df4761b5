"""Run directories and results to report on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from patchword.evaluation.classify import Classification, Classify
from patchword.spec.batch import Batch
from patchword.spec.parse import to_dict
from patchword.spec.train import OptimSpec, TrainSpec

NAMES = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a & b</td></table>",
    "pipe | `tick` *star* $x_1$",
    "日本語 \u2028 line",
    "colon: {yaml} # [list]\n---\nnew",
    "lone \udc80 surrogate",
]


@pytest.fixture(scope="session")
def nasty() -> list[str]:
    """Names of classes that mean something in HTML, Markdown or YAML."""
    return NAMES


@pytest.fixture(scope="session")
def measured() -> Callable[..., Classification]:
    """`measured(names, n, seed, skipped)`: a result on random logits."""
    return _measured


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """`make_run(path, names, **changes)`: a run directory that records all there is."""
    return _make_run


def _measured(
    names: Sequence[str], n: int = 120, seed: int = 0, skipped: int = 0
) -> Classification:
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


def _make_run(path: Path, names: Sequence[str], **changes: Any) -> Path:
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
