"""Near duplicates: the search against all pairs, copies that are found, others that are not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from patchword.audit.hashing import MAX_BITS, NEAR_BITS, close_pairs, near_pairs, thumbnail
from patchword.data.registry import open_source


def all_pairs(hashes: np.ndarray, bits: int) -> list[tuple[int, int]]:
    """By comparing each with each."""
    return [
        (i, j)
        for i in range(len(hashes))
        for j in range(i + 1, len(hashes))
        if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= bits
    ]


def found_pairs(hashes: np.ndarray, bits: int) -> list[tuple[int, int]]:
    return sorted((a, b) for block in close_pairs(hashes, bits) for a, b in block.tolist())


@settings(max_examples=40)
@given(
    st.integers(0, MAX_BITS),
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6),
    st.lists(st.sets(st.integers(0, 63), max_size=18), max_size=12),
    st.integers(0, 2**32 - 1),
)
def test_the_search_finds_each_close_pair_once(bits, centres, flips, seed):
    """Hashes in clusters around random ones, with up to 18 bits flipped, in random order."""
    rng = np.random.default_rng(seed)
    values = list(centres)
    for flipped in flips:
        value = centres[int(rng.integers(len(centres)))]
        values.append(value ^ sum(1 << bit for bit in flipped))
    hashes = rng.permutation(np.array(values, np.uint64))
    assert found_pairs(hashes, bits) == all_pairs(hashes, bits)


def test_equal_hashes_come_in_blocks():
    hashes = np.zeros(2000, np.uint64)
    blocks = list(close_pairs(hashes, 0))
    assert sum(len(block) for block in blocks) == 2000 * 1999 // 2
    assert max(len(block) for block in blocks) < 2000 * 1999 // 2


def picture(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """A random picture with structure at several scales, as in photographs."""
    rng = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3))
    for cells, strength in ((4, 1.0), (9, 0.6), (20, 0.3)):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3)).astype(np.uint8))
        total += strength * np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))
    return Image.fromarray((total / total.max() * 235).astype(np.uint8))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


COPIES = {
    "JPEG 90": lambda image: jpeg(image, 90),
    "JPEG 30": lambda image: jpeg(image, 30),
    "0.9 of the size": lambda image: image.resize((144, 108)),
    "half the size": lambda image: image.resize((80, 60)),
    "twice the size": lambda image: image.resize((320, 240)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.7),
    "more contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.2),
    "grey": lambda image: image.convert("L"),
}


def near(images: list[Image.Image], bits: int = NEAR_BITS) -> list[list[int]]:
    thumbs = np.stack([np.asarray(thumbnail(image)) for image in images])
    pairs, likeness = near_pairs(thumbs, bits)
    assert (likeness <= 1 + 1e-5).all()
    return pairs.tolist()


@pytest.mark.parametrize("change", COPIES)
def test_copies_are_found_and_nothing_else(change: str):
    originals = [picture(seed) for seed in range(60)]
    copies = [COPIES[change](image) for image in originals[:30]]
    assert near(originals + copies) == [[i, 60 + i] for i in range(30)]


def test_a_mirrored_or_inverted_picture_is_another_one():
    image = picture(0)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    inverted = Image.fromarray(255 - np.asarray(image))
    assert near([image, mirrored, inverted]) == []


def test_blank_images_are_no_pairs():
    flat = [Image.new("RGB", (64, 48), colour) for colour in ("white", "white", "red", "black")]
    rng = np.random.default_rng(0)
    noisy = [
        Image.fromarray((200 + rng.integers(0, 3, (48, 64, 3))).astype(np.uint8)) for _ in range(4)
    ]
    assert near(flat + noisy) == []


@pytest.mark.parametrize("side", [8, 64])
def test_handwritten_digits_of_a_class_are_no_copies(side: int):
    """They look alike, as no photographs do, but are different drawings."""
    source = open_source("digits")
    chosen = range(600)
    images = [Image.fromarray(np.asarray(source.read(i))[..., 0]) for i in chosen]
    images = [image.resize((side, side), Image.Resampling.BICUBIC) for image in images]
    assert near(images) == []


def test_fewer_bits_find_less():
    image = picture(3)
    cropped = image.crop((4, 3, 156, 117))
    assert near([image, cropped], 0) == []
    assert near([image, cropped], MAX_BITS) == [[0, 1]]
