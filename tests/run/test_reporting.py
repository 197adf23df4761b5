"""What the report of a run shows of the model's inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchword import create_model
from patchword.data.registry import open_source
from patchword.run.reporting import LOOKED_AT, inside

MakePhotos = Callable[..., Path]
FILTERS, POSITIONS = "Patch embedding filters", "Position embedding similarity"
DISTANCE = "Mean attention distance"
ROLLOUTS = ["Attention rollout, image 1", "Attention rollout, image 2"]


@pytest.mark.parametrize(
    ("name", "options", "titles"),
    [
        ("ViT-mu/8", {}, [FILTERS, POSITIONS, DISTANCE, *ROLLOUTS]),
        ("ViT-mu/8", {"position": "none", "pool": "gap"}, [FILTERS, DISTANCE, *ROLLOUTS]),
        ("Mixer-S/16", {"depth": 1}, [FILTERS]),
        ("BiT-R50x1", {"layers": (1, 1, 1, 1)}, []),
    ],
)
def test_figures_of_every_family(
    make_photos: MakePhotos, tmp_path: Path, name: str, options: dict[str, Any], titles: list[str]
):
    source = open_source(str(make_photos(tmp_path, 4)))
    drawn = inside(create_model(name, 3, 16, **options), source, np.arange(12))
    assert list(drawn) == titles
    assert all(png.startswith(b"\x89PNG") for png in drawn.values())


def test_few_images_are_read_and_bad_ones_left_out(make_photos: MakePhotos, tmp_path: Path):
    root = make_photos(tmp_path, 40)
    source = open_source(str(root))
    read: list[int] = []

    class Counting:
        def read(self, index: int) -> Any:
            read.append(index)
            return b"damaged" if index == 0 else source.reader.read(index)

        location = source.reader.location

    watched = type(source)(**{**vars(source), "reader": Counting()})
    drawn = inside(create_model("ViT-mu/8", 3, 16), watched, np.arange(120))
    assert DISTANCE in drawn
    assert len(read) == LOOKED_AT
    assert read[0] == 0
    assert inside(create_model("ViT-mu/8", 3, 16), watched, np.array([0])).keys() == {FILTERS}


def test_the_report_of_a_run_shows_them(finished: Path):
    text = (finished / "report.html").read_text(encoding="utf-8")
    for title in (FILTERS, POSITIONS, DISTANCE, *ROLLOUTS):
        assert f'alt="{title}"' in text
