"""Folders of images without labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchword.data.registry import open_source
from patchword.data.splits import divide, load_division, save_division
from patchword.data.unlabelled import find_images, open_images
from patchword.spec.parse import PatchwordError

MakePhotos = Callable[..., Path]


def fill(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), len(name), np.uint8)).save(path)
    return root


def test_a_flat_folder_has_no_labels(tmp_path: Path):
    source = open_images(str(fill(tmp_path / "my pictures", "b.png", "a.jpg", "c.png")))
    assert (source.name, source.classes, source.labelled) == ("my-pictures", (), False)
    assert source.keys == ("a.jpg", "b.png", "c.png")
    assert source.labels.tolist() == [-1, -1, -1]
    assert source.parts == {}
    assert source.sizes.min() > 0
    assert source.read(1) == (tmp_path / "my pictures" / "b.png").read_bytes()


def test_the_data_of_earlier_versions_are_recognised(tmp_path: Path):
    """They took a flat folder for one class called images: its runs go on, divided alike."""
    names = [f"{i:02}.png" for i in range(20)]
    source = open_images(str(fill(tmp_path, *names)))
    earlier = dataclasses.replace(source, classes=("images",), labels=np.zeros(20, np.int64))
    assert earlier.labelled
    assert source.digests == earlier.digests
    assert source.size_digests == earlier.size_digests
    ours, theirs = (divide(each, val=0.2, test=0.1, seed=3) for each in (source, earlier))
    assert {part: at.tolist() for part, at in ours.items()} == {
        part: at.tolist() for part, at in theirs.items()
    }
    save_division(tmp_path / "splits.json", earlier, theirs)
    assert load_division(tmp_path / "splits.json", source).keys() == theirs.keys()


def test_nothing_is_held_out_for_a_test(tmp_path: Path):
    source = open_images(str(fill(tmp_path, *(f"{i:02}.png" for i in range(20)))))
    sizes = {part: len(at) for part, at in divide(source, val=0.1, test=0.1, seed=0).items()}
    assert sizes == {"train": 18, "val": 2, "test": 0}
    asked = divide(source, val=0.1, test=0.2, seed=0)
    assert len(asked["test"]) == 4


def test_parts_with_flat_images(tmp_path: Path):
    source = open_images(str(fill(tmp_path, "train/1.png", "train/2.png", "validation/1.png")))
    assert not source.labelled
    assert {part: at.tolist() for part, at in source.parts.items()} == {"train": [0, 1], "val": [2]}


@pytest.mark.parametrize(
    "names",
    [
        ("red/1.png", "green/1.png"),
        ("red/1.png", "stray.png"),
        ("train/red/1.png", "train/green/1.png", "val/red/1.png"),
        ("only/1.png",),
    ],
)
def test_class_folders_are_labels(tmp_path: Path, names: tuple[str, ...]):
    found, known = open_images(str(fill(tmp_path, *names))), open_source(str(tmp_path))
    assert found.classes == known.classes
    assert found.fingerprint == known.fingerprint


def test_other_sources_are_opened_as_they_are(tmp_path: Path):
    assert open_images("digits").classes == tuple("0123456789")
    fill(tmp_path, "1.png", "2.png")
    (tmp_path / "list.csv").write_text("path,label\n1.png,x\n2.png,x\n")
    assert open_images(str(tmp_path / "list.csv")).classes == ("x",)
    with pytest.raises(PatchwordError, match="no data at"):
        open_images(str(tmp_path / "missing"))


def test_a_folder_without_images_is_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(PatchwordError, match="no images"):
        open_images(str(tmp_path))


def test_found_images(tmp_path: Path, photos: Path):
    once = photos / "red" / "00.jpg"
    assert find_images([once, str(once), photos / "red"], {})[0] == str(once)
    assert len(find_images([once, photos / "red"], {})) == 13
    (tmp_path / "none").mkdir()
    for pattern in (tmp_path / "none", "no/such/*.png", tmp_path / "x.png"):
        with pytest.raises(PatchwordError, match="no images at"):
            find_images([pattern], {})
    missing: dict[str, str] = {}
    assert find_images([once, "no/such.png"], missing) == [str(once)]
    assert missing == {"no/such.png": "no such file"}


def test_folders_and_patterns_that_match_them_give_no_hidden_files(
    tmp_path: Path, make_photos: MakePhotos
):
    root = make_photos(tmp_path / "new", 2)
    for name in (".hidden.jpg", "._00.jpg", "__MACOSX/00.jpg", "notes.txt"):
        (root / "red" / name).parent.mkdir(exist_ok=True)
        (root / "red" / name).write_bytes(b"")
    wanted = [str(path) for path in sorted(root.glob("*/0?.*"))]
    assert len(wanted) == 6
    for pattern in (root, f"{root}/", f"{root}/*"):
        assert find_images([pattern], {}) == wanted


def test_names_that_cannot_be_looked_up_do_not_end_the_list(photos: Path):
    once = str(photos / "red" / "00.jpg")
    for name in ("x" * 5000, "a\0b.png"):
        missing: dict[str, str] = {}
        assert find_images([name, once], missing) == [once]
        assert missing == {name: "no such file"}
