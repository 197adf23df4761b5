"""Classification figures against scikit-learn, a brute-force ECE, and laws on batches and masks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from patchword.data.class_names import imagenet, read_class_names
from patchword.evaluation.classify import Classify, unique_names
from patchword.evaluation.matching import match_classes, match_positions
from patchword.spec.batch import Batch
from patchword.spec.parse import PatchwordError

UNDEFINED: Any = np.nan


def as_batches(
    labels: np.ndarray, sizes: Sequence[int], *, pad: int = 0, bad: Iterable[int] = ()
) -> list[Batch]:
    """Batches whose images carry their own position, so that a table can serve as the model."""
    bad = set(bad)
    batches, start = [], 0
    for size in sizes:
        index = torch.arange(start, min(start + size, len(labels)))
        start += size
        real = len(index)
        position = torch.cat([index, torch.full((pad,), -1)])
        image = torch.zeros(real + pad, 2, 1, 1, dtype=torch.uint8)
        image[:, 0, 0, 0] = (position.clamp(min=0) // 256).to(torch.uint8)
        image[:, 1, 0, 0] = (position.clamp(min=0) % 256).to(torch.uint8)
        label = torch.full((real + pad,), -7)
        label[:real] = torch.from_numpy(labels)[index]
        readable = torch.tensor([int(i) >= 0 and int(i) not in bad for i in position])
        batches.append(
            Batch(
                images=image,
                labels=label,
                mask=readable,
                indices=position,
                bad=tuple((int(i), "truncated") for i in index if int(i) in bad),
            )
        )
    return batches


def table_model(logits: np.ndarray):
    table = torch.from_numpy(logits)

    def forward(images: torch.Tensor) -> torch.Tensor:
        position = images[:, 0, 0, 0] * 256 + images[:, 1, 0, 0]
        return table[position.long()]

    return forward


def classify(logits: np.ndarray, labels: np.ndarray, batch: int = 32, **options: Any):
    sizes = [batch] * math.ceil(len(labels) / batch)
    batches = as_batches(labels, sizes)
    names = [f"c{i}" for i in range(logits.shape[1])]
    return Classify(lambda: batches, names, torch.Tensor.float, **options).measure(
        table_model(logits)
    )


def draw(n: int, classes: int, seed: int = 0, scale: float = 2.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = (rng.normal(size=(n, classes)) * scale).astype(np.float32)
    logits[np.arange(n), labels] += 1.5
    return logits, labels


def brute_force_ece(probability: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    confidence = probability.max(1)
    hit = probability.argmax(1) == labels
    total = 0.0
    for i in range(bins):
        inside = [j for j, value in enumerate(confidence) if i / bins < value <= (i + 1) / bins]
        if inside:
            gap = np.mean([hit[j] for j in inside]) - np.mean([confidence[j] for j in inside])
            total += abs(gap) * len(inside) / len(labels)
    return float(total)


def brute_force_brier(probability: np.ndarray, labels: np.ndarray) -> float:
    total = 0.0
    for row, label in zip(probability.tolist(), labels.tolist(), strict=True):
        total += sum((p - (k == label)) ** 2 for k, p in enumerate(row))
    return total / len(labels)


@pytest.mark.parametrize("classes", [2, 7, 40])
def test_figures_equal_scikit_learn(classes: int) -> None:
    logits, labels = draw(333, classes, seed=classes)
    result = classify(logits, labels)
    wide = logits.astype(np.float64)
    probability = np.exp(wide) / np.exp(wide).sum(1, keepdims=True)
    every = list(range(classes))
    predicted = probability.argmax(1)
    assert result.n == 333
    assert result.top1 == pytest.approx(metrics.accuracy_score(labels, predicted), abs=1e-12)
    assert result.loss == pytest.approx(
        metrics.log_loss(labels, probability, labels=every), abs=1e-9
    )
    balanced = metrics.balanced_accuracy_score(labels, predicted)
    assert result.balanced == pytest.approx(balanced, abs=1e-12)
    assert result.brier == pytest.approx(brute_force_brier(probability, labels), abs=1e-12)
    if classes > 5:
        top5 = metrics.top_k_accuracy_score(labels, probability, k=5, labels=every)
        assert result.top5 == pytest.approx(top5, abs=1e-12)
    else:
        assert result.top5 == 1.0
    np.testing.assert_array_equal(
        result.confusion(), metrics.confusion_matrix(labels, predicted, labels=every)
    )
    report: Any = metrics.classification_report(
        labels, predicted, labels=every, output_dict=True, zero_division=UNDEFINED
    )
    for i, row in enumerate(result.per_class.values()):
        expected_row = report[str(i)]
        assert row["n"] == expected_row["support"]
        for key in ("recall", "precision"):
            measured, expected = row[key], expected_row[key]
            assert (measured is None) == np.isnan(expected)
            assert measured is None or measured == pytest.approx(expected, abs=1e-12)
    np.testing.assert_allclose(result.confidence, probability.max(1), atol=1e-6)
    np.testing.assert_array_equal(result.indices, np.arange(333))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 200), scale=st.floats(0.01, 20))
def test_calibration_error_equals_brute_force(seed: int, n: int, scale: float) -> None:
    logits, labels = draw(n, 6, seed, scale)
    probability = torch.from_numpy(logits).double().softmax(1).float().double().numpy()
    result = classify(logits, labels)
    assert result.ece == pytest.approx(brute_force_ece(probability, labels), abs=1e-9)
    edges, accuracy, confidence, count = result.reliability()
    assert count.sum() == n
    filled = count > 0
    assert np.isnan(accuracy[~filled]).all()
    assert np.nansum(accuracy * count) == pytest.approx(result.top1 * n)
    assert (confidence[filled] > edges[:-1][filled] - 1e-6).all()
    assert (confidence[filled] < edges[1:][filled] + 1e-6).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(1, 60), pad=st.integers(0, 5))
def test_batch_sizes_padding_and_unreadable_images_change_nothing(
    data: st.DataObject, n: int, pad: int
) -> None:
    logits, labels = draw(n, 8, seed=n)
    bad = data.draw(st.sets(st.integers(0, n - 1), max_size=n - 1))
    sizes: list[int] = []
    while sum(sizes) < n:
        sizes.append(data.draw(st.integers(1, n)))
    batches = as_batches(labels, sizes, pad=pad, bad=bad)
    names = [f"c{i}" for i in range(8)]
    result = Classify(lambda: batches, names, torch.Tensor.float).measure(table_model(logits))
    good = np.array(sorted(set(range(n)) - bad))
    expected = classify(logits[good], labels[good], batch=n)
    assert result.n == len(good)
    assert result.skipped == len(bad)
    assert [index for index, _ in result.bad] == sorted(bad)
    np.testing.assert_array_equal(result.indices, good)
    assert result.scalars() == expected.scalars()  # exactly: the order of summation is fixed
    assert result.per_class == expected.per_class


def test_ties_rank_by_class_index() -> None:
    labels = np.arange(8)
    result = classify(np.zeros((8, 8), np.float32), labels)
    assert (result.predicted == 0).all()
    assert result.top1 == 1 / 8
    assert result.top5 == 5 / 8


def test_labels_map_to_a_larger_model() -> None:
    logits, _ = draw(50, 12)
    data_labels = np.random.default_rng(1).integers(0, 3, 50)
    label_map = match_classes(["c7", "c0", "c11"], [f"c{i}" for i in range(12)])
    assert label_map == [7, 0, 11]
    mapped = classify(logits, data_labels, label_map=label_map)
    direct = classify(logits, np.array(label_map)[data_labels])
    assert mapped.to_dict() == direct.to_dict()
    assert mapped.per_class["c1"]["n"] == 0
    assert mapped.per_class["c1"]["recall"] is None


def test_unknown_classes_stop_before_the_first_batch() -> None:
    data_classes = ["cat", "yak", "gnu", "emu", "ant"]
    label_map = match_classes(data_classes, ["dog", "cat"])
    assert label_map == [1, -1, -1, -1, -1]
    with pytest.raises(PatchwordError, match=r"4 of the data's 5 classes: 'yak', 'gnu', 'emu', \."):
        Classify(lambda: [], ["dog", "cat"], torch.Tensor.float, label_map, "softmax", data_classes)
    with pytest.raises(PatchwordError, match="label_map names class 2"):
        Classify(lambda: [], ["dog", "cat"], torch.Tensor.float, [0, 2])


def test_repeated_class_names() -> None:
    names = ["crane", "dog", "crane"]
    assert unique_names(names) == ["crane (0)", "dog", "crane (2)"]
    assert match_classes(names, names) == [0, 1, 2]
    assert match_classes(["dog"], names) == [1]
    with pytest.raises(PatchwordError, match="2 classes named 'crane'"):
        match_classes(["crane"], names)


def test_sigmoid_loss_and_confidence() -> None:
    logits, labels = draw(64, 5, scale=8)
    result = classify(logits, labels, loss="sigmoid")
    wide, target = torch.from_numpy(logits).double(), torch.from_numpy(labels)
    one_hot = torch.nn.functional.one_hot(target, 5).double()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        wide, one_hot, reduction="none"
    ).sum(1)
    assert result.loss == pytest.approx(float(expected.mean()), abs=1e-9)
    np.testing.assert_allclose(result.confidence, wide.amax(1).sigmoid().numpy(), atol=1e-6)
    assert result.brier == pytest.approx(
        brute_force_brier(wide.sigmoid().numpy(), labels), abs=1e-12
    )
    assert result.top1 == classify(logits, labels).top1


def test_balanced_accuracy_leaves_absent_classes_out() -> None:
    logits, labels = draw(60, 6, seed=3)
    labels = np.where(labels > 3, 0, labels)
    result = classify(logits, labels)
    recalls = [(logits.argmax(1) == labels)[labels == k].mean() for k in range(4)]
    assert result.balanced == pytest.approx(np.mean(recalls), abs=1e-12)
    assert result.balanced != pytest.approx(result.top1, abs=1e-3)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_temperature_divides_the_logits_and_changes_no_label(loss: Any) -> None:
    logits, labels = draw(80, 5)
    found = classify(logits, labels, loss=loss, temperature=1.7)
    wanted = classify(logits.astype(np.float64) / 1.7, labels, loss=loss)
    plain = classify(logits, labels, loss=loss)
    for name in ("loss", "ece", "brier"):
        assert vars(found)[name] == pytest.approx(vars(wanted)[name], abs=1e-5)
        assert vars(found)[name] != pytest.approx(vars(plain)[name], abs=1e-3)
    np.testing.assert_allclose(found.confidence, wanted.confidence, atol=1e-6)
    np.testing.assert_array_equal(found.predicted, plain.predicted)
    assert (found.top1, found.top5) == (plain.top1, plain.top5)


def test_collected_logits_give_the_same_figures_at_any_temperature(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Masked, bad and padded images included, and in chunks of another size than the batches."""
    monkeypatch.setattr("patchword.evaluation.classify.CHUNK", 7)
    logits, labels = draw(50, 5)
    batches = as_batches(labels, [20, 20, 20], pad=2, bad=[3, 44])

    def evaluator(temperature: float) -> Classify:
        return Classify(lambda: batches, list("abcde"), torch.Tensor.float, temperature=temperature)

    scores = evaluator(3.0).collect(table_model(logits))
    assert scores.logits.shape == (48, 5)
    for temperature in (0.3, 1.0, 3.0):
        found = evaluator(9.0).at(scores, temperature)
        wanted = evaluator(temperature).measure(table_model(logits))
        assert found.to_dict() == wanted.to_dict()
        assert found.bad == wanted.bad
        np.testing.assert_array_equal(found.indices, wanted.indices)


