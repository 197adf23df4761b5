"""Folders of images without labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchword.data.sources import open_source
from patchword.data.splits import divide
from patchword.data.unlabelled import open_images
from patchword.spec.parse import PatchwordError


def fill(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), len(name), np.uint8)).save(path)
    return root


def test_a_flat_folder_is_one_class(tmp_path: Path):
    source = open_images(str(fill(tmp_path / "my pictures", "b.png", "a.jpg", "c.png")))
    assert (source.name, source.classes) == ("my-pictures", ("images",))
    assert source.keys == ("a.jpg", "b.png", "c.png")
    assert source.labels.tolist() == [0, 0, 0]
    assert source.parts == {}
    assert source.sizes.min() > 0
    assert source.read(1) == (tmp_path / "my pictures" / "b.png").read_bytes()


def test_nothing_is_held_out_for_a_test(tmp_path: Path):
    source = open_images(str(fill(tmp_path, *(f"{i:02}.png" for i in range(20)))))
    sizes = {part: len(at) for part, at in divide(source, val=0.1, test=0.1, seed=0).items()}
    assert sizes == {"train": 18, "val": 2, "test": 0}
    asked = divide(source, val=0.1, test=0.2, seed=0)
    assert len(asked["test"]) == 4


def test_parts_with_flat_images(tmp_path: Path):
    source = open_images(str(fill(tmp_path, "train/1.png", "train/2.png", "validation/1.png")))
    assert source.classes == ("images",)
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
