"""Seeds derived from what the random numbers are for."""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed, a pure function of (seed, purpose, numbers); different for each of them."""
    text = ":".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
