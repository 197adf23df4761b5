"""Near duplicates: perceptual hashes, and the pairs of them that lie close together."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
from PIL import Image

SIDE = 32
"""Side of the thumbnails that images are compared by."""
MAX_BITS = 15
"""The largest distance that is searched for; hashes of unrelated images are about 32 bits apart."""
NEAR_BITS = 10
"""The usual one; a distance is even, as half of the bits of a hash are set."""
LEAST_PIXELS, LEAST_EDGES = 0.8, 0.6
"""Correlations of the thumbnails of near duplicates: of grey values, and of their differences."""
BLANK = 3.0
"""Thumbnails with a lower standard deviation (of 255) show nothing to compare."""

_LOW = 8  # frequencies of the hash along each side
_BANDS = 4  # parts of a hash, of 16 bits each
_BLOCK = 4096  # thumbnails that are hashed at a time
_PAIRS = 1 << 20  # candidates that are compared at a time
_SAMPLE = 20_000  # random pairs that tell how alike unrelated images are
_FEW = 100  # too few images to tell it


def thumbnail(image: Image.Image) -> Image.Image:
    """Mode L, `SIDE` x `SIDE`, whatever the aspect."""
    small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0)
    if small.mode == "RGBA":
        small = Image.alpha_composite(Image.new("RGBA", small.size, "white"), small)
    return small.convert("L")


def contrast(thumbs: np.ndarray) -> np.ndarray:
    """Standard deviation of the grey values, float32 `[N]`, of thumbnails, uint8 `[N, 32, 32]`."""
    spread = np.zeros(len(thumbs), np.float32)
    for start in range(0, len(thumbs), _BLOCK):
        spread[start : start + _BLOCK] = thumbs[start : start + _BLOCK].std(axis=(1, 2))
    return spread


def perceptual_hashes(thumbs: np.ndarray) -> np.ndarray:
    """uint64 `[N]` of thumbnails, uint8 `[N, 32, 32]`.

    The 8 x 8 lowest frequencies of the cosine transform, a bit for each that is above their median;
    the constant one is left out, so that brightness and contrast do not matter.
    """
    steps = np.arange(SIDE) + 0.5
    cosines = np.cos(np.pi / SIDE * np.outer(np.arange(_LOW), steps)).astype(np.float32)
    weights = np.left_shift(np.uint64(1), np.arange(1, _LOW * _LOW, dtype=np.uint64))
    hashes = np.zeros(len(thumbs), np.uint64)
    for start in range(0, len(thumbs), _BLOCK):
        block = cosines @ thumbs[start : start + _BLOCK].astype(np.float32) @ cosines.T
        varying = block.reshape(len(block), -1)[:, 1:]
        bits = varying > np.median(varying, axis=1, keepdims=True)
        hashes[start : start + _BLOCK] = np.where(bits, weights, np.uint64(0)).sum(1)
    return hashes


def close_pairs(hashes: np.ndarray, bits: int) -> Iterator[np.ndarray]:
    """All pairs of uint64 `hashes` `[N]` that differ in at most `bits` bits, as int64 `[P, 2]`
    blocks with the lower position first; each pair once.

    Of two such hashes, one of the four 16-bit quarters differs in at most `bits` / 4 bits (Norouzi
    et al., arXiv:1307.2982), so only those neighbours are looked up: for 50,000 hashes and 7 bits
    some 3 million pairs in place of a billion.
    """
    quarters = hashes.astype("<u8").view("<u2").reshape(-1, _BANDS)
    reach = bits // _BANDS
    masks = [
        sum(1 << bit for bit in flipped)
        for count in range(reach + 1)
        for flipped in combinations(range(16), count)
    ]
    for band in range(_BANDS):
        order = np.argsort(quarters[:, band], kind="stable")
        values = np.arange(1 << 16)
        starts = np.searchsorted(quarters[order, band], values)
        counts = np.searchsorted(quarters[order, band], values, side="right") - starts
        for mask in masks:
            near = quarters[:, band] ^ np.uint16(mask)
            for left, at in _expand(starts[near], counts[near]):
                right = order[at]
                keep = left < right
                left, right = left[keep], right[keep]
                differing = hashes[left] ^ hashes[right]
                keep = np.bitwise_count(differing) <= bits
                left, right = left[keep], right[keep]
                apart = np.bitwise_count(quarters[left, :band] ^ quarters[right, :band]) > reach
                keep = apart.all(1)  # else an earlier quarter has found the pair
                yield np.stack([left[keep], right[keep]], axis=1)


def _expand(starts: np.ndarray, counts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(row, `starts[row]` + k) for all k < `counts[row]`, about `_PAIRS` at a time."""
    ends = np.cumsum(counts)
    first = 0
    while first < len(counts):
        before = ends[first] - counts[first]
        last = max(first + 1, int(np.searchsorted(ends, before + _PAIRS, side="right")))
        part = counts[first:last]
        rows = np.repeat(np.arange(first, last), part)
        offsets = np.arange(len(rows)) - np.repeat(ends[first:last] - part - before, part)
        yield rows, starts[rows] + offsets
        first = last


