"""Checking a data set, setting files aside, and bringing them back."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from patchword.audit import fix
from patchword.audit.fix import aside_of, undo
from patchword.commands.checking import check
from patchword.spec.parse import PatchwordError, UsageError

quiet = Console(file=io.StringIO())


def picture(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC)


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """Two bad files, and copies within train, between the parts, and between labels."""
    root = tmp_path / "pets"
    for k, name in enumerate(("train/cat", "train/dog", "test/cat", "test/dog")):
        (root / name).mkdir(parents=True)
        for i in range(3):
            picture(10 * k + i).save(root / name / f"{i}.png")
    data = (root / "train/cat/0.png").read_bytes()
    (root / "train/cat/copy.png").write_bytes(data)
    (root / "test/cat/leak.png").write_bytes(data)
    (root / "train/cat/sub").mkdir()
    (root / "train/cat/sub/cut.png").write_bytes(data[:300])
    (root / "train/dog/empty.jpg").write_bytes(b"")
    return root


BAD = ["train/cat/0.png", "train/cat/copy.png", "train/cat/sub/cut.png", "train/dog/empty.jpg"]


def files(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def codes(root: Path, **settings: bool) -> list[str]:
    return [finding.code for finding in check(root, console=quiet, **settings).findings]


def test_a_check_alone_changes_nothing(faulty: Path):
    before = files(faulty)
    done = check(faulty, console=quiet)
    assert [f.code for f in done.findings] == ["unreadable", "leakage", "duplicate"]
    assert done.moved == []
    assert done.images == 16
    assert files(faulty) == before
    assert not aside_of(faulty).exists()


def test_fix_moves_and_undo_brings_back(faulty: Path):
    before = files(faulty)
    done = check(faulty, fix=True, console=quiet)
    assert [move.path for move in done.moved] == BAD
    assert done.moved[0].why == "same pixels as test/cat/leak.png"
    assert done.moved[3].why == "empty file"
    assert done.aside == faulty.parent / "pets.set-aside"
    assert done.findings == []
    assert done.images == 12
    left, aside = files(faulty), files(aside_of(faulty))
    log = aside.pop("moved.jsonl")
    assert [json.loads(line)["path"] for line in log.splitlines()] == BAD
    assert sorted(aside) == BAD
    assert left | aside == before
    assert codes(faulty) == []
    assert check(faulty, fix=True, console=quiet).moved == []
    assert [move.path for move in undo(faulty)] == BAD
    assert files(faulty) == before
    assert not aside_of(faulty).exists()


def test_several_fixes_are_undone_together(faulty: Path):
    before = files(faulty)
    check(faulty, fix=True, console=quiet)
    (faulty / "train/dog/late.png").write_bytes(b"x")
    check(faulty, fix=True, console=quiet)
    assert len(undo(faulty)) == 5
    assert files(faulty) == before | {"train/dog/late.png": b"x"}


def test_undo_overwrites_nothing(faulty: Path):
    check(faulty, fix=True, console=quiet)
    (faulty / "train/dog/empty.jpg").write_bytes(b"another")
    assert [move.path for move in undo(faulty)] == BAD[:3]
    assert (faulty / "train/dog/empty.jpg").read_bytes() == b"another"
    assert sorted(files(aside_of(faulty))) == ["moved.jsonl", BAD[3]]
    (faulty / "train/dog/empty.jpg").unlink()
    assert [move.path for move in undo(faulty)] == BAD[3:]


def test_fix_overwrites_nothing(faulty: Path):
    (aside_of(faulty) / "train/dog").mkdir(parents=True)
    (aside_of(faulty) / "train/dog/empty.jpg").write_bytes(b"mine")
    before = files(faulty)
    with pytest.raises(PatchwordError, match=r"empty\.jpg exists already; move"):
        check(faulty, fix=True, console=quiet)
    assert files(faulty) == before
    assert files(aside_of(faulty)) == {"train/dog/empty.jpg": b"mine"}


def test_a_fix_that_stops_halfway_is_undone(faulty: Path, monkeypatch: pytest.MonkeyPatch):
    before = files(faulty)
    rename, calls = os.rename, []

    def failing(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 3:
            raise OSError(28, "No space left on device", str(source))
        rename(source, target)

    monkeypatch.setattr(fix.os, "rename", failing)
    with pytest.raises(PatchwordError, match=r"No space left on device; nothing is lost"):
        check(faulty, fix=True, console=quiet)
    assert len(files(faulty)) == len(before) - 2
    monkeypatch.setattr(fix.os, "rename", rename)
    assert [move.path for move in undo(faulty)] == BAD[:2]
    assert files(faulty) == before


def test_links_do_not_lose_the_kept_file(faulty: Path):
    """What is seen again through a linked folder, or kept as a link, is no copy to be moved."""
    (faulty / "train/dog/more").symlink_to(faulty / "test/dog", target_is_directory=True)
    (faulty / "test/dog/link.png").symlink_to("0.png")  # a link that goes
    (faulty / "test/dog/00.png").symlink_to(faulty / "train/dog/0.png")  # one that is kept
    before = files(faulty)
    done = check(faulty, fix=True, console=quiet)
    assert [move.path for move in done.moved] == ["test/dog/link.png", *BAD]
    for i in range(3):
        assert (faulty / f"test/dog/{i}.png").is_file()
    assert (faulty / "test/dog/00.png").is_file()
    undo(faulty)
    assert files(faulty) == before


def test_labels_in_contradiction_are_left_to_the_user(faulty: Path):
    (faulty / "train/dog/other.png").write_bytes((faulty / "test/cat/0.png").read_bytes())
    done = check(faulty, fix=True, console=quiet)
    assert [move.path for move in done.moved] == BAD
    assert [finding.code for finding in done.findings] == ["leakage", "contradiction"]


def test_nothing_to_undo(faulty: Path):
    with pytest.raises(PatchwordError, match=r"nothing of .* was set aside"):
        undo(faulty)


def test_a_damaged_log_is_said(faulty: Path):
    check(faulty, fix=True, console=quiet)
    (aside_of(faulty) / "moved.jsonl").write_text("{")
    with pytest.raises(PatchwordError, match=r"moved\.jsonl cannot be read .*by hand"):
        undo(faulty)


def test_fix_is_for_folders(faulty: Path):
    (faulty / "list.csv").write_text("path,label\ntrain/cat/0.png,cat\n")
    for data in (faulty / "list.csv", "digits"):
        with pytest.raises(UsageError, match="--fix moves files of a folder"):
            check(data, fix=True, console=quiet)


@pytest.mark.parametrize("near", [-1, 16])
def test_near_is_bounded(faulty: Path, near: int):
    with pytest.raises(UsageError, match="use 0 to 15 bits"):
        check(faulty, near=near, console=quiet)


def test_progress_ends_with_the_rate(faulty: Path):
    shown = io.StringIO()
    check(faulty, console=Console(file=shown))
    assert "read 16 images in " in shown.getvalue()
    assert " images/s)" in shown.getvalue()
