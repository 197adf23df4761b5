import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from patchword.data import images
from patchword.data.images import decode
from patchword.data.transforms import (
    BatchAugment,
    EvalTransform,
    TrainTransform,
    inception_box,
    to_input,
)
from patchword.spec.data import AugmentSpec
from patchword.spec.model import PreprocessSpec
from patchword.spec.parse import PatchwordError, parse


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def augment(seed: int = 0, classes: int = 5, **options: Any):
    """The augmentation `options` alone, with its generator."""
    spec = parse(AugmentSpec, {"flip": False} | options)
    return lambda x, y: BatchAugment(spec, classes)(x, y, generator(seed))


# Per image ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(96, 96), (160, 100), (100, 230), (40, 20)])
@pytest.mark.parametrize("size", [(32, 32), (32, 48), (64, 32)])
def test_evaluation_equals_resize_then_crop(photo, encode, interpolation, shape, size):
    """Against Pillow in two steps, at sizes that need no rounding: to rounding."""
    preprocess = PreprocessSpec(interpolation=interpolation, crop_fraction=0.8)
    scale = max(size[0] / shape[0], size[1] / shape[1]) / 0.8
    image = photo(*shape)
    whole = (round(shape[1] * scale), round(shape[0] * scale))
    resized = image.resize(whole, Image.Resampling[interpolation.upper()])
    left, upper = (whole[0] - size[1]) / 2, (whole[1] - size[0]) / 2
    result = EvalTransform(size, 3, preprocess)(encode(image))
    assert result.shape == (3, *size)
    assert result.dtype == np.uint8
    box = (left, upper, left + size[1], upper + size[0])
    assert all(edge == int(edge) for edge in box)
    difference = np.abs(result.transpose(1, 2, 0).astype(int) - np.asarray(resized.crop(box)))
    assert difference.max() <= 2
    assert difference.mean() < 0.4  # each is 0.32 from the same resize in float


