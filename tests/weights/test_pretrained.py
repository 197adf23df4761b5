"""The table of well-known weights, and its names where a path is taken."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from patchword import Model, PatchwordError, UsageError, load_model, save_model
from patchword.models.zoo import model_spec, variant_name
from patchword.weights.pretrained import PRETRAINED, SUGGESTED, find_pretrained, suggested


@pytest.mark.parametrize("name", PRETRAINED)
def test_rows_are_sound(name: str):
    row = find_pretrained(name)
    assert row.name == name
    assert re.fullmatch(r"[a-z0-9-]+", name)
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", row.hub)
    assert variant_name(model_spec(row.model, image_size=row.image_size)) == row.model
    assert row.top1 is None or 50 < row.top1 < 100
    assert re.match(r"arXiv \d{4}\.\d{5}", row.source)


def test_every_family_and_origin_is_there():
    models = " ".join(row.model for row in PRETRAINED.values())
    assert all(kind in models for kind in ("ViT-S/", "R50+ViT", "BiT-", "Mixer-"))
    names = " ".join(PRETRAINED)
    origins = ("augreg", "vit-base-21k", "deit-", "deit3", "dinov2", "registers", "mae", "siglip")
    assert all(origin in names for origin in origins)
    assert len({row.hub for row in PRETRAINED.values()}) == len(PRETRAINED)


def test_suggestions():
    """Of the same variant and with a head, if there are any."""
    assert suggested("ViT-S/16").name == SUGGESTED
    assert suggested("ViT-Ti/16").name == "vit-tiny-augreg"
    assert suggested("BiT-R50x1").name == "bit-r50x1"
    assert suggested("ViT-S/14").name == SUGGESTED
    assert suggested("no such model").name == SUGGESTED


def test_unknown_names_are_told_the_nearest():
    with pytest.raises(UsageError, match=r"'dinov2-bse'; did you mean dinov2-base"):
        find_pretrained("dinov2-bse")
    with pytest.raises(PatchwordError, match="nor pretrained weights; did you mean vit-base") as e:
        load_model("vit-bse")
    assert "\n" not in str(e.value)
    for path in ("folder/vit-bse", "vit-bse.npz"):  # not a name
        with pytest.raises(PatchwordError, match=f"no such file or run directory: {path}$"):
            load_model(path)


def test_a_file_of_that_name_comes_first(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scattered: Callable[..., Model],
    same: Callable[[Model, Model], bool],
):
    monkeypatch.chdir(tmp_path)
    model = scattered()
    save_model(model, "vit-base/model.safetensors")
    assert same(load_model("vit-base"), model)
