"""Which images of a source are looked at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from patchword.data.sources import Source
from patchword.data.splits import FILE, divide, save_division
from patchword.session.parts import known_parts


def test_what_a_run_held_out_of_the_train_part_of_the_data_is_not_trained_on(
    labelled: Callable[..., Source], tmp_path: Path
):
    parts = {"train": [*range(16)], "test": [*range(16, 20)]}
    source = labelled([0, 1] * 10, parts)
    division = divide(source, val=0.25, test=0.1, seed=0)
    save_division(tmp_path / FILE, source, division)
    found = known_parts(source, tmp_path)
    assert sorted(found) == ["test", "train", "val"]
    at = {name: indices.tolist() for name, (indices, _) in found.items()}
    assert len(at["val"]) == 4
    assert sorted(at["train"] + at["val"]) == parts["train"]
    assert at["test"] == parts["test"]
    assert {name: why for name, (_, why) in found.items()} == {
        "train": f"trained on by {tmp_path.name}",
        "val": f"held out by {tmp_path.name}",
        "test": "given by the data",
    }
