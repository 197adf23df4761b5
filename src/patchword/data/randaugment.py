"""RandAugment (Cubuk et al., arXiv 1909.13719) as AugReg and big_vision run it.

Sixteen operations, one drawn uniformly per layer and always applied, all at magnitude m of 10, with
the ranges of the EfficientNet code that those projects took over. There, two operations grow weaker
as m grows: at m = 10 posterize keeps 4 bits and solarize does nothing. Shifts and cut-outs, given
there in pixels of a 224-pixel image, are shares of the side here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from PIL import Image, ImageDraw, ImageEnhance, ImageOps

GREY = 128
"""fills what comes in from outside the image"""

Operation = Callable[[Image.Image, float, random.Random], Image.Image]
"""(image of mode L or RGB, strength = m / 10, random numbers) -> image of the same mode and size"""


def _fill(image: Image.Image) -> int | tuple[int, int, int]:
    return GREY if image.mode == "L" else (GREY, GREY, GREY)


def _either_sign(value: float, rng: random.Random) -> float:
    return value if rng.random() < 0.5 else -value


def _affine(image: Image.Image, a: float, b: float, c: float, d: float) -> Image.Image:
    """x reads from x + a y + b, y from c x + y + d (pixels, from the top left)."""
    matrix = (1, a, b, c, 1, d)
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=_fill(image)
    )


def _rotate(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    return image.rotate(_either_sign(30 * strength, rng), fillcolor=_fill(image))


def _shear_x(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    return _affine(image, _either_sign(0.3 * strength, rng), 0, 0, 0)


def _shear_y(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    return _affine(image, 0, 0, _either_sign(0.3 * strength, rng), 0)


def _translate_x(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    return _affine(image, 0, _either_sign(strength * 100 / 224 * image.width, rng), 0, 0)


def _translate_y(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    return _affine(image, 0, 0, 0, _either_sign(strength * 100 / 224 * image.height, rng))


def _cutout(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    """A grey box around a random pixel, at full strength 80/224 of each side (less at the edge)."""
    x, y = rng.randrange(image.width), rng.randrange(image.height)
    dx = math.floor(strength * 40 / 224 * image.width)
    dy = math.floor(strength * 40 / 224 * image.height)
    if dx and dy:
        image = image.copy()
        box = (x - dx, y - dy, x + dx - 1, y + dy - 1)
        ImageDraw.Draw(image).rectangle(box, fill=_fill(image))
    return image


def _posterize(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    return ImageOps.posterize(image, min(8, max(1, int(4 * strength))))


def _solarize(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    return ImageOps.solarize(image, min(256, int(256 * strength)))


def _solarize_add(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    """Pixel values below 128 are raised by up to 110 x strength."""
    add = int(110 * strength)
    table = [min(255, value + add) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    def apply(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
        return kind(image).enhance(1.8 * strength + 0.1)

    return apply


OPERATIONS: dict[str, Operation] = {
    "autocontrast": lambda image, strength, rng: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, rng: ImageOps.equalize(image),
    "invert": lambda image, strength, rng: ImageOps.invert(image),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "cutout": _cutout,
}
_NAMES = tuple(OPERATIONS)


def randaugment(
    image: Image.Image, layers: int, magnitude: float, rng: random.Random
) -> Image.Image:
    """`image` (mode L or RGB) after `layers` operations drawn from `rng`, at `magnitude` of 10."""
    for _ in range(layers):
        image = OPERATIONS[_NAMES[rng.randrange(len(_NAMES))]](image, magnitude / 10, rng)
    return image
