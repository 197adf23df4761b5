"""Mutated image files: each decodes to finite pixels or is a `BadImage`, within bounded memory.

The work runs in a child process, so that a crash of a decoder shows as one failure and the peak of
the memory is the decoders' own.
"""

import io
import json
import random
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

MAX_PIXELS = 1 << 24
FIELD_VALUES = (0, 1, 0x7F, 0x80, 0xFF, 0x400, 0xFFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def seeds() -> list[bytes]:
    """Valid files of every format and of several kinds each."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (6, 8, 3)).astype(np.uint8)
    rgb = Image.fromarray(base).resize((48, 36), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    files: list[bytes] = []

    def save(image: Image.Image, kind: str, **options: object) -> None:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files.append(buffer.getvalue())

    save(rgb, "JPEG", exif=exif)
    save(rgb, "JPEG", progressive=True, quality=60)
    save(rgb.convert("CMYK"), "JPEG")
    save(rgb, "PNG", exif=exif)
    save(rgb.convert("RGBA"), "PNG")
    save(rgb.quantize(16), "PNG", transparency=3)
    save(Image.fromarray(rng.integers(0, 65536, (36, 48)).astype(np.uint16)), "PNG")
    save(rgb, "WEBP", exif=exif)
    save(rgb.convert("RGBA"), "WEBP", lossless=True)
    save(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90)])
    save(rgb, "BMP")
    save(rgb.quantize(200), "BMP")
    save(rgb.quantize(64), "GIF")
    save(rgb.quantize(64), "GIF", save_all=True, append_images=[rgb.rotate(90).quantize(64)])
    for compression in (None, "tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        save(rgb, "TIFF", compression=compression, exif=exif)
    save(rgb.convert("1"), "TIFF", compression="group4")
    return files


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four faults: flipped bits, a cut, header fields, doubled or swapped chunks."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if len(changed) < 2:
            break
        kind = rng.choice(("bits", "header bits", "cut", "field", "double", "swap", "noise"))
        at = rng.randrange(len(changed))
        length = rng.randint(1, max(1, len(changed) // 4))
        if kind == "bits":
            for _ in range(rng.randint(1, 8)):
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        elif kind == "header bits":
            for _ in range(rng.randint(1, 4)):
                changed[rng.randrange(min(64, len(changed)))] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del changed[at:]
        elif kind == "field":
            width = rng.choice((1, 2, 4))
            value = rng.choice(FIELD_VALUES) & (256**width - 1)
            at = rng.randrange(min(96, len(changed))) if rng.random() < 0.7 else at
            changed[at : at + width] = value.to_bytes(width, rng.choice(("big", "little")))
        elif kind == "double":
            changed[at:at] = changed[at : at + length]
        elif kind == "swap":
            changed[at : at + length] = changed[at : at + length][::-1]
        else:
            changed[at : at + length] = rng.randbytes(length)
    return bytes(changed)


def decode_all(count: int) -> dict[str, object]:
    """Run in the child: outcomes, and the growth of the peak resident memory in bytes."""
    import resource

    from patchword.data.images import BadImage, decode

    rng = random.Random(0)
    valid = seeds()
    for data in valid:
        decode(data, 3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    good = 0
    reasons: list[str] = []
    for number in range(count):
        data = mutate(valid[number % len(valid)], rng)
        channels = (1, 3, 4)[number % 3]
        at_least = (12, 16) if number % 2 else None
        try:
            image = decode(data, channels, at_least=at_least, max_pixels=MAX_PIXELS)
        except BadImage as error:
            reasons.append(str(error))
            continue
        pixels = np.asarray(image)
        assert pixels.dtype == np.uint8
        assert 0 < pixels.size <= MAX_PIXELS * channels
        assert image.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]
        good += 1
    assert all(0 < len(reason) < 200 and "\n" not in reason for reason in reasons)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    return {"good": good, "bad": len(reasons), "grown": grown * 1024}


@pytest.mark.grows
def test_mutated_files_neither_crash_nor_exhaust_memory(effort, record_property, tmp_path):
    count = effort(2_000, 100_000, 1_000_000)
    with (tmp_path / "stderr").open("w+b") as said:  # libtiff says much
        child = subprocess.run(
            [sys.executable, "-W", "error", __file__, str(count)],
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            timeout=180 + count / 200,
        )
        said.seek(max(0, said.tell() - 2000))
        assert child.returncode == 0, said.read().decode(errors="replace")
    result = json.loads(child.stdout)
    record_property("mutated images", count)
    assert result["good"] + result["bad"] == count
    # Both outcomes are common, or the mutations would test nothing.
    assert result["good"] > count // 20
    assert result["bad"] > count // 5
    # Four bytes per pixel, five times at the most, for an animated WebP: two canvases of libwebp's,
    # the pixels as decoded, the image, a conversion.
    assert result["grown"] < 5 * 4 * MAX_PIXELS


if __name__ == "__main__":
    print(json.dumps(decode_all(int(sys.argv[1]))))
