import random

import numpy as np
import pytest
from PIL import Image

from patchword.data.randaugment import OPERATIONS, randaugment


def test_there_are_sixteen():
    assert len(OPERATIONS) == 16


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("strength", [0.0, 0.2, 1.0, 1.5, 3.0])
def test_every_operation_keeps_mode_and_size_and_its_input(photo, name, mode, strength):
    image = photo(18, 25).convert(mode)
    before = image.tobytes()
    for seed in range(4):
        result = OPERATIONS[name](image, strength, random.Random(seed))
        assert (result.mode, result.size) == (mode, image.size)
    assert image.tobytes() == before


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"solarize"}))
def test_every_operation_does_something_at_full_strength(photo, name):
    """But solarize, whose threshold is beyond white there, and autocontrast on full contrast."""
    image = photo(30, 30).point(lambda v: 40 + v // 2)
    result = OPERATIONS[name](image, 1.0, random.Random(0))
    assert result.tobytes() != image.tobytes()


@pytest.mark.parametrize(
    ("name", "strength"),
    [
        *[(name, 0) for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")],
        *[("cutout", 0), ("solarize", 1), ("solarize_add", 0), ("posterize", 2)],
        *[(name, 0.5) for name in ("color", "contrast", "brightness", "sharpness")],
    ],
)
def test_strengths_that_change_nothing(photo, name, strength):
    image = photo(20, 24)
    result = OPERATIONS[name](image, float(strength), random.Random(0))
    assert np.abs(np.asarray(result).astype(int) - np.asarray(image)).max() <= 1


def test_values():
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    grey = np.arange(256)

    def values(name: str, strength: float) -> np.ndarray:
        return np.asarray(OPERATIONS[name](image, strength, random.Random(0))).ravel()

    np.testing.assert_array_equal(values("invert", 1), 255 - grey)
    np.testing.assert_array_equal(values("posterize", 1), grey & 0xF0)
    np.testing.assert_array_equal(values("solarize", 0.5), np.where(grey < 128, grey, 255 - grey))
    np.testing.assert_array_equal(values("solarize_add", 1), np.where(grey < 128, grey + 110, grey))
    expected = np.minimum(255, grey * 1.9)
    np.testing.assert_allclose(values("brightness", 1), expected, atol=1)


def test_translation_and_cutout_sizes():
    white = Image.new("L", (224, 112), 255)
    for seed in range(10):
        moved = np.asarray(OPERATIONS["translate_x"](white, 1.0, random.Random(seed)))
        assert int((moved == 128).sum()) == 100 * 112
        cut = np.asarray(OPERATIONS["cutout"](white, 1.0, random.Random(seed)))
        assert 40 * 20 <= int((cut == 128).sum()) <= 80 * 40


def test_shapes_change_both_ways_and_as_far_as_they_say(photo):
    image, grey = photo(40, 30), (128, 128, 128)
    shift_y = 100 / 224 * image.height
    wanted = {"rotate": {image.rotate(a, fillcolor=grey).tobytes() for a in (30, -30)}}
    for name, matrix in {
        "shear_x": lambda sign: (1, 0.3 * sign, 0, 0, 1, 0),
        "shear_y": lambda sign: (1, 0, 0, 0.3 * sign, 1, 0),
        "translate_y": lambda sign: (1, 0, 0, 0, 1, shift_y * sign),
    }.items():
        wanted[name] = {
            image.transform(
                image.size, Image.Transform.AFFINE, matrix(sign), fillcolor=grey
            ).tobytes()
            for sign in (1, -1)
        }
    for name, results in wanted.items():
        drawn = {OPERATIONS[name](image, 1.0, random.Random(s)).tobytes() for s in range(20)}
        assert drawn == results, name


def test_all_operations_are_drawn_alike(monkeypatch):
    drawn: list[tuple[str, float]] = []
    for name in OPERATIONS:
        monkeypatch.setitem(
            OPERATIONS, name, lambda image, m, rng, name=name: drawn.append((name, m)) or image
        )
    randaugment(Image.new("L", (1, 1)), 3200, 15.0, random.Random(0))
    counts = {name: drawn.count((name, 1.5)) for name in OPERATIONS}
    assert sum(counts.values()) == 3200
    assert 150 < min(counts.values()) <= max(counts.values()) < 250


def test_layers_and_seeds(photo):
    image = photo(20, 20)
    assert randaugment(image, 0, 10.0, random.Random(0)).tobytes() == image.tobytes()
    results = {randaugment(image, 2, 10.0, random.Random(seed)).tobytes() for seed in range(30)}
    assert len(results) > 20
    again = [randaugment(image, 2, 10.0, random.Random(5)).tobytes() for _ in range(2)]
    assert again[0] == again[1]
