"""Archives of tensors: numpy's `.npz`, read without pickle and without trusting what it claims."""

from __future__ import annotations

import ast
import math
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchword.spec.parse import PatchwordError

RATIO, SLACK = 10, 1 << 20
"""Weights hardly compress: what unpacks to more than `RATIO` times the file and `SLACK` bytes is a
bomb."""
LONGEST_HEADER = 10_000
CHUNK = 1 << 20
UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, RuntimeError),
    *(ValueError, TypeError, SyntaxError, MemoryError, OverflowError, NotImplementedError),
)
"""What reading a damaged archive may raise."""


@dataclass(frozen=True)
class Contents:
    """The tensors of a file, not yet read."""

    shapes: dict[str, tuple[int, ...]]
    tensor: Callable[[str], Tensor]
    """one by name, of the dtype it is stored in; raises `PatchwordError` if it cannot be read"""
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    """of a safetensors header"""


class _Array(NamedTuple):
    info: zipfile.ZipInfo
    start: int
    """bytes before the data"""
    dtype: np.dtype[Any]
    fortran: bool
    shape: tuple[int, ...]


def open_zip(path: Path) -> zipfile.ZipFile:
    """An archive whose entries have names of their own, and claim no more than the file can hold.

    Raises `PatchwordError`."""
    try:
        archive = zipfile.ZipFile(path)
    except UNREADABLE as error:
        raise PatchwordError(f"{path} is not a readable zip archive: {error}") from None
    entries = archive.infolist()
    if len({entry.filename for entry in entries}) < len(entries):
        raise PatchwordError(f"{path} is not to be trusted: it holds several entries of one name")
    plain = [entry for entry in entries if entry.compress_type == zipfile.ZIP_STORED]
    packed = [entry for entry in entries if entry.compress_type == zipfile.ZIP_DEFLATED]
    if len(plain) + len(packed) < len(entries) or any(entry.flag_bits & 1 for entry in entries):
        raise PatchwordError(
            f"{path} is encrypted or compressed in a way that few programs read; save it again"
        )
    size, claimed = path.stat().st_size, sum(entry.file_size for entry in entries)
    if sum(e.file_size for e in plain) > size or claimed > RATIO * size + SLACK:
        raise PatchwordError(
            f"{path} is not to be trusted: its {size:,} bytes claim to hold {claimed:,}"
        )
    return archive


def open_npz(path: Path, archive: zipfile.ZipFile) -> Contents:
    """The arrays of an `.npz` opened by `open_zip`: real numbers, booleans, and bfloat16 as numpy
    stores it, two bytes without a type. Raises `PatchwordError` if there are others."""
    arrays: dict[str, _Array] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name in arrays:
            raise PatchwordError(f"{path} is not to be trusted: it holds {name!r} twice")
        try:
            with archive.open(info) as file:
                arrays[name] = _described(file, info)
        except UNREADABLE as error:
            raise PatchwordError(f"{path}: {name!r} is not a readable array: {error}") from None

    def tensor(name: str) -> Tensor:
        try:
            with archive.open(arrays[name].info) as file:
                return _values(file, arrays[name])
        except UNREADABLE as error:
            raise PatchwordError(f"{path}: {name!r} is not a readable array: {error}") from None

    return Contents({name: array.shape for name, array in arrays.items()}, tensor)


def _described(file: IO[bytes], info: zipfile.ZipInfo) -> _Array:
    """What the header of a `.npy` says, checked against the size of its entry. Raises what
    `UNREADABLE` lists."""
    magic = file.read(8)
    if magic[:6] != b"\x93NUMPY" or magic[6:7] not in (b"\1", b"\2", b"\3"):
        raise ValueError("it is not in numpy's format")
    count = 2 if magic[6] == 1 else 4
    length = int.from_bytes(file.read(count), "little")
    if length > LONGEST_HEADER:
        raise ValueError(f"its header is {length:,} bytes long")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd literals
        try:
            header = ast.literal_eval(file.read(length).decode("latin-1").strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            header = None
    if not isinstance(header, dict) or header.keys() != {"descr", "fortran_order", "shape"}:
        raise ValueError("its header is not numpy's")
    kind, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
    if not isinstance(kind, str) or not re.fullmatch(r"[<>|=]?([fiub][1248]|V2)", kind):
        raise ValueError(f"it holds {kind!r:.40}, not numbers; only pickle could read that")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"its shape is {shape!r:.40}")
    if len(shape) > 8:
        raise ValueError(f"it has {len(shape)} dimensions")
    dtype, start = np.dtype(kind), 8 + count + length
    held = info.file_size - start
    if math.prod(shape) * dtype.itemsize != held:
        raise ValueError(f"it claims to be {list(shape)} of {dtype.name}, but is {held:,} bytes")
    return _Array(info, start, dtype, bool(fortran), shape)


def _values(file: IO[bytes], array: _Array) -> Tensor:
    file.read(array.start)
    flat = np.empty(math.prod(array.shape), array.dtype)
    fill(file, flat)
    if array.dtype.kind == "V":
        value = torch.from_numpy(flat.view(np.int16)).view(torch.bfloat16)
    else:
        native = flat.astype(array.dtype.newbyteorder("="), copy=False)
        value = torch.from_numpy(native)
    if array.fortran:
        return value.reshape(array.shape[::-1]).permute(*reversed(range(len(array.shape))))
    return value.reshape(array.shape)


def fill(file: IO[bytes], flat: np.ndarray) -> None:
    """Read a 1-D array's bytes from a file, without a copy of them. Raises `EOFError`."""
    buffer, at = flat.view(np.uint8), 0
    while at < len(buffer):
        piece = file.read(min(CHUNK, len(buffer) - at))
        if not piece:
            raise EOFError(f"it ends after {at:,} of {len(buffer):,} bytes")
        buffer[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
        at += len(piece)
