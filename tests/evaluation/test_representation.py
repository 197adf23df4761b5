"""Progress without labels: the objective's loss, and probes of planted features."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from patchword.evaluation.representation import Labelled, Representation
from patchword.spec.batch import Batch, Forward
from patchword.spec.parse import PatchwordError


def passes(images: Tensor, labels: Tensor, size: int = 8) -> Callable[[], Iterator[Batch]]:
    """Batches of `size`; images of label -1 could not be read."""

    def start() -> Iterator[Batch]:
        for at in range(0, len(images), size):
            some = labels[at : at + size]
            yield Batch(
                images=images[at : at + size],
                labels=some.clamp(min=0),
                mask=some >= 0,
                indices=torch.arange(at, at + len(some)),
            )

    return start


def planted(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """uint8 images `[count, 1, 2, 2]` of three classes, that their pixels tell apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    corners = torch.tensor([[200, 0, 0, 30], [0, 200, 0, 30], [0, 0, 200, 30]])
    noise = torch.randint(0, 20, (count, 4), generator=generator)
    return (corners[labels] + noise).to(torch.uint8).view(count, 1, 2, 2), labels


def flat(images: Tensor) -> Tensor:
    return images.flatten(1)


def evaluator(
    images: Tensor,
    labels: Tensor,
    loss: Callable[[Forward, Tensor], Tensor],
    labelled: Labelled | None = None,
    seed: int = 0,
) -> Representation:
    return Representation(
        passes(images, labels), lambda pixels: pixels.float() / 255, loss, seed, labelled
    )


def test_the_loss_is_the_mean_over_the_images_that_can_be_read():
    images, labels = planted(21, 0)
    labels[[3, 20]] = -1
    seen: list[int] = []

    def loss(forward: Forward, inputs: Tensor) -> Tensor:
        seen.append(len(inputs))
        return forward(inputs).mean()

    found = evaluator(images, labels, loss)(flat)
    assert seen == [7, 8, 4]
    wanted = images[labels >= 0].double().mean() / 255
    assert found == {"loss": pytest.approx(float(wanted)), "n": 19}


def test_random_draws_are_the_same_each_time_and_disturb_no_others():
    images, labels = planted(16, 0)

    def loss(forward: Forward, inputs: Tensor) -> Tensor:
        return torch.rand(())

    measure = evaluator(images, labels, loss)
    torch.manual_seed(4)
    torch.rand(1)
    before = torch.get_rng_state()
    first = measure(flat)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert measure(flat) == first
    assert evaluator(images, labels, loss, seed=1)(flat) != first


def test_probes_find_what_the_features_tell():
    """All of it from the pixels, nothing from a constant; without gradients to the network."""
    (known, labels), (asked, wanted) = planted(60, 1), planted(30, 2)
    given = Labelled(passes(known, labels), passes(asked, wanted), 3)
    measure = evaluator(asked, wanted, lambda forward, x: x.mean(), given)
    scale = torch.ones(4, requires_grad=True)
    found = measure(lambda images: flat(images) * scale)
    assert found["knn"] == found["linear"] == 1.0
    blind = measure(lambda images: torch.ones(len(images), 4))
    most = int(labels.bincount().argmax())
    assert blind["linear"] == pytest.approx(float((wanted == most).double().mean()))
    assert blind["knn"] < 0.7


def test_probes_learn_from_the_support_alone():
    """Whose labels contradict those that they are asked for."""
    (known, labels), (asked, wanted) = planted(60, 1), planted(30, 2)
    given = Labelled(passes(known, (labels + 1) % 3), passes(asked, wanted), 3)
    found = evaluator(asked, wanted, lambda forward, x: x.mean(), given)(flat)
    assert found["knn"] == found["linear"] == 0.0


def test_what_cannot_be_read_is_left_out_of_the_probes():
    (known, labels), (asked, wanted) = planted(40, 1), planted(20, 2)
    known[5], asked[3] = 255, 255
    labels[5] = wanted[3] = -1
    given = Labelled(passes(known, labels), passes(asked, wanted), 3)
    found = evaluator(asked, wanted, lambda forward, x: x.mean(), given)(flat)
    assert found["knn"] == found["linear"] == 1.0
    assert found["n"] == 19


def test_no_image_at_all_is_an_error():
    images, labels = planted(3, 0)
    with pytest.raises(PatchwordError, match="no image to evaluate could be read"):
        evaluator(images, torch.full_like(labels, -1), lambda forward, x: x.mean())(flat)
