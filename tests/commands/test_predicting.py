"""`patchword predict` on a finished run."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import patchword
from patchword import create_model

Command = Callable[..., tuple[int, str, str]]
AsJson = Callable[..., Any]


def test_predict_json(finished: Path, photos: Path, as_json: AsJson):
    found = as_json(
        "predict", finished, photos / "green", photos / "red" / "00.jpg", "--workers", 0
    )
    assert len(found) == 13
    assert found[-1]["path"] == str(photos / "red" / "00.jpg")
    for row in found:
        assert row.keys() == {"path", "label", "probability", "top", "abstained"}
        assert row["abstained"] is False
        shares = [entry["probability"] for entry in row["top"]]
        assert [entry.keys() for entry in row["top"]] == [{"label", "probability"}] * 3
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1)
        assert row["top"][0] == {"label": row["label"], "probability": row["probability"]}
    right = sum(Path(row["path"]).parent.name == row["label"] for row in found)
    assert right >= 11


def test_predict_agrees_with_the_model(finished: Path, photos: Path):
    """Top-k, batch sizes and workers change nothing in the first figures."""
    wanted = patchword.predict(finished, photos / "blue", workers=0)
    changes: list[dict[str, Any]] = [
        {"batch_size": 1, "workers": 0},
        {"batch_size": 5, "workers": 2},
        {"top": 1},
    ]
    for options in changes:
        found = patchword.predict(finished, photos / "blue", **options)
        assert [p.path for p in found] == [p.path for p in wanted]
        assert [p.label for p in found] == [p.label for p in wanted]
        assert [p.probability for p in found] == pytest.approx([p.probability for p in wanted])
    assert all(len(p.top) == 1 for p in patchword.predict(finished, photos / "blue", top=1))


def test_bad_files_are_listed_and_the_rest_done(
    finished: Path, photos: Path, tmp_path: Path, command: Command, caplog: pytest.LogCaptureFixture
):
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    words = ("predict", finished, photos / "red", empty, "--workers", 0)
    code, out, err = command(*words, "--json")
    assert code == 0
    assert len(json.loads(out)) == 12
    assert "2 of 14 files could not be read" in err
    assert str(photos / "red" / "broken.jpg") in caplog.text
    assert str(empty) in caplog.text
    bad: dict[str, str] = {}
    patchword.predict(finished, [empty, photos / "red" / "00.jpg"], bad=bad, workers=0)
    assert list(bad) == [str(empty)]
    code, out, err = command("predict", finished, empty, "--json")
    assert code == 1
    assert out == ""
    assert "none of 1 images can be read" in err


def test_predict_csv(finished: Path, photos: Path, command: Command):
    code, out, _ = command("predict", finished, photos / "blue", "--csv", "--top", 2)
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == ["path", "label1", "probability1", "label2", "probability2"]
    assert len(rows) == 12
    assert all(float(row["probability1"]) >= float(row["probability2"]) for row in rows)


def listed(*names: str) -> io.TextIOWrapper:
    """Standard input that holds these lines."""
    return io.TextIOWrapper(io.BytesIO(os.fsencode("\n".join([*names, ""]))), "utf-8")


def test_predict_from_a_list_and_a_pattern(
    finished: Path, photos: Path, command: Command, monkeypatch: pytest.MonkeyPatch
):
    names = [str(photos / "red" / "00.jpg"), str(photos / "blue" / "01.png")]
    monkeypatch.setattr("sys.stdin", listed(*names, ""))
    code, out, _ = command("predict", finished, "-", "--json", "--workers", 0)
    assert code == 0
    assert [row["path"] for row in json.loads(out)] == names
    code, out, _ = command("predict", finished, f"{photos}/*/0[01].*", "--json", "--workers", 0)
    assert code == 0
    assert len(json.loads(out)) == 6


def test_predict_table_shows_names_as_they_are(
    finished: Path, photos: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
):
    """Brackets and colons in file names are no markup."""
    odd = tmp_path / "a[red]b[x]:cat:.png"
    shutil.copy(photos / "red" / "01.png", odd)
    monkeypatch.chdir(tmp_path)
    code, out, err = command("predict", finished, odd.name)
    assert code == 0, err
    assert odd.name in "".join(out.split())
    assert "%" in out


def test_predict_table_shows_long_names_in_full(
    finished: Path, photos: Path, tmp_path: Path, command: Command
):
    """A pipe is 80 columns wide: what does not fit goes on in the next line."""
    long = tmp_path / ("w" * 100 + ".png")
    shutil.copy(photos / "red" / "01.png", long)
    code, out, err = command("predict", finished, long)
    assert code == 0, err
    rows = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    assert "".join(rows) == str(long)


def test_file_names_may_hold_more_than_utf_8(
    finished: Path,
    photos: Path,
    flags: list[str],
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
):
    data = tmp_path / "photos"
    shutil.copytree(photos, data)
    odd = data / "red" / os.fsdecode(b"caf\xe9.jpg")
    try:
        (data / "red" / "00.jpg").rename(odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    monkeypatch.setattr("sys.stdin", listed(str(odd)))
    code, out, err = command("predict", finished, "-", "--json")
    assert code == 0, err
    assert [row["path"] for row in json.loads(out)] == [str(odd)]
    for words in ((), ("--csv",)):
        code, out, err = command("predict", finished, odd, *words)
        assert code == 0, err
        assert "caf\\udce9" in "".join(out.split())
    run = tmp_path / "run"
    code, _, err = command("train", data, *flags, "--steps", 1, "--out", run)
    assert code == 0, err
    assert command("evaluate", run, data)[0] == 0


def test_sigmoid_models_give_their_own_probabilities(tmp_path: Path, photos: Path):
    model = create_model("ViT-mu/8", 3, 16, probability="sigmoid", classes=("a", "b", "c"))
    with torch.no_grad():
        assert model.head is not None
        model.head.bias.copy_(torch.tensor([0.0, 2.0, 1.0]))
    found = patchword.predict(model, photos / "red" / "00.jpg", workers=0)[0]
    wanted = torch.tensor([2.0, 1.0, 0.0]).sigmoid().tolist()
    assert [label for label, _ in found.top] == ["b", "c", "a"]
    assert [p for _, p in found.top] == pytest.approx(wanted)
