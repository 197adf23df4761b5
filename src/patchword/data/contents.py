"""A digest of what is in files: of all bytes where they are few, else of a sample of each file."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

WHOLE_BYTES = 1 << 31
"""Files that are together no larger (2 GiB) are read whole."""
BLOCK = 4096
"""Bytes of a block of the sample."""
STRIDE = 1 << 20
"""A file that is sampled gives a block for each of so many bytes (1 MiB), three at least."""

_THREADS = 8
_CHUNK = 256  # files that a thread takes at a time
_PIECE = 1 << 20


def digest_files(paths: Sequence[str], *, whole: bool) -> str:
    """SHA-256 (hex) over the size of each file, in order, and what is in it.

    All of it if `whole`. Else a sample: `BLOCK` bytes from the start, the end and evenly between
    them, one block for each `STRIDE` begun, three at least; so a change that leaves the size and
    all of these as they are goes unseen. Times do not count: a file that is touched or copied
    keeps its digest. A file that cannot be read counts as such; one that is not regular is never
    opened. Eight threads read.
    """
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    digest = hashlib.sha256(b"whole" if whole else b"sample")
    with ThreadPoolExecutor(_THREADS) as pool:
        for part in pool.map(lambda some: b"".join(_digest(path, whole) for path in some), chunks):
            digest.update(part)
    return digest.hexdigest()


def _digest(path: str, whole: bool) -> bytes:
    """32 bytes for one file."""
    digest = hashlib.sha256()
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return hashlib.sha256(b"not a regular file").digest()
        digest.update(f"{status.st_size} ".encode())
        with open(path, "rb", buffering=0) as file:
            if whole or status.st_size <= 3 * BLOCK:
                while piece := file.read(_PIECE):
                    digest.update(piece)
            else:
                for start in _starts(status.st_size):
                    file.seek(start)
                    digest.update(file.read(BLOCK))
    except (OSError, ValueError):  # a ValueError: no name of a file
        return hashlib.sha256(b"unreadable").digest()
    return digest.digest()


def _starts(size: int) -> list[int]:
    """Where the blocks of a sample begin in a file of `size` bytes."""
    last = max(2, (size - 1) // STRIDE)
    return [(size - BLOCK) * number // last for number in range(last + 1)]
