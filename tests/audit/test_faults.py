"""Faults planted in small data sets: each is found, alone and exactly; clean data have none."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchword.audit.copies import surplus_copies
from patchword.audit.faults import find_faults, look_beside
from patchword.audit.findings import Finding
from patchword.audit.scan import scan
from patchword.data import images
from patchword.data.registry import open_source
from patchword.data.sources import ArrayReader, Source

SIZE = (48, 64)


@pytest.fixture
def clean(folder: Callable[..., Path]) -> Path:
    return folder({"cat": 4, "dog": 4, "horse": 4}, SIZE)


@pytest.fixture
def divided(folder: Callable[..., Path]) -> Path:
    return folder({"train/cat": 4, "train/dog": 4, "test/cat": 2, "test/dog": 2}, SIZE)


def faults(root: Path | str, workers: int = 0) -> dict[str, Finding]:
    source = open_source(str(root))
    beside = look_beside(Path(root)) if Path(root).is_dir() else None
    found = find_faults(source, scan(source, workers=workers), beside)
    assert len({finding.code for finding in found}) == len(found)
    return {finding.code: finding for finding in found}


def test_large_images_are_hashed_in_strips(clean: Path, monkeypatch: pytest.MonkeyPatch):
    source = open_source(str(clean))
    whole = scan(source).facts
    monkeypatch.setattr(images, "STRIP", 8 * SIZE[1])
    assert np.array_equal(scan(source).facts, whole)


def cases(finding: Finding) -> list[tuple[tuple[str, ...], str]]:
    return [(item.names, item.about) for item in finding.items]


def only(found: dict[str, Finding], code: str, severity: str) -> Finding:
    assert list(found) == [code]
    assert found[code].severity == severity
    return found[code]


def test_clean_folders_have_no_faults(clean: Path):
    assert faults(clean) == {}


def test_clean_divided_folders_have_no_faults(divided: Path):
    assert faults(divided) == {}


def test_digits_are_small_and_nothing_else():
    finding = only(faults("digits"), "tiny", "note")
    assert finding.count == 1797


def test_unreadable_files(clean: Path):
    whole = (clean / "cat/000.png").read_bytes()
    (clean / "cat/cut.png").write_bytes(whole[: len(whole) // 2])
    (clean / "dog/empty.png").write_bytes(b"")
    (clean / "dog/text.jpg").write_bytes(b"not an image")
    finding = only(faults(clean), "unreadable", "error")
    reasons = {names[0]: about for names, about in cases(finding)}
    assert list(reasons) == ["cat/cut.png", "dog/empty.png", "dog/text.jpg"]
    assert reasons["dog/empty.png"] == "empty file"
    assert reasons["dog/text.jpg"] == "not an image of a known format"


def test_files_that_are_not_read(clean: Path):
    for name in ("cat/notes.txt", "cat/photo.heic", "dog/sub/x.psd", ".hidden/a.txt", "README.md"):
        (clean / name).parent.mkdir(exist_ok=True)
        (clean / name).write_bytes(b"x")
    (clean / "lost.png").write_bytes((clean / "cat/000.png").read_bytes())
    (clean / "dog/.DS_Store").write_bytes(b"x")
    finding = only(faults(clean), "unread", "warning")
    assert cases(finding) == [
        (("cat/notes.txt",), "no image suffix"),
        (("cat/photo.heic",), "no image suffix"),
        (("dog/sub/x.psd",), "no image suffix"),
        (("lost.png",), "outside of class folders"),
    ]


def test_a_suffix_of_another_format(clean: Path):
    (clean / "cat/000.png").rename(clean / "cat/000.jpg")
    finding = only(faults(clean), "suffix", "note")
    assert cases(finding) == [(("cat/000.jpg",), "PNG")]


def resaved(path: Path) -> bytes:
    """The same pixels in other bytes."""
    buffer = io.BytesIO()
    Image.open(path).save(buffer, "BMP")
    return buffer.getvalue()


def test_surplus_copies(clean: Path):
    (clean / "cat/copy.png").write_bytes((clean / "cat/001.png").read_bytes())
    (clean / "dog/again.bmp").write_bytes(resaved(clean / "dog/002.png"))
    (clean / "dog/once more.bmp").write_bytes(resaved(clean / "dog/002.png"))
    finding = only(faults(clean), "duplicate", "warning")
    assert finding.count == 3
    assert cases(finding) == [
        (("cat/001.png", "cat/copy.png"), "same file"),
        (("dog/002.png", "dog/again.bmp", "dog/once more.bmp"), "same pixels"),
    ]


def test_leakage(divided: Path):
    (divided / "test/cat/leak.png").write_bytes((divided / "train/cat/001.png").read_bytes())
    finding = only(faults(divided), "leakage", "error")
    assert cases(finding) == [(("test/cat/leak.png", "train/cat/001.png"), "test and train")]


def test_near_leakage_and_near_copies(divided: Path):
    image = Image.open(divided / "train/cat/001.png")
    image.save(divided / "test/cat/leak.jpg", quality=60)
    Image.open(divided / "train/dog/001.png").resize((60, 45)).save(divided / "train/dog/x.png")
    found = faults(divided)
    assert list(found) == ["near-leakage", "near-duplicate"]
    assert found["near-leakage"].severity == "error"
    assert found["near-leakage"].items[0].names == ("test/cat/leak.jpg", "train/cat/001.png")
    assert found["near-duplicate"].items[0].names == ("train/dog/001.png", "train/dog/x.png")


def test_contradictory_labels(clean: Path):
    (clean / "dog/copy.png").write_bytes((clean / "cat/001.png").read_bytes())
    Image.open(clean / "cat/002.png").save(clean / "horse/near.jpg", quality=70)
    found = faults(clean)
    assert {code: f.severity for code, f in found.items()} == {
        "contradiction": "error",
        "near-contradiction": "warning",
    }
    assert cases(found["contradiction"]) == [(("cat/001.png", "dog/copy.png"), "cat and dog")]
    near = found["near-contradiction"].items[0]
    assert near.names == ("cat/002.png", "horse/near.jpg")
    assert near.about.startswith("cat and horse, alike 0.9")


def test_flat_images_are_copies_of_equal_ones_only(clean: Path):
    for k in range(3):
        Image.new("RGB", (40 + k, 40), (10 * k, 90, 90)).save(clean / f"cat/flat{k}.png")
    finding = only(faults(clean), "blank", "note")
    assert finding.count == 3


def test_labels_that_differ_in_spelling(folder: Callable[..., Path]):
    names = {"cat": 3, "Cat": 3, "daffodil": 3, "dafodil": 2, "caf\u00e9": 3, "cafe\u0301 ": 3}
    found = faults(folder(names, SIZE))
    assert {code: f.severity for code, f in found.items()} == {
        "same-label": "error",
        "similar-label": "warning",
    }
    assert cases(found["same-label"]) == [
        (("Cat", "cat"), "3 and 3 images"),
        (("'cafe\\u0301 '", "'caf\\xe9'"), "3 and 3 images"),
    ]
    about = "one letter differs, 3 and 2 images"
    assert cases(found["similar-label"]) == [(("daffodil", "dafodil"), about)]


def test_empty_classes(clean: Path):
    (clean / "zebra").mkdir()
    (clean / "gnu").mkdir()
    (clean / "gnu/bad.png").write_bytes(b"")
    found = faults(clean)
    assert set(found) == {"unreadable", "empty-class"}
    assert found["empty-class"].severity == "error"
    assert cases(found["empty-class"]) == [(("gnu",), ""), (("zebra",), "")]


def test_classes_missing_in_a_part(folder: Callable[..., Path]):
    root = folder({"train/cat": 3, "train/dog": 3, "test/cat": 2, "test/owl": 2}, SIZE)
    found = faults(root)
    assert {code: f.severity for code, f in found.items()} == {
        "missing-in-train": "error",
        "missing-in-test": "warning",
    }
    assert cases(found["missing-in-train"]) == [(("owl",), "")]
    assert cases(found["missing-in-test"]) == [(("dog",), "")]


@pytest.mark.parametrize(("few", "severity"), [(10, None), (9, "note"), (2, "warning")])
def test_imbalance(few: int, severity: str | None, labelled: Callable[..., Source]):
    made = labelled([0] * 20 + [1] * few)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20 + few, 40, 40, 3)).astype(np.uint8)
    source = Source(**{**vars(made), "reader": ArrayReader(images, "made")})
    found = {finding.code: finding for finding in find_faults(source, scan(source))}
    if severity is None:
        assert found == {}
        return
    finding = only(found, "imbalance", severity)
    assert cases(finding) == [(("c000",), "20 images, most"), (("c001",), f"{few} images, fewest")]


def test_unusual_forms(clean: Path, photo: Callable[..., Image.Image]):
    photo(20, 30, 900).save(clean / "cat/tiny.png")
    photo(40, 200, 901).save(clean / "cat/wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(50, 60, 902).save(clean / "dog/turned.jpg", exif=exif)
    frames = [photo(40, 50, seed) for seed in (903, 904)]
    frames[0].save(clean / "dog/moves.webp", save_all=True, append_images=frames[1:])
    found = faults(clean)
    assert {code: cases(finding) for code, finding in found.items()} == {
        "tiny": [(("cat/tiny.png",), "30 x 20")],
        "aspect": [(("cat/wide.png",), "200 x 40")],
        "turned": [(("dog/turned.jpg",), "50 x 60")],
        "animated": [(("dog/moves.webp",), "50 x 40")],
    }
    assert {finding.severity for finding in found.values()} == {"note"}


def test_mixed_channels(clean: Path, photo: Callable[..., Image.Image]):
    photo(40, 50, 900).convert("L").save(clean / "cat/a.png")
    photo(40, 50, 901).convert("CMYK").save(clean / "cat/b.jpg")
    with_alpha = photo(40, 50, 902)
    with_alpha.putalpha(200)
    with_alpha.save(clean / "cat/c.png")
    deep = np.asarray(photo(40, 50, 903).convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(clean / "dog/d.png")
    photo(40, 50, 904).quantize(64).save(clean / "dog/e.gif")
    finding = only(faults(clean), "channels", "note")
    assert finding.what.startswith("mixed channels: 12 RGB, 1 ")
    assert cases(finding) == [
        (("cat/a.png",), "greyscale"),
        (("cat/b.jpg",), "CMYK"),
        (("cat/c.png",), "with transparency"),
        (("dog/d.png",), "16-bit"),
        (("dog/e.gif",), "palette"),
    ]


def test_all_images_of_another_kind_are_not_mixed(clean: Path):
    for path in clean.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert faults(clean) == {}


def test_missing_files_of_a_manifest(clean: Path):
    rows = ["path,label,split", "cat/000.png,cat,train", "dog/000.png,dog,train"]
    (clean / "list.csv").write_text("\n".join([*rows, "cat/gone.png,cat,train"]))
    finding = only(faults(clean / "list.csv"), "unreadable", "error")
    assert cases(finding) == [(("cat/gone.png",), "No such file or directory")]


def test_parquet(clean: Path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    files = [path.read_bytes() for path in sorted(clean.glob("*/*.png"))]
    for name, some in (("train", files[:8]), ("test", [*files[8:], files[3]])):
        labels = [k % 2 for k in range(len(some))]
        column = [{"bytes": data, "path": None} for data in some]
        table = pa.table({"image": column, "label": labels})
        (clean / "rows").mkdir(exist_ok=True)
        pq.write_table(table, clean / "rows" / f"{name}-00000.parquet")
    found = faults(clean / "rows")
    assert set(found) == {"leakage", "contradiction"}
    assert found["leakage"].items[0].names == ("test-00000.parquet#4", "train-00000.parquet#3")


def test_workers_change_nothing(divided: Path):
    (divided / "test/cat/leak.png").write_bytes((divided / "train/cat/001.png").read_bytes())
    (divided / "test/cat/bad.png").write_bytes(b"x")
    for k in range(80):  # more than one worker has something to do
        (divided / f"train/dog/bad{k:02}.png").write_bytes(b"x")
    assert faults(divided, workers=2) == faults(divided)


def test_the_copy_in_test_is_kept(divided: Path):
    data = (divided / "train/cat/001.png").read_bytes()
    for name in ("test/cat/a.png", "test/cat/b.png", "train/dog/a.png", "train/dog/b.png"):
        (divided / name).write_bytes(data)
    source = open_source(str(divided))
    pairs = [(source.keys[a], source.keys[b]) for a, b in surplus_copies(source, scan(source))]
    assert pairs == [
        ("test/cat/b.png", "test/cat/a.png"),
        ("train/cat/001.png", "test/cat/a.png"),
        ("train/dog/b.png", "train/dog/a.png"),
    ]
