"""Settings shared by all tests, and what they make on the spot: pictures, data sets, a run."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests are small: two threads wait for each other

import hypothesis
import numpy as np
import pytest
from PIL import Image

from patchword.data.sources import ArrayReader, Source

COLOURS = {"blue": (30, 60, 220), "green": (40, 200, 60), "red": (220, 40, 40)}
FLAGS = """--model ViT-mu/8 --image-size 16 --batch-size 8 --steps 30 --lr 3e-3 --workers 0
--recipe photos --width 32 --randaugment-layers 0 --mixup 0 --device cpu --log-every 5"""


_cache = tempfile.TemporaryDirectory(prefix="patchword-features-")
os.environ["PATCHWORD_CACHE"] = _cache.name

# No deadline: the machine is shared, and a first call pays for torch's own start.
hypothesis.settings.register_profile("patchword", deadline=None, print_blob=True)
hypothesis.settings.load_profile("patchword")


EFFORTS = ("short", "faults", "soak")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--effort",
        choices=EFFORTS,
        default=EFFORTS[0],
        help="counts of the tests that grow with effort; above short, these tests alone",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`short` is every test but the `long` ones; any more is the `long` and `grows` ones alone."""
    short = config.getoption("--effort") == EFFORTS[0]
    kept, left = [], []
    for item in items:
        long, grows = (item.get_closest_marker(name) for name in ("long", "grows"))
        (kept if (not long if short else long or grows) else left).append(item)
    items[:] = kept
    if left:
        config.hook.pytest_deselected(items=left)


@pytest.fixture(scope="session")
def effort(pytestconfig: pytest.Config) -> Callable[[int, int, int], int]:
    """`effort(short, faults, soak)`: the count of those three that was asked for."""
    return lambda *counts: counts[EFFORTS.index(pytestconfig.getoption("--effort"))]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same weights and images, in whatever order the tests run."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Features are kept with the tests' own files."""
    os.environ["PATCHWORD_CACHE"] = str(tmp_path_factory.mktemp("cache"))


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
    from patchword.cli import main as cli  # tyro may be missing where a GPU is lent

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
    from patchword.cli import main as cli

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


# Pictures and sources ---------------------------------------------------------------------------


def _photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth random RGB picture, as photographs are: JPEG keeps it nearly unchanged."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 7, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def _encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def photo() -> Callable[..., Image.Image]:
    return _photo


@pytest.fixture
def encode() -> Callable[..., bytes]:
    return _encode


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """`folder({"cat": 3, "dog": 2})` or `{"train/cat": 3}`: that many PNG files in each folder."""

    def make(counts: dict[str, int], size: tuple[int, int] = (12, 16)) -> Path:
        root = tmp_path / "pets"
        for k, (name, count) in enumerate(counts.items()):
            (root / name).mkdir(parents=True)
            for i in range(count):
                (root / name / f"{i:03}.png").write_bytes(_encode(_photo(*size, 100 * k + i)))
        return root

    return make


@pytest.fixture
def labelled() -> Callable[..., Source]:
    """A source with the given labels and 2 x 2 images, for what looks at labels alone."""

    def make(labels: list[int], parts: dict[str, list[int]] | None = None) -> Source:
        count = len(labels)
        return Source(
            name="made",
            classes=tuple(f"c{k:03}" for k in range(max(labels) + 1)),
            labels=np.array(labels, np.int64),
            keys=tuple(f"image{i}" for i in range(count)),
            sizes=np.full(count, 12, np.int64),
            reader=ArrayReader(np.zeros((count, 2, 2, 3), np.uint8), "made"),
            parts={part: np.array(at, np.int64) for part, at in (parts or {}).items()},
        )

    return make
