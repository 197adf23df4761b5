"""The picture of an explanation: every part is there, at any shape."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from patchword.inspection.explain import Explanation
from patchword.inspection.figures.drawing import GREEN, PURPLE
from patchword.inspection.figures.explain import draw_explanation
from patchword.inspection.removal import Curves


def explanation(names: tuple[str, ...], grid: tuple[int, int], scale: float) -> Explanation:
    rng = np.random.default_rng(0)
    shares = np.linspace(0, 1, 6)
    return Explanation(
        target=0,
        probability=scale,
        maps={name: rng.normal(size=grid) for name in names},
        agreement=0.25 if len(names) == 2 else None,
        curves={
            name: Curves(
                shares=shares, deletion=scale * (1 - shares) ** k, insertion=scale * shares
            )
            for k, name in enumerate((*names, "random"), 1)
        },
    )


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("grid", "size"), [((14, 14), (56, 56)), ((1, 9), (8, 72))])
def test_both_maps_and_their_curves_are_drawn(
    channels: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    pixels: Callable[..., np.ndarray],
    share_of: Callable[..., float],
) -> None:
    image = np.full((*size, channels), 128, np.uint8)
    both = pixels(draw_explanation(image, explanation(("rollout", "occlusion"), grid, 0.9), "a"))
    assert max(both.shape) < 2000
    assert share_of(both, GREEN) > 0.0005
    assert share_of(both, PURPLE) > 0.0005
    alone = pixels(draw_explanation(image, explanation(("occlusion",), grid, 0.9), "a"))
    assert share_of(alone, GREEN) == 0
    assert share_of(alone, PURPLE) > 0.0005


def warm_and_cold(image: np.ndarray) -> tuple[float, float]:
    """The shares of orange and of blue pixels."""
    difference = image[..., 0] - image[..., 2]
    return float((difference > 60).mean()), float((difference < -60).mean())


def test_evidence_against_is_blue(pixels: Callable[..., np.ndarray]) -> None:
    image = np.full((32, 32, 3), 128, np.uint8)
    found = explanation(("occlusion",), (4, 4), 0.9)
    half = np.repeat([[0.0], [0.0], [1.0], [1.0]], 4, axis=1)
    found.maps["occlusion"] = half
    warm, cold = warm_and_cold(pixels(draw_explanation(image, found, "a")))
    found.maps["occlusion"] = -half
    cool, blue = warm_and_cold(pixels(draw_explanation(image, found, "a")))
    assert warm > 5 * cool  # the colour bar has both colours
    assert blue > 3 * cold


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_map_of_one_value_and_small_probabilities_can_be_drawn(
    value: float, pixels: Callable[..., np.ndarray], share_of: Callable[..., float]
) -> None:
    found = explanation(("rollout", "occlusion"), (2, 2), 0.001)
    found.maps.update(rollout=np.full((2, 2), value), occlusion=np.full((2, 2), -value))
    drawn = pixels(draw_explanation(np.zeros((8, 8, 1), np.uint8), found, "$a_{b$ " + "x" * 90))
    assert share_of(drawn, PURPLE) > 0.0005  # the axis is cut, the curves stay visible