def test_stretch_is_a_plain_resize(photo, encode):
    image = photo(50, 80)
    result = EvalTransform((24, 20), 3, PreprocessSpec(resize="stretch"))(encode(image))
    expected = np.asarray(image.resize((20, 24), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(result.transpose(1, 2, 0), expected)


def test_the_right_size_passes_unchanged(encode, photo):
    image = photo(32, 32)
    result = EvalTransform((32, 32), 3, PreprocessSpec(crop_fraction=1.0))(encode(image))
    np.testing.assert_array_equal(result.transpose(1, 2, 0), np.asarray(image))


@pytest.mark.parametrize("shape", [(900, 1300), (1301, 1007)])
def test_large_jpegs_reduced_in_the_decoder_stay_close(photo, encode, shape):
    data = encode(photo(*shape), "JPEG", quality=95)
    full = encode(decode(data, 3), "PNG")
    transform = EvalTransform((64, 64), 3, PreprocessSpec())
    difference = transform(data).astype(int) - transform(full)
    assert np.abs(difference).mean() < 1
    train = TrainTransform((64, 64), 3, PreprocessSpec(), AugmentSpec())
    for seed in range(8):
        a, b = (train(d, random.Random(seed)).astype(int) for d in (data, full))
        assert np.abs(a - b).mean() < 1.5


@given(
    height=st.integers(1, 500),
    width=st.integers(1, 500),
    low=st.floats(0.01, 1),
    seed=st.integers(0, 99),
)
def test_inception_boxes_lie_inside_and_keep_their_ranges(height, width, low, seed):
    spec = AugmentSpec(crop_area=(low, 1.0))
    left, upper, right, lower = inception_box(height, width, spec=spec, rng=random.Random(seed))
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height
    w, h = right - left, lower - upper
    # Sides are rounded to whole pixels: by half a pixel each.
    assert (w + 0.5) / (h - 0.5) >= 0.75 - 1e-9 or w == width
    assert (w - 0.5) / (h + 0.5) <= 4 / 3 + 1e-9 or h == height


def test_inception_areas_are_uniform():
    rng = random.Random(0)
    spec = AugmentSpec(crop_area=(0.1, 0.5))
    boxes = [inception_box(400, 400, spec=spec, rng=rng) for _ in range(4000)]
    areas = np.array([(r - x) * (b - y) / 160_000 for x, y, r, b in boxes])
    aspects = np.array([math.log((r - x) / (b - y)) for x, y, r, b in boxes])
    assert areas.min() > 0.09
    assert areas.max() < 0.51
    # Means of 4,000 draws: standard errors 0.002 and 0.003.
    assert abs(areas.mean() - 0.3) < 0.01
    assert abs(aspects.mean()) < 0.012


def test_inception_aspects_are_log_uniform():
    """Width over height, as large as it is small by its logarithm."""
    rng = random.Random(0)
    spec = AugmentSpec(crop_area=(0.05, 0.1), crop_aspect=(1.0, 4.0))
    boxes = [inception_box(1000, 1000, spec=spec, rng=rng) for _ in range(2000)]
    aspects = np.array([math.log((r - x) / (b - y)) for x, y, r, b in boxes])
    assert aspects.min() > -0.01
    # The standard error of a mean of 2,000 draws is 0.009; a plain uniform aspect has 0.85.
    assert abs(aspects.mean() - math.log(2)) < 0.04


@pytest.mark.parametrize("channels", [1, 3])
def test_training_transform_is_a_function_of_its_seed(photo, encode, channels):
    data = encode(photo(60, 80))
    spec = AugmentSpec(randaugment_layers=2, randaugment_magnitude=10.0)
    transform = TrainTransform((24, 16), channels, PreprocessSpec(), spec)
    assert transform.random
    outputs = [transform(data, random.Random(seed)) for seed in (0, 1, 0)]
    assert outputs[0].shape == (channels, 24, 16)
    assert outputs[0].dtype == np.uint8
    np.testing.assert_array_equal(outputs[0], outputs[2])
    assert not np.array_equal(outputs[0], outputs[1])


def test_without_random_parts_training_equals_evaluation(photo, encode):
    data = encode(photo(60, 80))
    train = TrainTransform((24, 16), 3, PreprocessSpec(), AugmentSpec(crop="resize"))
    assert not train.random
    np.testing.assert_array_equal(train(data), EvalTransform((24, 16), 3, PreprocessSpec())(data))


@pytest.mark.parametrize(
    ("channels", "values", "used"),
    [(3, (0.1, 0.2, 0.6), (0.1, 0.2, 0.6)), (1, (0.1, 0.2, 0.6), (0.3,)), (3, (0.4,), (0.4,) * 3)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalisation(channels, values, used, dtype):
    images = torch.randint(0, 256, (4, channels, 5, 6), dtype=torch.uint8)
    spread = tuple(2 * value for value in values)
    result = to_input(images, PreprocessSpec(mean=values, std=spread), dtype)
    centre = torch.tensor(used).view(1, -1, 1, 1)
    expected = (images / 255 - centre) / (2 * centre)
    assert result.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(result.float(), expected, atol=tolerance, rtol=1e-2)


def test_normalisation_of_a_wrong_number_of_channels():
    with pytest.raises(PatchwordError, match="mean and std have 3 values for images of 4"):
        to_input(torch.zeros(1, 4, 2, 2, dtype=torch.uint8), PreprocessSpec())


@pytest.mark.parametrize("shape", [(613, 409), (409, 613)])
@pytest.mark.parametrize("crop", ["resize", "inception"])
def test_large_images_are_cut_from_a_reduced_one(photo, encode, monkeypatch, shape, crop):
    """The same part of the picture, and nearly the same pixels."""
    data = encode(photo(*shape))
    spec = parse(AugmentSpec, {"crop": crop, "randaugment_layers": 0})
    transform = TrainTransform((32, 32), 3, PreprocessSpec(), spec)
    expected = transform(data, random.Random(0)).astype(int)
    monkeypatch.setattr(images, "LARGE", 1000)
    found = transform(data, random.Random(0)).astype(int)
    assert 0 < np.abs(found - expected).mean() < 1.5


# Batches -----------------------------------------------------------------------------------------

ALL: dict[str, Any] = {
    "flip": True,
    "pad": 2,
    "rotate": 10.0,
    "scale": 0.1,
    "mixup": 0.5,
    "cutmix": 1.0,
}


@pytest.fixture
def batch():
    return torch.randn(12, 3, 10, 14), torch.arange(12) % 5


def test_off_is_the_identity_itself(batch):
    inputs, labels = batch
    out, targets = augment()(inputs, labels)
    assert out is inputs
    assert targets is labels


def test_batches_are_a_function_of_the_generator(batch):
    inputs, labels = batch
    before = inputs.clone()
    outputs = [augment(seed, erasing=0.5, **ALL)(inputs, labels) for seed in (0, 0, 1)]
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])
    assert not torch.equal(outputs[0][0], outputs[2][0])
    assert torch.equal(inputs, before)
    assert outputs[0][0].shape == inputs.shape
    assert torch.isfinite(outputs[0][0]).all()


def test_flip_mirrors_half_and_twice_is_nothing():
    inputs = torch.randn(400, 1, 3, 4)
    labels = torch.zeros(400, dtype=torch.int64)
    once, _ = augment(flip=True)(inputs, labels)
    mirrored = (once == inputs.flip(-1)).flatten(1).all(1)
    same = (once == inputs).flatten(1).all(1)
    assert (mirrored ^ same).all()
    assert 140 < int(mirrored.sum()) < 260  # six standard deviations
    twice, _ = augment(flip=True)(once, labels)
    assert torch.equal(twice, inputs)


def test_shift_moves_each_image_and_zeros_come_in(batch):
    inputs, labels = torch.rand(300, 2, 6, 7) + 1, torch.zeros(300, dtype=torch.int64)
    out, _ = augment(pad=2)(inputs, labels)
    moves = set()
    padded = torch.nn.functional.pad(inputs, [2] * 4)
    for number in range(300):
        found = [
            (dy, dx)
            for dy in range(5)
            for dx in range(5)
            if torch.equal(out[number], padded[number, :, dy : dy + 6, dx : dx + 7])
        ]
        assert len(found) == 1
        moves.add(found[0])
    assert len(moves) == 25


def test_affine_of_nothing_is_the_identity(batch):
    inputs, labels = batch
    out, _ = augment(rotate=1e-7)(inputs, labels)
    torch.testing.assert_close(out, inputs, atol=1e-4, rtol=0)


def test_affine_keeps_a_flat_image_and_the_centre():
    flat = torch.full((8, 1, 9, 9), -1.0)
    spec: dict[str, Any] = {"rotate": 30.0, "scale": 0.3, "translate": 0.3, "shear": 10.0}
    out, _ = augment(**spec)(flat, torch.zeros(8, dtype=torch.int64))
    torch.testing.assert_close(out, flat)  # the border goes on, no zeros come in
    centred = torch.randn(8, 1, 9, 9)
    spec["translate"] = 0.0
    out, _ = augment(**spec)(centred, torch.zeros(8, dtype=torch.int64))
    torch.testing.assert_close(out[:, :, 4, 4], centred[:, :, 4, 4], atol=1e-5, rtol=0)
    assert not torch.allclose(out, centred)


@pytest.mark.parametrize(
    ("option", "limit"),
    [({"rotate": 20.0}, 20.0), ({"scale": 0.2}, 0.2), ({"translate": 0.2}, 0.2)],
)
def test_affine_ranges_on_a_rectangle(option, limit):
    """A blob off the centre of a rectangle shows angle, size and shift, within half a pixel."""
    height, width, count = 65, 97, 64
    y, x = torch.meshgrid(torch.arange(height) - 32.0, torch.arange(width) - 48.0, indexing="ij")
    blob = torch.exp(-((x - 16) ** 2 + y**2) / 18).expand(count, 1, -1, -1).contiguous()
    out, _ = augment(**option)(blob, torch.zeros(count, dtype=torch.int64))
    mass = out.sum((1, 2, 3))
    at_x, at_y = (out[:, 0] * x).sum((1, 2)) / mass, (out[:, 0] * y).sum((1, 2)) / mass
    if "rotate" in option:
        measured = torch.rad2deg(torch.atan2(at_y, at_x))
        torch.testing.assert_close(
            torch.hypot(at_x, at_y), torch.full_like(at_x, 16), atol=0.3, rtol=0
        )
    elif "scale" in option:
        measured = at_x / 16 - 1
    else:
        measured = (at_x - 16) / width
        assert (at_y / height).abs().max() > 0.15
    assert measured.abs().max() <= limit * 1.05
    assert measured.min() < -0.8 * limit
    assert measured.max() > 0.8 * limit


@pytest.mark.parametrize("option", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixed_targets_say_what_the_inputs_hold(option):
    """Image k is constant k: its mean tells how much of it is left."""
    values = torch.arange(4.0)
    inputs = values.view(4, 1, 1, 1).expand(4, 2, 12, 9).contiguous()
    for seed in range(20):
        out, targets = augment(seed, classes=4, **option)(inputs, torch.arange(4))
        assert targets.dtype == torch.float32
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        assert (targets >= 0).all()
        torch.testing.assert_close(out.mean((1, 2, 3)), targets @ values, atol=1e-5, rtol=1e-5)
        assert len(torch.unique(targets.diagonal())) == 1


def test_mixup_and_cutmix_take_turns():
    inputs, labels = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 8, 8), torch.arange(2)
    mixed = 0
    for seed in range(200):
        out, _ = augment(seed, classes=2, mixup=1.0, cutmix=1.0)(inputs, labels)
        mixed += bool(((out > 0) & (out < 1)).any())
    assert 60 < mixed < 140


def test_erasing_fills_boxes_with_noise():
    inputs, labels = torch.full((500, 1, 20, 30), 9.0), torch.zeros(500, dtype=torch.int64)
    out, targets = augment(erasing=0.3)(inputs, labels)
    erased = out[:, 0] != 9
    share = erased.flatten(1).float().mean(1)
    touched = share > 0
    assert targets is labels
    assert 90 < int(touched.sum()) < 210
    assert share.max() < 0.36  # sides are rounded to whole pixels
    assert 0.13 < float(share[touched].mean()) < 0.19  # long boxes are cut off at the edges
    for mask in erased[touched]:
        rows, columns = mask.any(1), mask.any(0)
        assert int(mask.sum()) == int(rows.sum()) * int(columns.sum())
    noise = out[:, 0][erased]
    assert abs(float(noise.mean())) < 0.2
    assert 0.8 < float(noise.std()) < 1.2


def test_each_image_is_erased_with_its_own_noise():
    inputs, labels = torch.full((6, 2, 16, 16), 9.0), torch.zeros(6, dtype=torch.int64)
    out, _ = augment(erasing=1.0)(inputs, labels)
    values = out[out != 9]
    assert len(torch.unique(values)) == len(values) > 6 * 2 * 4
    again, _ = augment(erasing=1.0)(inputs, labels)
    assert torch.equal(out, again)
    other, _ = augment(1, erasing=1.0)(inputs, labels)
    assert not torch.isin(other[other != 9], values).any()


def test_what_is_drawn_after_erasing_does_not_depend_on_it(batch):
    """One field of normal numbers lies between the boxes and the mixing."""
    inputs, labels = batch
    _, targets = augment(5, erasing=0.7, mixup=0.4)(inputs, labels)
    later = generator(5)
    torch.rand(5, len(inputs), 1, generator=later)
    torch.randn(inputs.shape[1:], generator=later)
    spec = parse(AugmentSpec, {"flip": False, "mixup": 0.4})
    _, wanted = BatchAugment(spec, 5)(inputs, labels, later)
    assert torch.equal(targets, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept(batch, dtype):
    inputs, labels = batch
    out, targets = augment(erasing=0.5, **ALL)(inputs.to(dtype), labels)
    assert out.dtype == dtype
    assert targets.dtype == torch.float32
