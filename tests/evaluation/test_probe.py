"""Nearest neighbours and logistic regression against scikit-learn and plain loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from patchword.evaluation import probe
from patchword.evaluation.linear import accuracy, cross_entropy
from patchword.evaluation.probe import GRID, fit_logistic, knn, sweep_logistic
from patchword.spec.parse import PatchwordError

Clusters = Callable[..., tuple[Tensor, Tensor]]


def logits(head: tuple[Tensor, Tensor], features: Tensor) -> Tensor:
    return features.double() @ head[0].T + head[1]


# Nearest neighbours -------------------------------------------------------------------------------


def test_knn_agrees_with_a_plain_loop(clusters: Clusters):
    support, labels = clusters(90, 6, 5, apart=0.5)
    queries, _ = clusters(50, 6, 5, apart=0.5, seed=3)
    found = knn(support - 5, labels, queries - 5, k=(1, 10, 20), temperature=0.07)
    known = (support - 5).double().numpy()
    for k, said in found.items():
        for query, answer in zip((queries - 5).double().numpy(), said.tolist(), strict=True):
            norms = np.linalg.norm(known, axis=1) * np.linalg.norm(query)
            similarity = known @ query / norms
            votes = np.zeros(5)
            for place in np.argsort(-similarity)[:k]:
                votes[int(labels[place])] += np.exp(similarity[place] / 0.07)
            assert answer == votes.argmax()
    assert not torch.equal(found[1], found[20])


def test_knn_agrees_with_scikit_learn(clusters: Clusters):
    support, labels = clusters(200, 12, 6, apart=0.5)
    queries, _ = clusters(100, 12, 6, apart=0.5, seed=3)

    def votes(distance: Any) -> Any:
        return np.exp((1 - distance) / 0.07)

    options: dict[str, Any] = {"algorithm": "brute", "weights": votes}
    model = KNeighborsClassifier(10, metric="cosine", **options)
    centred = support.double() - 5
    wanted = model.fit(centred.numpy(), labels.numpy()).predict(queries.double().numpy() - 5)
    assert (knn(centred, labels, queries.double() - 5)[10].numpy() == wanted).all()


def test_knn_of_few_images_and_low_temperature(clusters: Clusters):
    support, labels = clusters(6, 4, 3)
    found = knn(support - 5, labels, support - 5, k=(10,), temperature=1e-4)
    assert torch.equal(found[10], labels)  # the image itself outweighs the rest, without overflow


# Logistic regression ------------------------------------------------------------------------------


@pytest.mark.parametrize(("l2", "within"), [(1.0, 1e-6), (1e-2, 1e-5), (1e-4, 5e-4)])
@pytest.mark.parametrize("count", [150, 15])
def test_logistic_agrees_with_scikit_learn(
    clusters: Clusters, count: int, l2: float, within: float
):
    """Newton's method there. With little regularisation the optimum is flat."""
    features, labels = clusters(count, 20, 5, apart=0.5)
    queries, _ = clusters(40, 20, 5, apart=0.5, seed=3)
    mean, std = features.double().mean(0), features.double().std(0, correction=0) + 1e-5
    model = LogisticRegression(C=1 / (count * l2), tol=1e-10, solver="newton-cholesky")
    model.fit(((features.double() - mean) / std).numpy(), labels.numpy())
    wanted = model.predict_proba(((queries.double() - mean) / std).numpy())
    found = logits(fit_logistic(features, labels, 5, l2), queries).softmax(1).numpy()
    assert np.abs(found - wanted).max() < within
    assert found.max() > found.min() + 0.01


def test_the_optimum_has_no_gradient(clusters: Clusters):
    """By autograd, in the problem as it is stated."""
    features, labels = clusters(120, 10, 4, apart=0.5)
    mean, std = features.double().mean(0), features.double().std(0, correction=0) + 1e-5
    weight, bias = fit_logistic(features, labels, 4, 0.01)
    standard = (weight * std).requires_grad_()
    free = (bias + weight @ mean).requires_grad_()
    output = ((features.double() - mean) / std) @ standard.T + free
    loss = torch.nn.functional.cross_entropy(output, labels) + 0.005 * standard.square().sum()
    for gradient in torch.autograd.grad(loss, [standard, free]):
        assert gradient.abs().max() < 1e-7
    assert weight.dtype == bias.dtype == torch.float64


