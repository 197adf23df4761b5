"""Checkpoint folders: whole or not at all, the newest whole one found."""

import json

import pytest

from patchword.spec.parse import PatchwordError
from patchword.training.checkpoint import (
    Checkpoints,
    damage,
    link,
    replace_file,
    replace_text,
    write_folder,
    write_text,
)


def writer(text):
    """Writes a folder of two files."""

    def write(folder):
        write_text(folder / "a.txt", text)
        write_text(folder / "state.json", json.dumps({"step": text}))

    return write


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_written_with_its_manifest(tmp_path):
    write_folder(tmp_path / "deep" / "x", writer("one"))
    assert names(tmp_path / "deep") == ["x"]
    assert names(tmp_path / "deep" / "x") == ["a.txt", "manifest.json", "state.json"]
    assert damage(tmp_path / "deep" / "x") is None


@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt(), ValueError()])
def test_an_interrupted_write_leaves_the_target_as_it_was(tmp_path, error):
    target = tmp_path / "x"
    write_folder(target, writer("one"))
    (target / "a.txt").write_text("damaged")

    def fail(folder):
        writer("half")(folder)
        raise error

    with pytest.raises(type(error)):
        write_folder(tmp_path / "y", fail)
    assert not (tmp_path / "y").exists()
    write_folder(tmp_path / "y", writer("two"))  # over what was left
    assert (tmp_path / "y/a.txt").read_text() == "two"
    assert names(tmp_path) == ["x", "y"]


def test_a_whole_folder_stays_and_a_damaged_one_is_replaced(tmp_path):
    write_folder(tmp_path / "x", writer("one"))
    write_folder(tmp_path / "x", writer("two"))
    assert (tmp_path / "x/a.txt").read_text() == "one"
    (tmp_path / "x/a.txt").write_text("onE")
    write_folder(tmp_path / "x", writer("two"))
    assert (tmp_path / "x/a.txt").read_text() == "two"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize(
    ("manifest", "problem"),
    [
        ("{}", "manifest.json is empty"),
        ("[]", "manifest.json cannot be read"),
        ("{", "manifest.json cannot be read"),
        ('{"a.txt": 1}', "a.txt does not match its checksum"),
        ('{"b.txt": "00"}', "b.txt is missing"),
        (None, "manifest.json is missing"),
    ],
)
def test_damage_is_named(tmp_path, manifest, problem):
    write_folder(tmp_path / "x", writer("one"))
    path = tmp_path / "x/manifest.json"
    path.unlink() if manifest is None else path.write_text(manifest)
    assert str(damage(tmp_path / "x")).startswith(problem)


def test_the_newest_are_kept_and_linked(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.newest() is None
    for step in (2, 10, 100, 1000):
        checkpoints.save(step, writer(f"{step}"))
    assert names(checkpoints.folder) == ["step-00000100", "step-00001000"]
    assert (tmp_path / "last/a.txt").read_text() == "1000"
    newest = checkpoints.newest()
    assert newest == (checkpoints.folder / "step-00001000", {"step": "1000"})


def test_the_best_is_kept_besides(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 2, 3):
        checkpoints.save(step, writer(f"{step}"))
        if step != 3:
            checkpoints.save_best(step, writer(f"best {step}"))
    assert names(checkpoints.folder) == ["best-00000002", "step-00000003"]
    assert (tmp_path / "best/a.txt").read_text() == "best 2"
    checkpoints.forget_best()
    assert not (tmp_path / "best").exists()
    checkpoints.save_best(2, writer("not written again"))
    assert (tmp_path / "best/a.txt").read_text() == "best 2"


def test_damaged_ones_are_passed_over(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, writer(f"{step}"))
    (checkpoints.folder / "step-00000003/a.txt").write_text("4")
    (checkpoints.folder / "step-00000002/state.json").unlink()
    found = checkpoints.newest()
    assert found is not None
    assert found[0].name == "step-00000001"
    assert (tmp_path / "last/a.txt").read_text() == "1"
    said = [record.getMessage() for record in caplog.records]
    assert "step-00000003 is damaged (a.txt does not match its checksum)" in said[0]
    assert "step-00000002 is damaged (state.json is missing)" in said[1]
    (checkpoints.folder / "step-00000001/a.txt").unlink()
    with pytest.raises(PatchwordError, match="every checkpoint under"):
        checkpoints.newest()


def test_what_a_kill_left_is_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(1, writer("1"))
    for stray in (".writing-step-00000002", ".removing-step-00000000"):
        (checkpoints.folder / stray).mkdir()
        (checkpoints.folder / stray / "a.txt").write_text("half")
    (tmp_path / ".linking-last").symlink_to("nowhere")
    checkpoints = Checkpoints(tmp_path, keep=3)
    assert names(checkpoints.folder) == ["step-00000001"]
    checkpoints.save(2, writer("2"))
    assert (tmp_path / "last/a.txt").read_text() == "2"


def test_links_are_relative_and_replaced(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        link(tmp_path / "link", tmp_path / name)
        assert (tmp_path / "link").readlink().name == name
        assert not (tmp_path / "link").readlink().is_absolute()


def test_a_file_is_replaced_and_the_folder_stays_whole(tmp_path):
    folder = tmp_path / "best-1"
    write_folder(folder, writer("1"))
    replace_file(folder / "a.txt", lambda path: replace_text(path, "2"))
    assert (folder / "a.txt").read_text() == "2"
    assert damage(folder) is None
    assert names(folder) == ["a.txt", "manifest.json", "state.json"]

    def full(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        replace_file(folder / "a.txt", full)
    assert damage(folder) is None


def test_text_is_replaced_whole(tmp_path):
    path = tmp_path / "config.json"
    replace_text(path, "é1")
    replace_text(path, "é2")
    assert path.read_text(encoding="utf-8") == "é2"
    assert names(tmp_path) == ["config.json"]