def near_pairs(thumbs: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of thumbnails, uint8 `[N, 32, 32]`, that show the same picture: int64 `[P, 2]`, lower
    position first, in rising order, and the correlation of their edges, float32 `[P]`.

    Hashes at most `bits` apart propose a pair; correlations of grey values and of edges decide.
    Blank images are in no pair.
    """
    shown = np.flatnonzero(contrast(thumbs) >= BLANK)
    hashes = perceptual_hashes(thumbs[shown])
    least = max(LEAST_EDGES, _alike_by_chance(thumbs[shown]))
    pairs, likeness = [np.zeros((0, 2), np.int64)], [np.zeros(0, np.float32)]
    for block in close_pairs(hashes, bits):
        for start in range(0, len(block), _BLOCK):
            chosen = shown[block[start : start + _BLOCK]]
            left, right = thumbs[chosen[:, 0]], thumbs[chosen[:, 1]]
            edges = _correlation(_edges(left), _edges(right))
            keep = (edges >= least) & (_correlation(left, right) >= LEAST_PIXELS)
            pairs.append(chosen[keep])
            likeness.append(edges[keep])
    found, alike = np.concatenate(pairs), np.concatenate(likeness)
    order = np.lexsort((found[:, 1], found[:, 0]))
    return found[order], alike[order]


def _alike_by_chance(thumbs: np.ndarray) -> float:
    """An edge correlation that unrelated images of these data do not reach; 0 if they are few.

    About 0.4 for photographs; 0.98 for small drawings such as digits, of which many look alike.
    """
    if len(thumbs) < _FEW:
        return 0.0
    pairs = np.random.default_rng(0).integers(0, len(thumbs), (_SAMPLE, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    edges = np.concatenate(
        [
            _correlation(_edges(thumbs[part[:, 0]]), _edges(thumbs[part[:, 1]]))
            for part in np.array_split(pairs, 10)
        ]
    )
    middle, high = np.percentile(np.arctanh(np.clip(edges, -0.999, 0.999)), (50, 95))
    return min(0.99, float(np.tanh(middle + 4.5 * (high - middle))))


def _edges(thumbs: np.ndarray) -> np.ndarray:
    """float32 `[N, 2, 31, 31]`: differences to the pixel below and to the right."""
    values = thumbs.astype(np.float32)
    here = values[:, :-1, :-1]
    return np.stack([values[:, 1:, :-1] - here, values[:, :-1, 1:] - here], axis=1)


def _correlation(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Pearson correlation of each `left[n]` with `right[n]`, float32 `[N]`; 0 for constant ones."""
    left, right = (side.reshape(len(side), -1).astype(np.float32) for side in (left, right))
    left = left - left.mean(axis=1, keepdims=True)
    right = right - right.mean(axis=1, keepdims=True)
    norm = np.sqrt((left * left).sum(1) * (right * right).sum(1))
    return (left * right).sum(1) / np.maximum(norm, 1e-6)
