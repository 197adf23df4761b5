import hashlib
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchword.data.registry import open_source
from patchword.data.splits import divide, drawn, hold_out, load_division, save_division
from patchword.spec.data import DataSpec
from patchword.spec.parse import PatchwordError

# The fixtures used below hold no state, so one serves all examples.
law = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
labels = st.lists(st.integers(0, 6), min_size=1, max_size=150)
fractions = st.floats(0, 0.45)


@law
@given(labels=labels, val=fractions, test=fractions, seed=st.integers(0, 99))
def test_division_of_unsplit_data(labelled, labels, val, test, seed):
    source = labelled(labels)
    parts = divide(source, val=val, test=test, seed=seed)
    assert list(parts) == ["train", "val", "test"]
    assert all(part.dtype == np.int64 for part in parts.values())
    # Disjoint and complete.
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(labels)))
    # Every class keeps an image to train on (a class of one has no other place).
    assert set(source.labels[parts["train"]]) == set(labels)
    counts = np.bincount(labels)
    room = int(np.maximum(counts - 1, 0).sum())
    for part, fraction in (("test", test), ("val", val)):
        wanted = max(1, round(fraction * len(labels))) if fraction else 0
        assert len(parts[part]) == min(wanted, room)
        room -= len(parts[part])
    # The same again for the same seed.
    again = divide(source, val=val, test=test, seed=seed)
    assert all(np.array_equal(parts[part], again[part]) for part in parts)


@law
@given(per_class=st.integers(4, 30), classes=st.integers(1, 8), seed=st.integers(0, 99))
def test_classes_are_held_out_alike(labelled, per_class, classes, seed):
    source = labelled(list(range(classes)) * per_class)
    parts = divide(source, val=0.2, test=0.2, seed=seed)
    for part in ("val", "test"):
        counts = np.bincount(source.labels[parts[part]], minlength=classes)
        assert np.abs(counts - 0.2 * per_class).max() <= 1


@given(labels=labels, count=st.integers(1, 160), seed=st.integers(0, 99))
def test_a_share_is_drawn_of_each_class(labels, count, seed):
    values = np.array(labels)
    indices = np.flatnonzero(np.arange(2 * len(labels)) % 2)  # positions in a larger source
    everything = np.zeros(2 * len(labels), np.int64)
    everything[indices] = values
    chosen = drawn(everything, indices, count, seed)
    assert set(chosen) <= set(indices)
    assert (np.diff(chosen) > 0).all()
    assert len(chosen) == min(len(labels), max(count, len(set(labels))))
    assert set(everything[chosen]) == set(labels)
    share = count / len(labels)
    for k in set(labels):
        if share < 1 and count >= 7 * len(set(labels)):
            wanted = share * int((values == k).sum())
            assert abs(int((everything[chosen] == k).sum()) - max(1, wanted)) <= 1 + 1e-9
    assert np.array_equal(chosen, drawn(everything, indices, count, seed))


def test_the_largest_remainders_are_rounded_up():
    """A tenth of 6, 14 and 10 images is 0.6, 1.4 and 1: three in all."""
    labels = np.repeat([0, 1, 2], [6, 14, 10])
    for seed in range(5):
        _, (held,) = hold_out(labels, np.arange(30), [0.1], seed)
        assert np.bincount(labels[held]).tolist() == [1, 1, 1]


def test_seeds_differ(labelled):
    one, two = (drawn(np.zeros(200, np.int64), np.arange(200), 20, seed) for seed in (0, 1))
    assert not np.array_equal(one, two)

    source = labelled([0, 1] * 50)
    a, b = (divide(source, val=0.1, test=0.1, seed=seed)["test"] for seed in (0, 1))
    assert not np.array_equal(a, b)


def test_given_splits_are_kept(labelled):
    labels = [0, 1] * 20
    at = list(range(40))
    full = {"train": at[:20], "val": at[20:30], "test": at[30:]}
    for kept in (["train", "val", "test"], ["train", "val"], ["val", "test"], ["test"], ["val"]):
        parts = divide(
            labelled(labels, {part: full[part] for part in kept}), val=0.1, test=0.1, seed=0
        )
        assert {part: list(at) for part, at in parts.items()} == {
            part: full[part] if part in kept else [] for part in full
        }


