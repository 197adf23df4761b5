import contextlib
import io
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from patchword.data import images
from patchword.data.images import FORMATS, BadImage, decode, opened


def pixels(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_lossless_formats_come_back_exactly(photo, encode, kind, channels, mode):
    image = photo(9, 14)
    result = decode(encode(image, kind), channels)
    assert result.mode == mode
    np.testing.assert_array_equal(pixels(result), pixels(image.convert(mode)))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats_come_back_closely(photo, encode, kind):
    image = photo(40, 56)
    result = decode(encode(image, kind, quality=95), 3)
    assert np.abs(pixels(result) - pixels(image)).mean() < 3


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_pass_through(channels):
    array = np.random.default_rng(0).integers(0, 256, (5, 7, channels)).astype(np.uint8)
    with opened(array, channels) as picture:
        assert picture.size == (5, 7)
        image = picture.decoded((1, 1))
    np.testing.assert_array_equal(pixels(image).reshape(array.shape), array)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_once(photo, encode, kind, orientation):
    image = photo(24, 40)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 98}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encode(image, kind, exif=exif, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    with opened(data, 3) as picture:
        height, width = picture.size
        result = picture.decoded((24, 24))
    assert result.size == expected.size == (width, height)
    assert expected.size == ((24, 40) if orientation >= 5 else (40, 24))
    np.testing.assert_array_equal(pixels(result), pixels(expected))


def test_broken_exif_does_not_make_the_pixels_bad(photo, encode):
    image = photo(16, 16)
    broken = b"Exif\0\0II*\0\xff\xff\xff\x7f garbage"
    result = decode(encode(image, "JPEG", exif=broken), 3)
    np.testing.assert_array_equal(pixels(result), pixels(decode(encode(image, "JPEG"), 3)))


def test_16_bit_grey_is_scaled_not_clipped(encode):
    values = np.linspace(0, 65535, 60).astype(np.uint16).reshape(6, 10)
    for kind in ("PNG", "TIFF"):
        result = pixels(decode(encode(Image.fromarray(values), kind), 3))
        np.testing.assert_allclose(result[..., 0], values / 257, atol=0.51)
        np.testing.assert_array_equal(result[..., 0], result[..., 2])


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG of raw rows, for kinds that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_16_bit_grey_is_rounded_to_the_nearest(encode):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    result = np.asarray(decode(encode(Image.fromarray(values)), 1), int)
    np.testing.assert_array_equal(result, (values.astype(int) + 128) // 257)


def test_16_bit_colour_is_scaled():
    values = np.random.default_rng(0).integers(0, 65536, (4, 5, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    result = pixels(decode(png(5, 4, 16, 2, rows), 3))
    np.testing.assert_allclose(result, values / 257, atol=1)


def test_float_and_32_bit_tiff(encode):
    unit = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    result = pixels(decode(encode(Image.fromarray(unit), "TIFF"), 1))
    np.testing.assert_allclose(result, unit * 255, atol=0.51)
    for wrong in (unit * 1000, unit - 0.5, unit * np.nan):
        with pytest.raises(BadImage, match="pixel values"):
            decode(encode(Image.fromarray(wrong), "TIFF"), 1)


@pytest.mark.parametrize(("brightest", "white"), [(65535, 65535), (65536, 2**31 - 1)])
def test_white_of_32_bit_grey_is_that_of_16_bits_where_nothing_is_brighter(
    encode, brightest, white
):
    values = np.linspace(0, brightest, 12).astype(np.int32).reshape(3, 4)
    result = pixels(decode(encode(Image.fromarray(values), "TIFF"), 1))
    np.testing.assert_allclose(result, values / white * 255, atol=0.51)


def test_one_bit(encode):
    bits = np.random.default_rng(0).random((9, 11)) < 0.5
    result = decode(encode(Image.fromarray(bits), "PNG"), 3)
    np.testing.assert_array_equal(pixels(result)[..., 1], bits * 255)


def test_cmyk_jpeg(photo, encode):
    image = photo(24, 32)
    result = decode(encode(image.convert("CMYK"), "JPEG", quality=95), 3)
    assert np.abs(pixels(result) - pixels(image)).mean() < 3


def test_palette(photo, encode):
    image = photo(10, 12).quantize(32)
    for kind in ("PNG", "GIF", "BMP"):
        np.testing.assert_array_equal(
            pixels(decode(encode(image, kind), 3)), pixels(image.convert("RGB"))
        )


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(photo, encode, mode):
    image = photo(8, 10).convert(mode)
    alpha = np.arange(80, dtype=np.uint8).reshape(8, 10) * 3
    image.putalpha(Image.fromarray(alpha))
    shares = alpha[..., None] / 255
    rgb = pixels(image.convert("RGB"))
    result = pixels(decode(encode(image, "PNG"), 3))
    np.testing.assert_allclose(result, rgb * shares + 255 * (1 - shares), atol=1.01)
    kept = decode(encode(image, "PNG"), 4)
    np.testing.assert_array_equal(pixels(kept)[..., 3], alpha)


def test_transparent_palette_entry_and_colour_become_white(encode):
    image = Image.new("P", (4, 2), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 0)
    for kind in ("PNG", "GIF"):
        result = decode(encode(image, kind, transparency=0), 3)
        assert result.getpixel((0, 0)) == (255, 255, 255)
        assert result.getpixel((1, 0)) == (200, 100, 50)
    keyed = encode(image.convert("RGB"), "PNG", transparency=(10, 20, 30))
    assert decode(keyed, 3).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(encode, kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode(data, 3).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_truncated_files_are_bad(photo, encode, kind):
    image = photo(48, 64)
    data = encode(image.quantize(64) if kind == "GIF" else image, kind)
    decode(data, 3)
    for share in (0.1, 0.5, 0.8):
        with pytest.raises(BadImage):
            decode(data[: int(share * len(data))], 3)


def damaged_tiffs(photo, encode):
    """Compressed TIFF files with other bytes in the middle."""
    for compression in ("tiff_lzw", "tiff_deflate", "jpeg", "group4"):
        image = photo(96, 128)
        data = bytearray(
            encode(
                image.convert("1") if "4" in compression else image, "TIFF", compression=compression
            )
        )
        data[len(data) // 3 : len(data) // 3 + 60] = b"\xff" * 60
        yield bytes(data)


def test_damaged_tiffs_say_nothing_of_their_own(photo, encode, capfd):
    """libtiff would write to the file descriptor itself."""
    for data in damaged_tiffs(photo, encode):
        with pytest.raises(BadImage, match=r"^OSError: (decoder error|damaged TIFF data)"):
            decode(data, 3)
    assert capfd.readouterr() == ("", "")


def test_libtiff_is_silent_for_our_decoding_only(photo, encode, capfd):
    data = next(iter(damaged_tiffs(photo, encode)))
    for _ in range(2):
        with pytest.raises(BadImage):
            decode(data, 3)
        assert capfd.readouterr().err == ""
        with pytest.raises(OSError, match="decoder error"):
            Image.open(io.BytesIO(data)).load()
        assert capfd.readouterr().err


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>404</html>", "known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "known format"),
        (b"\xff\xd8\xff", "."),
        (b"GIF89a" + b"\0" * 40, "."),
    ],
)
def test_other_bytes_are_bad(data, reason):
    with pytest.raises(BadImage, match=reason):
        decode(data, 3)


def test_huge_images_are_refused_by_their_header():
    with pytest.raises(BadImage, match="30000 x 30000 is more than 178,956,970 pixels"):
        decode(png(30_000, 30_000, 8, 2, b""), 3)
    with pytest.raises(BadImage, match="10 x 10 is more than 99 pixels"):
        decode(png(10, 10, 8, 0, (b"\0" + b"\7" * 10) * 10), 1, max_pixels=99)
    assert decode(png(10, 10, 8, 0, (b"\0" + b"\7" * 10) * 10), 1, max_pixels=100).size == (10, 10)


KINDS = (*FORMATS, "TIFF lzw", "GIF animation")


def good_file(photo, encode, kind: str) -> bytes:
    """An image of 40 x 32 of each format, and of the ways that take another path in Pillow."""
    image = photo(32, 40)
    if kind == "GIF animation":
        frames = [photo(32, 40, seed) for seed in range(3)]
        return encode(frames[0], "GIF", save_all=True, append_images=frames[1:], disposal=2)
    if kind == "TIFF lzw":
        return encode(image, "TIFF", compression="tiff_lzw")
    return encode(image, kind)


@pytest.mark.parametrize("pillows", [1, 40 * 32, None])
@pytest.mark.parametrize("kind", KINDS)
def test_the_limit_is_ours_whatever_pillows_is(photo, encode, monkeypatch, kind, pillows):
    """Below and above Pillow's own, which stays as it is and acts for others."""
    data = good_file(photo, encode, kind)
    expected = pixels(decode(data, 3))
    monkeypatch.setattr(images, "STRIP", 40 * 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
    np.testing.assert_array_equal(pixels(decode(data, 3)), expected)
    assert decode(data, 1, max_pixels=40 * 32).size == (40, 32)
    with pytest.raises(BadImage, match=r"^40 x 32 is more than 1,279 pixels$"):
        decode(data, 3, max_pixels=40 * 32 - 1)
    assert pillows == Image.MAX_IMAGE_PIXELS
    if pillows == 1:
        with pytest.raises(Image.DecompressionBombError, match="limit of 2 pixels"):
            Image.open(io.BytesIO(data)).load()


@pytest.mark.parametrize("kind", KINDS)
def test_the_limit_acts_before_pixels_are_decoded(photo, encode, monkeypatch, kind):
    data = good_file(photo, encode, kind)
    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadImage, match=r"^40 x 32 is more than 100 pixels$"):
        decode(data, 3, max_pixels=100)


@pytest.mark.parametrize("channels", [1, 3])
def test_reduced_decode_is_close_to_full(photo, encode, channels):
    data = encode(photo(403, 611), "JPEG", quality=95)
    full = decode(data, channels)
    reduced = decode(data, channels, at_least=(100, 150))
    assert reduced.size == (153, 101)
    expected = full.resize(reduced.size, Image.Resampling.BOX, box=(0, 0, 611, 403))
    assert np.abs(pixels(reduced) - pixels(expected)).mean() < 1.5
    assert decode(data, channels, at_least=(404, 1)).size == full.size


def kinds_of_files(photo, encode):
    """A file of each way that pixels are stored, 37 x 53, turned where the format knows that."""
    image, exif = photo(37, 53), Image.Exif()
    exif[0x0112] = 6
    palette = image.quantize(30)
    faded = image.convert("RGBA")
    faded.putalpha(image.convert("L").transpose(Image.Transpose.ROTATE_180))
    grey = np.asarray(image.convert("L"))
    yield from (encode(one, "PNG", exif=exif) for one in (image, palette, faded))
    yield from (encode(faded.convert("LA")), encode(image.convert("1")))
    yield encode(palette, transparency=3)
    yield encode(palette, transparency=bytes(range(0, 240, 8)))
    yield encode(image, transparency=image.getpixel((5, 5)))
    yield encode(Image.fromarray(grey.astype(np.uint16) * 200))
    for values in (grey.astype(np.int32) * 1000, grey / np.float32(255), grey.astype(np.float32)):
        yield encode(Image.fromarray(values), "TIFF")
    yield encode(image, "TIFF", exif=exif, compression="tiff_lzw")
    yield encode(image.convert("CMYK"), "JPEG", exif=exif)
    yield encode(palette, "GIF", transparency=2)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_conversion_in_strips_changes_nothing(photo, encode, monkeypatch, channels):
    files = list(kinds_of_files(photo, encode))
    whole = [decode(data, channels) for data in files]
    monkeypatch.setattr(images, "STRIP", 53 * 8)
    for data, expected in zip(files, whole, strict=True):
        found = decode(data, channels)
        assert found.mode == expected.mode
        np.testing.assert_array_equal(pixels(found), pixels(expected))


def test_bad_values_of_one_strip_are_found(encode, monkeypatch):
    monkeypatch.setattr(images, "STRIP", 8)
    for wrong in (-1, np.nan, 300):
        values = np.full((40, 5), 0.5, np.float32)
        values[20, 2] = wrong
        with pytest.raises(BadImage, match="pixel values"):
            decode(encode(Image.fromarray(values), "TIFF"), 1)


@pytest.mark.parametrize(("at_least", "factor"), [((4, 6), 8), ((9, 13), 4), ((18, 26), 2)])
def test_large_images_come_out_reduced(photo, encode, monkeypatch, at_least, factor):
    """Exactly by the means of squares, before they are turned; just as large ones are as ever."""
    monkeypatch.setattr(images, "LARGE", 37 * 53 - 1)
    for data in kinds_of_files(photo, encode):
        full = decode(data, 3)
        upright = at_least if full.height == 37 else at_least[::-1]
        found = decode(data, 3, at_least=upright)
        if not data.startswith(b"\xff\xd8"):
            turned = full.height == 53 and data.startswith(b"\x89PNG")
            stored = full.transpose(Image.Transpose.ROTATE_90) if turned else full
            means = stored.reduce(factor)
            expected = means.transpose(Image.Transpose.ROTATE_270) if turned else means
            np.testing.assert_array_equal(pixels(found), pixels(expected))
            assert decode(data, 3, at_least=(37, 30)).size == full.size
    monkeypatch.setattr(images, "LARGE", 37 * 53)
    assert decode(encode(photo(37, 53)), 3, at_least=at_least).size == (53, 37)


PEAK = """
import pathlib, sys
from patchword.data import images

images.LARGE, images.STRIP = 1 << 20, 1 << 18

def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

def decode(name):
    images.decode(pathlib.Path(name).read_bytes(), 3, at_least=(224, 224))

decode(sys.argv[1])
before = peak()
decode(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.parametrize("kind", ["faded", "16-bit", "turned"])
def test_a_large_image_is_in_memory_once(tmp_path, encode, kind):
    """In a process of its own, for its peak of memory."""
    size, options = (4000, 3000), {"compress_level": 1}
    if kind == "faded":
        image, bytes_each = Image.new("RGBA", size, (200, 100, 50, 128)), 4
    elif kind == "16-bit":
        image, bytes_each = Image.fromarray(np.full(size[::-1], 3000, np.uint16)), 2
    else:
        exif = Image.Exif()
        exif[0x0112] = 6
        image, bytes_each, options = Image.new("RGB", size), 4, options | {"exif": exif}
    names = [tmp_path / "small.png", tmp_path / "large.png"]
    names[0].write_bytes(encode(image.resize((500, 400), 0)))
    names[1].write_bytes(encode(image, **options))
    run = subprocess.run([sys.executable, "-c", PEAK, *names], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 1.5 * bytes_each * size[0] * size[1]


def test_threads_may_decode_at_once(photo, encode):
    """The warning filters are as before afterwards, and each thread gets its own image."""
    files = [encode(photo(30, 40, seed), "JPEG") for seed in range(8)]
    expected = [pixels(decode(data, 3)) for data in files]
    before = list(warnings.filters)
    wrong = []

    def work(number: int) -> None:
        for _ in range(20):
            if not np.array_equal(pixels(decode(files[number], 3)), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert list(warnings.filters) == before


@contextmanager
def meanwhile(work: Callable[[], None]):
    """`work` again and again in another thread, from before the body until after it."""
    started, ended = threading.Event(), threading.Event()

    def repeat() -> None:
        while not ended.is_set():
            work()
            started.set()

    thread = threading.Thread(target=repeat)
    thread.start()
    assert started.wait(30)
    try:
        yield
    finally:
        ended.set()
        thread.join(30)


@pytest.mark.parametrize("stage", ["open", "load"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_slow_file_stops_no_other_thread(photo, encode, monkeypatch, kind, stage):
    data = good_file(photo, encode, kind)
    begun, go_on, done = (threading.Event() for _ in range(3))
    place, name = (Image, "open") if stage == "open" else (ImageFile.ImageFile, "load_prepare")
    real = getattr(place, name)

    def slowly(*values, **options):
        if threading.current_thread() is slow:
            begun.set()
            assert go_on.wait(30)
        return real(*values, **options)

    monkeypatch.setattr(place, name, slowly)
    slow = threading.Thread(target=lambda: decode(data, 3))
    other = threading.Thread(target=lambda: decode(data, 3) and done.set())
    slow.start()
    assert begun.wait(30)
    other.start()
    first = done.wait(5)
    go_on.set()
    slow.join(30)
    other.join(30)
    assert first


@pytest.mark.parametrize("kind", KINDS)
def test_no_warning_of_another_thread_is_lost(photo, encode, kind):
    data = good_file(photo, encode, kind)
    raised = 0

    def warn() -> None:
        nonlocal raised
        warnings.warn("unrelated, from another thread", UserWarning, stacklevel=1)
        raised += 1

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with meanwhile(warn):
            for _ in range(60):
                decode(data, 3)
    assert len(heard) == raised > 0


@pytest.mark.parametrize("action", ["always", "error", "ignore"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_good_image_is_accepted_whatever_other_threads_warn_of(photo, encode, kind, action):
    data = good_file(photo, encode, kind)
    expected = pixels(decode(data, 3))

    def warn() -> None:
        with warnings.catch_warnings(record=True), contextlib.suppress(UserWarning):
            warnings.simplefilter(action)
            warnings.warn("unrelated, from another thread", UserWarning, stacklevel=1)

    with warnings.catch_warnings(record=True), meanwhile(warn):
        for _ in range(60):
            np.testing.assert_array_equal(pixels(decode(data, 3)), expected)


@pytest.mark.parametrize("action", ["always", "error", "ignore"])
def test_a_damaged_tiff_is_refused_whatever_the_filters_are(photo, encode, action):
    """A cut tag, which Pillow skips with a warning; and damage that libtiff alone tells."""
    cut = bytearray(encode(photo(32, 40), "TIFF", dpi=(72, 72)))
    (place,) = struct.unpack_from("<L", cut, 4)
    for entry in range(place + 2, place + 2 + 12 * struct.unpack_from("<H", cut, place)[0], 12):
        if struct.unpack_from("<H", cut, entry)[0] == 282:  # the resolution, of no use to us
            struct.pack_into("<L", cut, entry + 8, len(cut) - 4)
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with pytest.raises(BadImage, match=r"^Truncated File Read$"):
            decode(bytes(cut), 3)
        for data in damaged_tiffs(photo, encode):
            with pytest.raises(BadImage, match=r"^OSError: (decoder error|damaged TIFF data)"):
                decode(data, 3)


@pytest.mark.parametrize("action", ["always", "error"])
def test_broken_metadata_is_no_warning_of_ours_but_one_of_others(photo, encode, action):
    data = encode(photo(16, 16), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f garbage")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter(action)
        decode(data, 3)
        assert not heard
        warnings.simplefilter("always")
        Image.open(io.BytesIO(data))
    assert "Corrupt EXIF data" in str(heard[0].message)
    assert heard[0].filename.endswith("TiffImagePlugin.py")


def test_what_libtiff_says_to_another_thread_is_not_swallowed(photo, encode, monkeypatch, capfd):
    data = next(iter(damaged_tiffs(photo, encode)))
    begun, go_on = threading.Event(), threading.Event()
    real = ImageFile.ImageFile.load_prepare

    def slowly(self):
        if threading.current_thread() is ours:
            begun.set()
            assert go_on.wait(30)
        return real(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", slowly)
    accepted = []
    good = good_file(photo, encode, "TIFF lzw")
    ours = threading.Thread(target=lambda: accepted.append(decode(good, 3)))
    ours.start()
    assert begun.wait(30)
    with pytest.raises(OSError, match="decoder error"):
        Image.open(io.BytesIO(data)).load()
    said = capfd.readouterr().err
    go_on.set()
    ours.join(30)
    assert said
    assert accepted
