"""Decoding of image files from anywhere: every fault of a file becomes one exception."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from patchword.data.pillow import check_size, errors_heard, guarded, warned

SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
"""The formats that are opened, and the names of their files; JPEG includes MPO, the multi-picture
kind of cameras."""
FORMATS = tuple(SUFFIXES)
MODES = {1: "L", 3: "RGB", 4: "RGBA"}

MAX_PIXELS = 178_956_970
"""The limit where none is asked for, half a gigabyte of RGB: Pillow's own hard one as installed."""

LARGE = 1 << 26
"""Pixels above which every image, not only a JPEG, may come out reduced (67 megapixels)."""
STRIP = 1 << 22
"""Pixels that are converted at a time, so that a large image is in memory once."""

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


class BadImage(Exception):
    """The image cannot be decoded. The message is a short reason."""


@dataclass(frozen=True, eq=False)
class Picture:
    """An image whose header is read; its pixels too, but for a JPEG's."""

    image: Image.Image
    """as it is stored"""
    mode: str
    """of the result"""
    orientation: int = 1
    """EXIF's: how the stored image is turned"""
    reduced_by: Literal["nothing", "draft", "means"] = "nothing"
    """how it may be made smaller: a JPEG while it is decoded, other files by means of squares"""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the whole image, upright."""
        width, height = self.image.size
        return (width, height) if self.orientation >= 5 else (height, width)

    def decoded(self, at_least: tuple[int, int] | None = None) -> Image.Image:
        """The pixels, once: as `decode` gives them."""
        image, factor = self.image, 1
        if at_least is not None:
            least = [max(1, side) for side in at_least]  # (width, height) as stored
            least = least if self.orientation >= 5 else least[::-1]
            if self.reduced_by == "draft":
                image.draft(self.mode, (least[0], least[1]))
            elif self.reduced_by == "means" and image.width * image.height > LARGE:
                left = min(has // needs for has, needs in zip(image.size, least, strict=True))
                factor = next((by for by in (8, 4, 2) if left >= by), 1)
        image.load()
        image = _finish(image, self.mode, factor)
        return image.transpose(_TURNS[self.orientation]) if self.orientation in _TURNS else image


@contextmanager
def opened(
    data: bytes | np.ndarray, channels: int, max_pixels: int = MAX_PIXELS
) -> Iterator[Picture]:
    """The picture that `data` hold, as `decode` takes them. Whatever goes wrong in the body, which
    looks at the size and decodes, is a fault of the data: `BadImage`."""
    try:
        with guarded(max_pixels):
            yield _open(data, MODES[channels])
    except BadImage:
        raise
    except MemoryError:
        raise BadImage("not enough memory to decode it") from None
    except Image.DecompressionBombError as error:
        raise BadImage(str(error)) from None
    except Image.UnidentifiedImageError:
        raise BadImage(
            "empty file" if len(data) == 0 else "not an image of a known format"
        ) from None
    except Exception as error:  # a decoder may raise anything on hostile bytes
        reason = " ".join(str(error).split())[:120]
        raise BadImage(f"{type(error).__name__}: {reason}" if reason else "undecodable") from None


def decode(
    data: bytes | np.ndarray,
    channels: int,
    *,
    at_least: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """An image of mode L, RGB or RGBA (1, 3 or 4 `channels`), upright and fully decoded.

    `data` is an encoded file or uint8 `[H, W, C]`. EXIF orientation is applied, the first frame of
    an animation taken, 16 bits scaled to 8, transparency laid over white (but kept for RGBA). With
    `at_least`, a JPEG may come out reduced by 2, 4 or 8, but not below that (height, width), and
    so may any other file of more than `LARGE` pixels (each pixel the mean of a square of its side).
    Raises `BadImage` for anything that is wrong with the data, and from the header alone for an
    image of more than `max_pixels`, whatever Pillow's own limit is. Threads may decode at once.

    Memory: what Pillow decodes, 4 bytes a pixel (1 for grey and palettes, 2 for 16 bits), and the
    result, where that is another image.
    """
    with opened(data, channels, max_pixels) as picture:
        return picture.decoded(at_least)


def _open(data: bytes | np.ndarray, mode: str) -> Picture:
    if isinstance(data, np.ndarray):
        image = Image.fromarray(data[..., 0] if data.shape[2] == 1 else data)
        check_size(image.size)
        return Picture(image, mode)
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if min(image.size) < 1:
        raise BadImage(f"size {image.width} x {image.height}")
    check_size(image.size)
    if image.format in ("JPEG", "MPO"):
        return Picture(image, mode, exif_orientation(image), "draft")
    if image.format == "TIFF":
        with errors_heard():
            image.load()
        if said := warned():
            raise BadImage(" ".join(said.split())[:120])
        return Picture(image, mode, reduced_by="means")  # Pillow turns TIFF files itself
    image.load()  # a PNG may say behind its pixels how it is turned
    return Picture(image, mode, exif_orientation(image), "means")


def exif_orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) where the metadata is missing or broken."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken metadata does not make the pixels bad
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """(upper edge, rows from there on) of about `STRIP` pixels each, from top to bottom; the edges
    are multiples of 8."""
    rows = max(8, STRIP // image.width // 8 * 8)
    if image.height <= rows:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _finish(image: Image.Image, mode: str, factor: int = 1) -> Image.Image:
    """`image` in `mode`, reduced by `factor`, with the pixels that converting it in one piece would
    give."""
    if factor == 1 and image.mode == mode and (mode == "RGBA" or not _transparent(image)):
        return image
    full = _full_scale(image)
    size = (-(-image.width // factor), -(-image.height // factor))
    result: Image.Image | None = None
    for top, strip in strips(image):
        part = _as_mode(strip, mode, full)
        part = part if factor == 1 else part.reduce(factor)
        if part.size == size:
            return part
        result = result or Image.new(mode, size)
        result.paste(part, (0, top // factor))
    assert result is not None, "an image has rows"
    return result


def _transparent(image: Image.Image) -> bool:
    return image.has_transparency_data and image.mode != "RGBX"


def _as_mode(image: Image.Image, mode: str, full: float | None) -> Image.Image:
    """`image` in `mode`, transparency laid over white unless `mode` keeps it; `full` is its
    `_full_scale`."""
    if full is not None:
        image = _to_8_bit(image, full)
    transparent = _transparent(image)
    if transparent and mode != "RGBA":
        layered = image.convert("RGBA")
        image = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image.alpha_composite(layered)
    if image.mode not in ("L", "RGB", "RGBA"):
        image = image.convert("RGBA" if transparent and mode == "RGBA" else "RGB")
    return image if image.mode == mode else image.convert(mode)


def _full_scale(image: Image.Image) -> float | None:
    """The value that stands for white in a grey image of 16 or 32 bits or floats, None for other
    images. Raises `BadImage` for values that no image has."""
    if not (image.mode.startswith("I") or image.mode == "F"):
        return None
    if image.mode.startswith("I;16"):
        return 65535.0
    spans = [(float(part.min()), float(part.max())) for part in _values(image)]
    low, high = np.min([span[0] for span in spans]), np.max([span[1] for span in spans])
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0:
        raise BadImage("negative or non-finite pixel values")
    if image.mode == "F":
        if high > 255:
            raise BadImage(f"float pixel values up to {high:g}; expected 0 to 1, or 0 to 255")
        return 1.0 if high <= 1 else 255.0
    return 65535.0 if high <= 65535 else 2.0**31 - 1


def _values(image: Image.Image) -> Iterator[np.ndarray]:
    return (np.asarray(strip) for _, strip in strips(image))


def _to_8_bit(image: Image.Image, full: float) -> Image.Image:
    """Values from 0 to `full`, scaled (not clipped) to 8 bits."""
    scaled = np.asarray(image).astype(np.float32)
    scaled *= 255.0 / full
    return Image.fromarray(np.rint(scaled, out=scaled).astype(np.uint8))