def test_huge_logits_stay_finite() -> None:
    logits = np.array([[1e30, -1e30], [-1e30, 1e30]], np.float32)
    for loss in ("softmax", "sigmoid"):
        result = classify(logits, np.array([0, 1]), loss=loss)
        assert result.loss == 0.0
        assert result.ece == 0.0
        assert result.brier == 0.0


def test_json_has_the_same_keys_and_no_nan() -> None:
    logits, labels = draw(3, 9)
    value = json.loads(json.dumps(classify(logits, labels).to_dict(), allow_nan=False))
    assert list(value) == [
        *("n", "top1", "top5", "balanced", "loss", "ece", "brier", "per_class", "skipped")
    ]
    assert list(value["per_class"]["c0"]) == ["n", "recall", "precision"]


def test_the_most_confident_mistakes_come_first() -> None:
    logits, labels = draw(200, 4)
    result = classify(logits, labels)
    worst = result.mistakes(10)
    wrong = result.labels != result.predicted
    assert wrong[worst].all()
    np.testing.assert_array_equal(
        result.confidence[worst], np.sort(result.confidence[wrong])[::-1][:10]
    )
    assert len(result.mistakes(10_000)) == wrong.sum()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_are_an_error(value: float) -> None:
    logits, labels = draw(20, 4)
    logits[13, 2] = value
    with pytest.raises(PatchwordError, match="image 13 is not finite"):
        classify(logits, labels, batch=7)