def test_logistic_copes_with_poor_data():
    """One image a class, features that never vary or only repeat, and classes without images."""
    g = torch.Generator().manual_seed(0)
    varied = torch.randn(3, 4, generator=g)
    features = torch.cat([varied, torch.full((3, 2), 7.0), varied[:, :2]], 1)
    labels = torch.tensor([0, 2, 5])
    weight, bias = fit_logistic(features, labels, 7, 1e-3)
    assert weight.isfinite().all()
    assert bias.isfinite().all()
    output = logits((weight, bias), features)
    assert torch.equal(output.argmax(1), labels)
    assert weight[[1, 3, 4, 6]].abs().max() == 0
    elsewhere = logits((weight, bias), 10 * torch.randn(50, 8, generator=g)).softmax(1)
    assert elsewhere[:, [1, 3, 4, 6]].max() <= np.exp(-10)
    only = torch.zeros(4, dtype=torch.int64)
    one = fit_logistic(torch.ones(4, 3), only, 2, 1.0)
    assert torch.equal(logits(one, torch.randn(9, 3)).argmax(1), torch.zeros(9, dtype=torch.int64))


def test_sweep_takes_the_best_on_the_development_set(clusters: Clusters):
    features, labels = clusters(400, 30, 5, apart=0.2)
    train, val = slice(0, 60), slice(60, 400)
    grid = (10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4)
    args = (features[train], labels[train], features[val], labels[val])
    best = sweep_logistic(*args, 5, l2=grid)
    rows = {l2: (share, loss) for l2, share, loss in best.table}
    assert best.l2 == max(rows, key=lambda l2: (rows[l2][0], -rows[l2][1]))
    assert rows[best.l2] == (best.accuracy, best.loss)
    assert accuracy(best.weight, best.bias, *args[2:]) == best.accuracy
    assert cross_entropy(best.weight, best.bias, *args[2:]) == pytest.approx(best.loss)
    for l2, (share, loss) in rows.items():  # as if fitted alone
        head = fit_logistic(*args[:2], 5, l2)
        assert accuracy(*head, *args[2:]) == pytest.approx(share, abs=0.006)
        assert cross_entropy(*head, *args[2:]) == pytest.approx(loss, rel=2e-3)
    assert min(loss for _, loss in rows.values()) < best.table[0][2]


def test_the_path_ends_after_four_in_a_row_that_are_worse(
    clusters: Clusters, monkeypatch: pytest.MonkeyPatch
):
    """Three are not enough: the best may come after them, and then it is taken."""
    shares = [0.5, 0.4, 0.4, 0.4, 0.6, 0.6, 0.5, 0.5, 0.5, 0.9]  # of equals the lower loss
    losses = [1.0, 1.2, 1.3, 1.4, 0.9, 1.2, 1.3, 1.4, 1.5, 0.1]
    heads: list[Tensor] = []

    def share(weight: Tensor, *_: Tensor) -> float:
        heads.append(weight)
        return shares[len(heads) - 1]

    monkeypatch.setattr(probe, "accuracy", share)
    monkeypatch.setattr(probe, "cross_entropy", lambda *_: losses[len(heads) - 1])
    features, labels = clusters(30, 4, 3)
    found = sweep_logistic(features, labels, features, labels, 3)
    assert found.table == tuple(zip(GRID[:9], shares[:9], losses[:9], strict=True))
    assert (found.l2, found.accuracy, found.loss) == (GRID[4], 0.6, 0.9)
    assert torch.equal(found.weight, heads[4])


def test_what_is_not_a_problem_to_solve(clusters: Clusters):
    features, labels = clusters(10, 4, 3)
    with pytest.raises(PatchwordError, match="labels from 0 to 2 do not fit 2 classes"):
        fit_logistic(features, labels, 2, 1.0)
    with pytest.raises(PatchwordError, match="0 images with 0 labels"):
        fit_logistic(features[:0], labels[:0], 3, 1.0)
    with pytest.raises(PatchwordError, match="l2 is 0"):
        fit_logistic(features, labels, 3, 0.0)
