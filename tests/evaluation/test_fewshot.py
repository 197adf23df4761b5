"""Few-shot accuracy against scikit-learn's Ridge, and the laws of the closed form."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from patchword.evaluation.fewshot import few_shot, few_shot_accuracies, fit_least_squares
from patchword.spec.parse import PatchwordError

Clusters = Callable[..., tuple[Tensor, Tensor]]


def logits(head: tuple[Tensor, Tensor], features: Tensor) -> Tensor:
    return features.double() @ head[0].T + head[1]


def ridge_logits(support: Tensor, labels: Tensor, queries: Tensor, classes: int) -> np.ndarray:
    """The same problem in scikit-learn: standardised, and a feature of 100 regularised as all."""
    mean, std = support.double().mean(0), support.double().std(0, correction=0) + 1e-5

    def design(features: Tensor) -> np.ndarray:
        constant = torch.full((len(features), 1), 100.0)
        return torch.cat([(features.double() - mean) / std, constant], dim=1).numpy()

    targets = np.where(labels.numpy()[:, None] == np.arange(classes), 1.0, -1.0)
    model = Ridge(alpha=1024, fit_intercept=False, solver="cholesky")
    return model.fit(design(support), targets).predict(design(queries))


@pytest.mark.parametrize(
    ("count", "width"), [(200, 24), (12, 24), (24, 24), (25, 24), (9001, 3)], ids=str
)
def test_least_squares_agree_with_ridge(clusters: Clusters, count: int, width: int):
    support, labels = clusters(count, width, 7)
    queries, query_labels = clusters(60, width, 7, seed=3)
    head = fit_least_squares(support, labels, 7)
    wanted = ridge_logits(support, labels, queries, 7)
    assert np.abs(logits(head, queries).numpy() - wanted).max() < 1e-6
    share = float(np.mean(wanted.argmax(1) == query_labels.numpy()))
    assert few_shot(support, labels, queries, query_labels, 7) == pytest.approx(share)


def test_primal_and_dual_are_one(clusters: Clusters):
    """Features that do not vary add nothing, but make the dual the smaller problem."""
    support, labels = clusters(40, 20, 4)
    queries, _ = clusters(30, 20, 4, seed=3)
    constant = torch.full((40, 30), 0.25)
    primal = logits(fit_least_squares(support, labels, 4), queries)
    wide = fit_least_squares(torch.cat([support, constant], 1), labels, 4)
    dual = logits(wide, torch.cat([queries, constant[:30]], 1))
    assert (primal - dual).abs().max() < 1e-9
    assert primal.std() > 0.01


def test_a_class_without_images_is_never_preferred(clusters: Clusters):
    support, labels = clusters(60, 8, 3)
    head = fit_least_squares(support, labels, 5)
    assert int(logits(head, support).argmax(1).max()) == 2


def test_few_shot_accuracies(clusters: Clusters):
    features, labels = clusters(120, 16, 4, apart=3)
    keep = (labels != 3) | (torch.arange(120) < 28)  # class 3 has 7 images
    queries = clusters(80, 16, 4, apart=3, seed=0)
    found = few_shot_accuracies(
        features[keep], labels[keep], *queries, 4, shots=(1, 5, 10), seeds=4
    )
    assert list(found) == [1, 5, 10]
    assert [row.short for row in found.values()] == [0, 0, 1]
    for row in found.values():
        assert len(row.per_seed) == 4
        assert row.mean == pytest.approx(np.mean(row.per_seed))
        assert row.std == pytest.approx(np.std(row.per_seed, ddof=1))
    assert 0.25 < found[1].mean <= found[10].mean
    assert len(set(found[1].per_seed)) > 1  # the seed chooses the images
    again = few_shot_accuracies(features[keep], labels[keep], *queries, 4, shots=(5,), seeds=2)
    assert again[5].per_seed == found[5].per_seed[:2]
    exactly = few_shot_accuracies(features[keep], labels[keep], *queries, 4, shots=(7, 8), seeds=1)
    assert [row.short for row in exactly.values()] == [0, 1]
    everything = few_shot_accuracies(
        features[keep], labels[keep], *queries, 4, shots=(1000,), seeds=1
    )
    wanted = few_shot(features[keep], labels[keep], *queries, 4)
    assert everything[1000].per_seed == (pytest.approx(wanted),)
    assert everything[1000].std == 0


def test_what_is_not_a_problem_to_solve(clusters: Clusters):
    features, labels = clusters(10, 4, 3)
    with pytest.raises(PatchwordError, match="labels from 0 to 2 do not fit 2 classes"):
        fit_least_squares(features, labels, 2)
    with pytest.raises(PatchwordError, match="0 images with 0 labels"):
        fit_least_squares(features[:0], labels[:0], 3)