def test_errors_name_cause_and_next_step() -> None:
    logits, labels = draw(6, 4)
    with pytest.raises(PatchwordError, match="label 4 is not one of the 4 classes"):
        classify(logits, np.array([0, 1, 2, 3, 4, 0]))
    with pytest.raises(PatchwordError, match=r"shape \[6, 4\] for 6 images and 3 class names"):
        Classify(lambda: as_batches(labels, [6]), list("abc"), torch.Tensor.float).measure(
            table_model(logits)
        )
    unreadable = as_batches(labels, [6], bad=range(6))
    with pytest.raises(PatchwordError, match="none of the 6 images could be read"):
        Classify(lambda: unreadable, list("abcd"), torch.Tensor.float).measure(table_model(logits))
    with pytest.raises(PatchwordError, match="there are none"):
        Classify(lambda: [], list("abcd"), torch.Tensor.float).measure(table_model(logits))


def test_progress_and_repeated_calls() -> None:
    logits, labels = draw(25, 4)
    batches = as_batches(labels, [10, 10, 10], pad=2)
    evaluator = Classify(lambda: iter(batches), list("abcd"), torch.Tensor.float)
    seen: list[int] = []
    result = evaluator.measure(table_model(logits), seen.append)
    assert seen == [10, 20, 25]
    assert evaluator(table_model(logits)) == result.scalars()


