"""One session for whoever looks: held on to, by one thread or several."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import patchword
from patchword import Model, PatchwordError, Session, UsageError, create_model, load_model
from patchword.data.registry import open_source
from patchword.data.sources import Source
from patchword.data.transforms import EvalTransform, to_input
from patchword.session.features import extract

EVERYTHING = np.arange(37)
"""of the photos, one of which is broken"""


@pytest.fixture
def session(finished: Path) -> Session:
    return Session(finished, device="cpu", batch_size=5, workers=0)


@pytest.fixture
def source(photos: Path) -> Source:
    return open_source(str(photos))


def test_what_it_holds(session: Session, finished: Path):
    wanted = load_model(finished)
    assert (session.run, session.device, session.dtype) == (
        finished,
        torch.device("cpu"),
        torch.float32,
    )
    assert session.bad == {}
    assert not any(module.training for module in session.net.modules())
    found, spec = session.classifier, wanted.spec
    assert (found.image_size, found.in_channels) == (spec.image_size, spec.in_channels)
    assert (found.num_classes, found.probability) == (spec.num_classes, spec.probability)
    assert (found.classes, found.names) == (wanted.classes, wanted.classes)
    assert (found.preprocess, found.calibration) == (wanted.preprocess, None)
    assert found.origin == str(finished)


def test_a_classifier_takes_pixels(session: Session, finished: Path, source: Source):
    model = load_model(finished)
    spec = model.spec
    transform = EvalTransform(spec.image_size, spec.in_channels, model.preprocess)
    images = torch.from_numpy(np.stack([transform(source.read(i)) for i in range(3)]))
    with torch.no_grad():
        wanted = model(to_input(images, model.preprocess))
    logits = session.classifier.logits(images)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    torch.testing.assert_close(logits, wanted, rtol=0, atol=0)
    shares = session.classifier.probabilities(logits)
    assert shares.equal(model.probabilities(wanted))


def test_holding_on_gives_what_the_commands_give(
    session: Session, finished: Path, photos: Path, source: Source
):
    given: dict[str, Any] = {"device": "cpu", "batch_size": 5, "workers": 0}
    name, why, indices = session.part(source, None)
    wanted = patchword.evaluate(finished, photos, **given)
    assert (name, why) == (wanted.split, wanted.why)
    for _ in range(2):
        found = session.measure(source, indices)
        assert found.to_dict() == wanted.classification.to_dict()
        assert list(session.predict(photos / "red", top=2)) == patchword.predict(
            finished, photos / "red", top=2, **given
        )
    features = session.features(source, EVERYTHING, "photos", cache=False)
    alone = extract(session.net, source, EVERYTHING, device="cpu", batch_size=5, cache=False)
    assert features.pooled.equal(alone.pooled)


def test_what_cannot_be_read_is_named_once(
    session: Session, photos: Path, source: Source, caplog: pytest.LogCaptureFixture
):
    broken = str(photos / "red" / "broken.jpg")
    for _ in range(2):
        session.measure(source, EVERYTHING)
        session.features(source, EVERYTHING, "photos", cache=False)
        assert len(list(session.predict([photos / "red", "no/such.png"]))) == 12
    assert session.bad.keys() == {broken, "no/such.png"}
    assert caplog.text.count(f"skipped an unreadable image: {broken}") == 1


def test_bad_images_can_be_fatal(finished: Path, source: Source):
    strict = Session(finished, device="cpu", workers=0, on_bad_image="fail")
    with pytest.raises(PatchwordError, match=r"broken\.jpg"):
        strict.measure(source, EVERYTHING)


def test_images_without_labels(session: Session, photos: Path):
    found = session.images([photos / "red" / "00.jpg", photos / "blue"])
    assert not found.labelled
    assert found.labels.tolist() == [-1] * len(found)
    assert found.keys[0] == str(photos / "red" / "00.jpg")
    batch = next(session.batches(found, np.arange(3)))
    assert batch.images.shape == (3, 3, 16, 16)
    assert batch.images.dtype == torch.uint8


def flags_of(model: Model) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_model_that_is_passed_in_stays_as_it_is(
    finished: Path, photos: Path, source: Source, precision: Any
):
    model = load_model(finished).train()
    model.get_submodule("blocks.0").eval()
    before, tensors = flags_of(model), {n: t.clone() for n, t in model.state_dict().items()}
    session = Session(model, device="cpu", workers=0, precision=precision)
    session.measure(source, EVERYTHING)
    list(session.predict(photos / "red"))
    session.features(source, EVERYTHING, "photos", cache=False)
    assert flags_of(model) == before
    assert not any(flags_of(session.net))
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    assert all(tensors[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert session.run is session.origin is session.classifier.origin is None


def test_features_leave_the_model_in_its_mode(finished: Path, source: Source):
    model = load_model(finished).train()
    extract(model, source, np.arange(3), device="cpu", cache=False)
    assert all(flags_of(model))


def test_a_session_shares_the_weights_of_a_model(source: Source):
    model = create_model("ViT-mu/8", 3, 16, classes=("blue", "green", "red"))
    session = Session(model, device="cpu", workers=0)
    before = session.measure(source, EVERYTHING).loss
    with torch.no_grad():
        assert model.head is not None
        model.head.bias.add_(torch.tensor([3.0, 0.0, -3.0]))
    assert session.measure(source, EVERYTHING).loss != before
    shared = zip(session.net.parameters(), model.parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in shared)


def test_what_a_model_has_already_is_refused():
    model = create_model("ViT-mu/8", 0, 16)
    with pytest.raises(UsageError, match="image_size is for weights to load"):
        Session(model, image_size=32)
    with pytest.raises(UsageError, match="classes is for weights to load"):
        Session(model, classes="imagenet")
    with pytest.raises(PatchwordError, match="no head"):
        _ = Session(model, device="cpu").classifier


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_threads_share_a_session(
    finished: Path, photos: Path, source: Source, precision: Any, caplog: pytest.LogCaptureFixture
):
    """Each thread gets to the bit what it gets alone, whatever the others do."""
    caplog.set_level(logging.ERROR)
    console = Console(file=io.StringIO(), force_terminal=True)
    given: dict[str, Any] = {"device": "cpu", "batch_size": 4, "workers": 0}
    session = Session(finished, precision=precision, console=console, **given)
    tasks: list[Callable[[], Any]] = [
        lambda: list(session.predict(photos / "red")),
        lambda: list(session.predict(photos / "blue", abstain=0.9)),
        lambda: session.measure(source, EVERYTHING).to_dict(),
    ]
    alone = [task() for task in tasks]
    start = threading.Barrier(2 * len(tasks))

    def together(task: Callable[[], Any]) -> list[Any]:
        start.wait()
        return [task() for _ in range(3)]

    with ThreadPoolExecutor(2 * len(tasks)) as pool:
        found = list(pool.map(together, tasks * 2))
    assert found == [[answer] * 3 for answer in alone * 2]


def test_predictions_come_one_by_one(session: Session, photos: Path):
    """The caller's own mode between two of them is not the session's."""
    answers = session.predict(photos / "red")
    first = next(answers)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert len([first, *answers]) == 12


def test_progress_tells_the_rate(finished: Path, source: Source):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=120)
    session = Session(finished, device="cpu", batch_size=5, workers=0, console=console)
    session.measure(source, EVERYTHING, "test")
    with session.progress("outer", 4) as tell, session.progress("inner", 4) as untold:
        tell(2)
        untold(3)
    assert "outer: 2/4 images, " in shown.getvalue()
    assert "inner" not in shown.getvalue()