def test_val_comes_out_of_train_beside_a_given_test(labelled):
    source = labelled([0, 1] * 50, {"train": list(range(80)), "test": list(range(80, 100))})
    parts = divide(source, val=0.25, test=0.1, seed=3)
    assert list(parts["test"]) == list(range(80, 100))
    assert len(parts["val"]) == 20
    assert sorted([*parts["train"], *parts["val"]]) == list(range(80))


def test_train_alone_is_divided_like_unsplit_data(labelled):
    labels = [0, 1] * 50
    unsplit = divide(labelled(labels), val=0.1, test=0.2, seed=0)
    alone = divide(labelled(labels, {"train": list(range(100))}), val=0.1, test=0.2, seed=0)
    assert all(np.array_equal(unsplit[part], alone[part]) for part in unsplit)


def test_digits_have_their_own_fractions():
    source = open_source("digits")
    usual = DataSpec()
    parts = divide(source, val=usual.val_fraction, test=usual.test_fraction, seed=0)
    assert {part: len(at) for part, at in parts.items()} == {"train": 1366, "val": 72, "test": 359}
    asked = divide(source, val=0.3, test=0.1, seed=0)
    assert (len(asked["val"]), len(asked["test"])) == (539, 180)


def test_a_division_is_saved_and_found_again(tmp_path, folder):
    source = open_source(str(folder({"cat": 12, "dog": 9})))
    parts = divide(source, val=0.2, test=0.2, seed=0)
    save_division(tmp_path / "division.json", source, parts)
    loaded = load_division(tmp_path / "division.json", open_source(str(tmp_path / "pets")))
    assert all(np.array_equal(parts[part], loaded[part]) for part in parts)
    assert json.loads((tmp_path / "division.json").read_text())["fingerprint"] == source.fingerprint


def test_changed_data_are_named(tmp_path, folder):
    root = folder({"cat": 12, "dog": 9})
    path = tmp_path / "division.json"
    source = open_source(str(root))
    save_division(path, source, divide(source, val=0.2, test=0.2, seed=0))
    content = (root / "cat/003.png").read_bytes()

    (root / "cat/003.png").write_bytes(content + b"\0")
    with pytest.raises(PatchwordError, match="file contents changed; restore"):
        load_division(path, open_source(str(root)))
    (root / "cat/003.png").unlink()
    (root / "dog/extra.png").write_bytes(content)
    with pytest.raises(PatchwordError) as caught:
        load_division(path, open_source(str(root)))
    assert "1 gone (such as cat/003.png), 1 new (such as dog/extra.png)" in str(caught.value)
    assert "\n" not in str(caught.value)


def as_of_old(path, source, parts):
    """Write a division as versions did that knew file sizes only."""
    made = {
        "files": "\0".join(source.keys).encode(),
        "labels": source.labels.astype("<i8").tobytes(),
        "classes": "\0".join(source.classes).encode(),
        "file sizes": source.sizes.astype("<i8").tobytes(),
    }
    digests = {what: hashlib.sha256(data).hexdigest() for what, data in made.items()}
    content = {
        "fingerprint": hashlib.sha256("".join(digests.values()).encode()).hexdigest(),
        "digests": digests,
    }
    content |= {part: [source.keys[i] for i in at] for part, at in parts.items()}
    path.write_text(json.dumps(content, indent=0))


def test_a_division_of_an_earlier_version_is_matched_by_its_keys(tmp_path, folder, caplog):
    root = folder({"cat": 12, "dog": 9})
    source = open_source(str(root))
    parts = divide(source, val=0.2, test=0.2, seed=0)
    path = tmp_path / "splits.json"
    as_of_old(path, source, parts)
    caplog.set_level("INFO")
    loaded = load_division(path, source)
    assert all(np.array_equal(parts[part], loaded[part]) for part in parts)
    (record,) = caplog.records
    assert "of an earlier version: its images are matched by name" in record.getMessage()
    caplog.clear()
    save_division(path, source, parts)
    load_division(path, source)
    assert not caplog.records

    as_of_old(path, source, parts)
    (root / "cat/003.png").write_bytes(b"")
    with pytest.raises(PatchwordError, match="file sizes changed; restore"):
        load_division(path, open_source(str(root)))


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"fingerprint": 1}'])
def test_a_broken_record_is_an_error(tmp_path, labelled, content):
    path = tmp_path / "division.json"
    path.write_text(content)
    with pytest.raises(PatchwordError, match="cannot be read as a division"):
        load_division(path, labelled([0, 1]))
