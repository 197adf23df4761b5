import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patchword.data.loader import (
    OnBad,
    Plan,
    cache_images,
    eval_batches,
    train_batches,
    worth_caching,
)
from patchword.data.registry import open_source
from patchword.data.transforms import EvalTransform, TrainTransform
from patchword.spec.data import AugmentSpec
from patchword.spec.model import PreprocessSpec
from patchword.spec.parse import PatchwordError

SIZE = (8, 8)
RANDOM = TrainTransform(SIZE, 3, PreprocessSpec(), AugmentSpec(randaugment_layers=1))
FIXED = TrainTransform(SIZE, 3, PreprocessSpec(), AugmentSpec(crop="resize"))
EVALUATION = EvalTransform(SIZE, 3, PreprocessSpec())


# Plan --------------------------------------------------------------------------------------------


@given(
    size=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    steps=st.integers(1, 12),
    seed=st.integers(0, 9),
)
def test_the_stream_of_a_plan_is_whole_epochs(size, batch_size, steps, seed):
    indices = np.arange(100, 100 + 3 * size, 3)
    plan = Plan(indices, batch_size, seed)
    stream = [item for step in range(steps) for item in plan(step)]
    assert len(stream) == steps * batch_size
    assert [epoch for epoch, _ in stream] == [i // size for i in range(len(stream))]
    for start in range(0, len(stream) - size + 1, size):
        assert sorted(index for _, index in stream[start : start + size]) == indices.tolist()


@given(
    size=st.integers(1, 40),
    batch_size=st.integers(1, 33),
    world=st.integers(1, 5),
    order=st.permutations(range(6)),
)
def test_ranks_share_a_step_and_any_order_of_asking_gives_the_same(size, batch_size, world, order):
    indices = np.arange(size)
    ranks = [Plan(indices, batch_size, 0, rank, world) for rank in range(world)]
    asked = {step: [item for plan in ranks for item in plan(step)] for step in order}
    assert [asked[step] for step in range(6)] == list(map(Plan(indices, batch_size, 0), range(6)))


def test_epochs_and_seeds_differ():
    plan = Plan(np.arange(64), 64, 0)
    orders = {tuple(index for _, index in plan(step)) for step in range(5)}
    orders.add(tuple(index for _, index in Plan(np.arange(64), 64, 1)(0)))
    assert len(orders) == 6


def test_an_empty_plan_is_an_error():
    with pytest.raises(PatchwordError, match="no images to train on"):
        Plan(np.zeros(0, np.int64), 4, 0)


# Batches -----------------------------------------------------------------------------------------


@pytest.fixture
def source(folder):
    return open_source(str(folder({"cat": 7, "dog": 6})))


def spoil(source, *indices):
    for index in indices:
        Path(source.location(index)).write_bytes(b"spoiled")


def train(source, transform=RANDOM, start=0, stop=6, workers=0, on_bad: OnBad = "skip", **options):
    plan = Plan(np.arange(len(source)), 5, seed=3)
    return list(
        train_batches(
            source,
            plan,
            transform,
            start=start,
            stop=stop,
            workers=workers,
            seed=3,
            on_bad=on_bad,
            **options,
        )
    )


def evaluate(source, workers=0, batch_size=4, on_bad: OnBad = "skip", **options):
    indices = np.arange(len(source))[::-1].copy()
    return list(
        eval_batches(
            source,
            indices,
            EVALUATION,
            batch_size=batch_size,
            workers=workers,
            on_bad=on_bad,
            **options,
        )
    )


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        for name in ("images", "labels", "mask", "indices"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert a.bad == b.bad


def test_what_a_batch_holds(source):
    plan = Plan(np.arange(13), 5, seed=3)
    for step, batch in enumerate(train(source, FIXED)):
        indices = [index for _, index in plan(step)]
        assert batch.indices.tolist() == indices
        assert batch.labels.tolist() == source.labels[indices].tolist()
        assert batch.mask.all()
        assert batch.images.dtype == torch.uint8
        for image, index in zip(batch.images, indices, strict=True):
            np.testing.assert_array_equal(image, EVALUATION(source.read(index)))


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("bad", [(), (2, 9)])
def test_batches_do_not_depend_on_workers(source, workers, bad):
    spoil(source, *bad)
    assert_same(train(source), train(source, workers=workers))
    assert_same(evaluate(source), evaluate(source, workers=workers))


@pytest.mark.parametrize("bad", [(), (2, 9)])
@pytest.mark.parametrize("workers", [0, 2])
def test_any_start_gives_the_same_batches(source, bad, workers):
    spoil(source, *bad)
    whole = train(source)
    for start in range(1, 6) if workers == 0 else (3,):
        assert_same(whole[start:], train(source, start=start, workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_tiff_is_named_by_us_alone(folder, photo, encode, capfd, workers):
    """libtiff has words of its own for it."""
    root = folder({"a": 4})
    data = bytearray(encode(photo(96, 128), "TIFF", compression="tiff_lzw"))
    data[len(data) // 3 : len(data) // 3 + 60] = b"\xff" * 60
    (root / "a" / "z.tif").write_bytes(data)
    batches = evaluate(open_source(str(root)), workers=workers)
    assert [index for batch in batches for index, _ in batch.bad] == [4]
    assert capfd.readouterr() == ("", "")


def test_images_differ_between_epochs_and_seeds(source):
    plan = Plan(np.arange(13), 13, 3)
    options = {"start": 0, "stop": 2, "workers": 0, "on_bad": "skip"}
    one, two = train_batches(source, plan, RANDOM, seed=3, **options)
    three, _ = train_batches(source, plan, RANDOM, seed=4, **options)

    def key(batch):
        return batch.images[batch.indices.argsort()]

    assert not torch.equal(key(one), key(two))
    assert not torch.equal(key(one), key(three))


class Drawing:
    """A transform to one pixel of three random numbers."""

    image_size, channels, random = (1, 1), 3, True

    def __call__(self, data, rng=None):
        assert rng is not None
        return np.array([rng.randrange(256) for _ in range(3)], np.uint8).reshape(3, 1, 1)


def test_each_image_of_each_epoch_has_draws_of_its_own(source):
    plan = Plan(np.arange(13), 13, 3)
    options = {"start": 0, "stop": 2, "workers": 0, "seed": 3, "on_bad": "skip"}
    pixels = torch.cat(
        [batch.images for batch in train_batches(source, plan, Drawing(), **options)]
    )
    assert len(pixels.view(-1, 3).unique(dim=0)) == 26


@pytest.mark.parametrize("size", [1, 4, 5, 13, 20])
def test_evaluation_keeps_the_order_and_the_last_images(source, size):
    batches = evaluate(source, batch_size=size)
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(12, -1, -1))
    assert max(len(batch.labels) for batch in batches) == min(size, 13)


def test_torch_random_state_is_left_alone(source):
    before = torch.get_rng_state()
    train(source, workers=1)
    assert torch.equal(torch.get_rng_state(), before)


# Bad images --------------------------------------------------------------------------------------


def test_a_bad_image_is_replaced_by_the_next_and_reported(source):
    clean = train(source, FIXED)
    spoil(source, 4, 5, 12)
    after = {4: 6, 5: 6, 12: 0}
    for batch, whole in zip(train(source, FIXED), clean, strict=True):
        wanted = [after.get(index, index) for index in whole.indices.tolist()]
        assert batch.indices.tolist() == wanted
        assert batch.labels.tolist() == source.labels[wanted].tolist()
        assert batch.mask.all()
        hit = set(whole.indices.tolist()) & set(after)
        assert {index for index, _ in batch.bad} >= hit
        assert all("known format" in reason for _, reason in batch.bad)
        assert bool(batch.bad) == bool(hit)


def test_evaluation_masks_bad_images(source):
    spoil(source, 4, 12)
    batches = evaluate(source)
    mask = torch.cat([batch.mask for batch in batches]).tolist()
    assert [12 - row for row, good in enumerate(mask) if not good] == [12, 4]
    assert torch.cat([batch.labels for batch in batches]).tolist() == source.labels[::-1].tolist()
    assert not batches[0].images[0].any()
    assert [index for batch in batches for index, _ in batch.bad] == [12, 4]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("run", [train, evaluate])
def test_fail_names_the_file_in_one_line(source, workers, run):
    spoil(source, 4)
    with pytest.raises(PatchwordError) as caught:
        run(source, workers=workers, on_bad="fail")
    message = str(caught.value)
    assert message.startswith(source.location(4) + ": not an image of a known format; ")
    assert "\n" not in message


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("run", [train, evaluate])
def test_nothing_readable_is_an_error_not_a_loop(source, workers, run):
    spoil(source, *range(13))
    with pytest.raises(
        PatchwordError, match="none of 13 images can be read; the first: "
    ) as caught:
        run(source, workers=workers)
    assert "\n" not in str(caught.value)


# Cache -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [(), (2, 9)])
@pytest.mark.parametrize("workers", [0, 2])
def test_cached_batches_equal_decoded_ones(source, bad, workers):
    spoil(source, *bad)
    seen = []
    cache = cache_images(
        source,
        np.arange(13),
        FIXED,
        workers=workers,
        progress=lambda n, total: seen.append((n, total)),
    )
    assert set(cache.bad) == set(bad)
    assert seen[-1] == (13, 13)
    assert_same(train(source, FIXED), train(source, FIXED, cached=cache, workers=2))
    assert_same(evaluate(source), evaluate(source, cached=cache))


def test_a_cache_of_some_images_serves_those_and_the_rest_is_decoded(source):
    cache = cache_images(source, np.array([3, 1, 8]), FIXED)
    assert cache.images.shape == (3, 3, *SIZE)
    np.testing.assert_array_equal(cache.images[0], FIXED(source.read(3)))
    assert_same(train(source, FIXED), train(source, FIXED, cached=cache))


def test_cache_with_fail(source):
    spoil(source, 4)
    with pytest.raises(PatchwordError, match="known format"):
        cache_images(source, np.arange(13), FIXED, on_bad="fail")


def test_what_is_worth_caching(source):
    at = np.arange(10)
    assert worth_caching(source, at, FIXED)
    assert worth_caching(source, at, EVALUATION, limit_bytes=10 * 3 * 64)
    assert not worth_caching(source, at, EVALUATION, limit_bytes=10 * 3 * 64 - 1)
    assert not worth_caching(source, at, RANDOM)
    with pytest.raises(ValueError, match="random"):
        cache_images(source, at, RANDOM)


# Processes ---------------------------------------------------------------------------------------


def test_sources_are_cheap_to_send(source):
    sent = pickle.dumps(source)
    assert len(sent) < 5000
    assert pickle.loads(sent).read(3) == source.read(3)


def test_leaving_early_ends_the_workers(source):
    for leave in ("close", "forget"):
        batches = train_batches(
            source,
            Plan(np.arange(13), 5, 0),
            RANDOM,
            start=0,
            stop=10_000,
            workers=2,
            seed=0,
            on_bad="skip",
        )
        next(batches)
        assert len(multiprocessing.active_children()) == 2
        if leave == "close":
            batches.close()
        else:
            del batches
            gc.collect()
        assert not multiprocessing.active_children()


CHILD = """
import os, signal, sys, time
import numpy as np
from patchword.data.loader import Plan, train_batches
from patchword.data.registry import open_source
from patchword.data.transforms import TrainTransform
from patchword.spec.model import PreprocessSpec
from patchword.spec.data import AugmentSpec
asked = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: asked.append(1))
source = open_source(sys.argv[1])
transform = TrainTransform((8, 8), 3, PreprocessSpec(), AugmentSpec())
plan = Plan(np.arange(len(source)), 5, 0)
batches = train_batches(
    source, plan, transform, start=0, stop=10**6, workers=2, seed=0, on_bad="skip")
next(batches)
import multiprocessing
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
after = 0
while after < 20:
    next(batches)
    time.sleep(0.005)
    after += bool(asked)
batches.close()
print("left", len(multiprocessing.active_children()), flush=True)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_workers_leave_signals_to_the_parent_and_die_with_it(source, sent):
    root = Path(source.location(0)).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        assert child.stdout is not None
        workers = [int(pid) for pid in child.stdout.readline().split()]
        assert len(workers) == 2
        assert all(map(alive, workers))
        if sent == signal.SIGKILL:
            child.kill()
        else:  # to the whole group, as a terminal or a batch system does
            os.killpg(child.pid, sent)
        out, err = child.communicate(timeout=60)
    deadline = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))
    if sent == signal.SIGKILL:
        assert child.returncode == -signal.SIGKILL
    else:  # it went on, took 20 more batches, and ended in order
        assert (child.returncode, out, err) == (0, "left 0\n", "")


def test_a_killed_worker_is_one_line(source):
    batches = train_batches(
        source,
        Plan(np.arange(13), 5, 0),
        RANDOM,
        start=0,
        stop=10_000,
        workers=1,
        seed=0,
        on_bad="skip",
    )
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(PatchwordError, match=r"loader process died.*fewer --workers"):
        for _ in batches:
            pass