def test_no_gradient_is_kept() -> None:
    weight = torch.ones(4, requires_grad=True)
    logits, labels = draw(9, 4)
    forward = table_model(logits)
    enabled: list[bool] = []

    def scaled(images: torch.Tensor) -> torch.Tensor:
        enabled.append(torch.is_grad_enabled())
        return forward(images) * weight

    evaluator = Classify(lambda: as_batches(labels, [9]), list("abcd"), torch.Tensor.float)
    evaluator(scaled)
    assert enabled == [False]


# Names of ImageNet, and models without names ------------------------------------------------------


def test_imagenet_labels_match_by_id_or_by_english_name() -> None:
    names, ids = read_class_names("imagenet"), [row.id for row in imagenet()]
    everywhere = list(range(1000))
    assert match_classes(ids, names) == everywhere
    assert match_classes(names, ids) == everywhere
    full = [row.synonyms for row in imagenet() if row.id not in ("n02012849", "n03126707")]
    assert full[0] == "tench, Tinca tinca"
    data = ["n02099601", "goldfish", "great_white_shark", "rot"]
    assert match_classes(data, names) == [207, 1, 2, -1]
    assert match_classes(["n01440764", "goldfish"], ["goldfish, Carassius auratus", "tench"]) == [
        1,
        0,
    ]


@pytest.mark.parametrize("name", ["crane", "Crane", "cardigan", "Cardigan", "maillot"])
def test_a_name_of_two_imagenet_classes_matches_neither(name: str) -> None:
    for classes in (read_class_names("imagenet"), [row.id for row in imagenet()]):
        with pytest.raises(PatchwordError, match=rf"'{name}' .* 2 classes of ImageNet.* n0\d+"):
            match_classes(["tench", name], classes)


def test_a_models_own_name_wins_over_imagenets() -> None:
    assert match_classes(["crane", "maillot"], ["maillot", "crane"]) == [1, 0]
    assert match_classes(["n02012849"], ["crane", "dog"]) == [-1]  # either crane


def test_two_names_of_one_class_are_refused() -> None:
    with pytest.raises(PatchwordError, match=r"'tench' and 'n01440764' are both .*'tench'"):
        match_classes(["n01440764", "tench"], read_class_names("imagenet"))


def test_classes_without_names_match_by_position_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert match_positions(["cat", "dog"], 2) == [0, 1]
    assert "does not name its 2 classes" in caplog.text
    assert "--classes" in caplog.text
    with pytest.raises(PatchwordError, match=r"3 classes.* the data have 2.*--classes FILE") as one:
        match_positions(["cat", "dog"], 3)
    assert "imagenet" not in str(one.value)
    with pytest.raises(PatchwordError, match=r"1,000 classes.* 2.*--classes imagenet"):
        match_positions(["cat", "dog"], 1000)
