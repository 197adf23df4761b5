"""What libtiff says of damaged files: heard here, in place of standard error.

Pillow decodes compressed TIFF files with libtiff and silences its warnings, but not its errors:
these are written past Python, and some of them do not stop Pillow from taking the image. libtiff
has one handler of errors for the process. It is replaced while we decode and put back after it, as
redirecting the file descriptor would swallow the lines of other threads too.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from PIL import Image

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
_failed: set[int] = set()  # threads


@_Handler
def _note(module: int, text: int, values: int) -> None:
    _failed.add(threading.get_ident())


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
    """Run the body, a decode, with libtiff silent. Raises `OSError` if it came to its end although
    libtiff reported an error in this thread. Not for two threads at once."""
    set_handler = _setter()
    if set_handler is None:
        yield
        return
    thread = threading.get_ident()
    _failed.discard(thread)
    before = set_handler(ctypes.cast(_note, ctypes.c_void_p).value)
    try:
        yield
    finally:
        set_handler(before)
    if thread in _failed:
        raise OSError("damaged TIFF data")
