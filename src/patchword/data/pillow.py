"""Pillow for many threads: what it keeps for the whole process is ours in the threads that decode.

Its limit of pixels is a global that any library may set; its warnings go through the filters of the
program around us, which may turn them off, or into errors; and libtiff, with which it decodes
compressed TIFF files, writes errors past Python, of which some do not stop Pillow from taking the
image. So the three places are stood in for, once, at import: in a thread inside `guarded` they do
what we ask for, in all others what they did before. Nothing is locked while an image is decoded.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin


class _Here(threading.local):
    """Of each thread."""

    max_pixels: int | None = None
    """the limit of the decode that this thread is at, None outside of `guarded`"""
    said: tuple[str, ...] = ()
    """Pillow's warnings there"""
    failed: bool | None = None
    """whether libtiff reported an error, None outside of `errors_heard`"""


_here = _Here()


@contextmanager
def guarded(max_pixels: int) -> Iterator[None]:
    """Run the body, which opens and decodes with Pillow, with this limit in place of Pillow's, and
    without a warning. Raises `DecompressionBombError` for an image of more pixels, by its header.
    """
    before = _here.max_pixels, _here.said
    _here.max_pixels, _here.said = max_pixels, ()
    try:
        yield
    finally:
        _here.max_pixels, _here.said = before


def warned() -> str | None:
    """The first warning that Pillow gave in the `guarded` body that this thread is in."""
    return _here.said[0] if _here.said else None


def check_size(size: tuple[int, int], **options: Any) -> None:
    """In place of Pillow's check of (width, height)."""
    limit = _here.max_pixels
    if limit is None:
        _pillows_check(size, **options)
    elif size[0] * size[1] > limit:
        raise Image.DecompressionBombError(f"{size[0]} x {size[1]} is more than {limit:,} pixels")


class _Warnings:
    """The module `warnings`, as Pillow sees it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(warnings, name)

    def warn(
        self,
        message: Any,
        category: type[Warning] | None = None,
        stacklevel: int = 1,
        **options: Any,
    ) -> None:
        if _here.max_pixels is None:
            warnings.warn(message, category, stacklevel + 1, **options)
        else:
            _here.said += (str(message),)


_pillows_check = Image._decompression_bomb_check
Image._decompression_bomb_check = check_size
for _module in (Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin):
    _module.warnings = _Warnings()  # pyright: ignore[reportAttributeAccessIssue]


# libtiff -----------------------------------------------------------------------------------------

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
_before: int | None = None
"""the handler that ours stands for"""


@_Handler
def _note(module: int | None, text: int | None, values: int | None) -> None:
    if _here.failed is not None:
        _here.failed = True
    elif _before:
        _Handler(_before)(module, text, values)


_OURS = ctypes.cast(_note, ctypes.c_void_p).value


@functools.cache
def _setter() -> Callable[[int | None], int | None] | None:
    """`TIFFSetErrorHandler` of the libtiff that Pillow is linked to; None where it is not to be
    found, as in a static build. Takes and returns addresses."""
    try:
        function = ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
    return function


@contextmanager
def errors_heard() -> Iterator[None]:
    """Run the body, the decode of a TIFF file, with libtiff silent in this thread. Raises `OSError`
    if it came to its end although libtiff reported an error."""
    global _before
    if set_handler := _setter():
        before = set_handler(_OURS)  # it stays, and hands on what other threads meet
        _before = _before if before == _OURS else before
    _here.failed = False
    try:
        yield
        if _here.failed:
            raise OSError("damaged TIFF data")
    finally:
        _here.failed = None
