"""A small data set with classes that differ visibly, and a finished run on it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from patchword import cli

COLOURS = {"blue": (30, 60, 220), "green": (40, 200, 60), "red": (220, 40, 40)}
FLAGS = """--model ViT-mu/8 --image-size 16 --batch-size 8 --steps 30 --lr 3e-3 --workers 0
--recipe photos --width 32 --randaugment-layers 0 --mixup 0 --device cpu --log-every 5"""


def _paint(path: Path, colour: tuple[int, int, int], seed: int) -> None:
    """A noisy picture of one colour, as PNG or JPEG by its name."""
    rng = np.random.default_rng(seed)
    pixels = np.array(colour) + rng.normal(0, 25, (24 + seed % 5, 20, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def _make_photos(root: Path, count: int = 12, classes: Any = COLOURS, first: int = 0) -> Path:
    for k, name in enumerate(classes):
        for i in range(count):
            suffix = "png" if i % 2 else "jpg"
            _paint(root / name / f"{i:02}.{suffix}", COLOURS[Path(name).name], first + 97 * k + i)
    return root


@pytest.fixture(scope="session")
def make_photos() -> Callable[..., Path]:
    """`make_photos(root, count, classes)`: that many pictures of each class under `root`."""
    return _make_photos


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in this process: exit code, standard output, standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def as_json(command: Callable[..., tuple[int, str, str]]) -> Callable[..., Any]:
    """The JSON that a command prints."""

    def run(*words: object) -> Any:
        code, out, err = command(*words, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 12 pictures, and one file that is none."""
    root = _make_photos(tmp_path_factory.mktemp("data") / "photos")
    (root / "red" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 this is no picture")
    return root


@pytest.fixture(scope="session")
def flags() -> list[str]:
    """A run of seconds that learns the colours."""
    return [*FLAGS.split()]


@pytest.fixture(scope="session")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run on `photos`."""
    run = tmp_path_factory.mktemp("runs") / "first"
    assert (
        cli.main(["train", str(photos), *FLAGS.split(), "--out", str(run), "--average", "0.9"]) == 0
    )
    return run


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """An empty working directory."""
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)
