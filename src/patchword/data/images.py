"""Decoding of image files from anywhere: every fault of a file becomes one exception."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
from PIL import Image

from patchword.data.libtiff import errors_heard

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""The formats that are opened; JPEG includes MPO, the multi-picture kind of cameras."""
MODES = {1: "L", 3: "RGB", 4: "RGBA"}

MAX_PIXELS = 178_956_970
"""Pillow's own hard limit: half a gigabyte of RGB. A higher one has no effect."""

AtLeast = tuple[int, int] | Callable[[int, int], tuple[int, int]]
"""(height, width), or a function that makes it from the full image's (height, width)"""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Filters of `warnings` are global to the process: one decode at a time may change them.
_guard = threading.Lock()


def _renew_guard() -> None:
    global _guard
    _guard = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_guard)


class BadImage(Exception):
    """The image cannot be decoded. The message is a short reason."""


def decode(
    data: bytes | np.ndarray,
    channels: int,
    *,
    at_least: AtLeast | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """An image of mode L, RGB or RGBA (1, 3 or 4 `channels`), upright and fully decoded.

    `data` is an encoded file or uint8 `[H, W, C]`. EXIF orientation is applied, the first frame of
    an animation taken, 16 bits scaled to 8, transparency laid over white (but kept for RGBA). With
    `at_least`, a JPEG may come out reduced by 2, 4 or 8, but not below that (height, width).
    Raises `BadImage` for anything that is wrong with the data.
    """
    try:
        if isinstance(data, np.ndarray):
            image = Image.fromarray(data[..., 0] if data.shape[2] == 1 else data)
            if callable(at_least):
                at_least(image.height, image.width)
            return image if image.mode == MODES[channels] else _as_mode(image, MODES[channels])
        with _guard, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
            return _decode_file(data, MODES[channels], at_least, max_pixels, said)
    except BadImage:
        raise
    except MemoryError:
        raise BadImage("not enough memory to decode it") from None
    except Image.DecompressionBombError:
        raise BadImage(f"more than {max_pixels:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise BadImage(
            "empty file" if len(data) == 0 else "not an image of a known format"
        ) from None
    except Exception as error:  # a decoder may raise anything on hostile bytes
        reason = " ".join(str(error).split())[:120]
        raise BadImage(f"{type(error).__name__}: {reason}" if reason else "undecodable") from None


def _decode_file(
    data: bytes,
    mode: str,
    at_least: AtLeast | None,
    max_pixels: int,
    said: list[warnings.WarningMessage],
) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width < 1 or height < 1:
        raise BadImage(f"size {width} x {height}")
    if width * height > max_pixels:
        raise BadImage(f"{width} x {height} is more than {max_pixels:,} pixels")
    orientation = 1
    if image.format in ("JPEG", "MPO"):
        orientation = exif_orientation(image)
        turned = orientation >= 5
        if callable(at_least):
            at_least = at_least(width, height) if turned else at_least(height, width)
        if at_least is not None:
            wanted = at_least if turned else at_least[::-1]
            image.draft(mode, (max(1, wanted[0]), max(1, wanted[1])))
    with errors_heard() if image.format == "TIFF" else nullcontext():
        image.load()
    if image.format == "TIFF":  # Pillow turns TIFF files itself
        if said:
            raise BadImage(" ".join(str(said[0].message).split())[:120])
    elif image.format not in ("JPEG", "MPO"):
        orientation = exif_orientation(image)
    if callable(at_least) and image.format not in ("JPEG", "MPO"):
        turned = orientation >= 5
        at_least(*(image.size if turned else image.size[::-1]))
    image = _as_mode(image, mode)
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def exif_orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) where the metadata is missing or broken."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken metadata does not make the pixels bad
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _as_mode(image: Image.Image, mode: str) -> Image.Image:
    """`image` in `mode`, transparency laid over white unless `mode` keeps it."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    transparent = image.has_transparency_data and image.mode != "RGBX"
    if transparent and mode != "RGBA":
        layered = image.convert("RGBA")
        image = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image.alpha_composite(layered)
    if image.mode not in ("L", "RGB", "RGBA"):
        image = image.convert("RGBA" if transparent and mode == "RGBA" else "RGB")
    return image if image.mode == mode else image.convert(mode)


def _to_8_bit(image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits or floats, scaled (not clipped) to 8 bits."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0:
        raise BadImage("negative or non-finite pixel values")
    if image.mode == "F":
        if high > 255:
            raise BadImage(f"float pixel values up to {high:g}; expected 0 to 1, or 0 to 255")
        full = 1.0 if high <= 1 else 255.0
    else:
        full = 65535.0 if high <= 65535 else 2.0**31 - 1
    scaled = values.astype(np.float32)  # large images are in memory only once
    scaled *= 255.0 / full
    return Image.fromarray(np.rint(scaled, out=scaled).astype(np.uint8))
