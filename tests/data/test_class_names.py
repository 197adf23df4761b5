"""Names of classes that a user gives, and those of ImageNet-1k."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from patchword.data.class_names import imagenet, read_class_names, synsets_named
from patchword.spec.parse import PatchwordError, UsageError


def test_imagenet_has_its_thousand_classes_in_the_order_of_their_ids() -> None:
    rows = imagenet()
    assert len(rows) == 1000
    assert [row.id for row in rows] == sorted({row.id for row in rows})
    assert len({row.name for row in rows}) == 1000
    for index, wordnet, name in (
        (0, "n01440764", "tench"),
        (207, "n02099601", "golden retriever"),
        (999, "n15075141", "toilet tissue"),
    ):
        assert (rows[index].id, rows[index].name) == (wordnet, name)
    assert read_class_names("imagenet") == tuple(row.name for row in rows)


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("n01440764", ("n01440764",)),
        ("tench", ("n01440764",)),
        ("tench, Tinca tinca", ("n01440764",)),
        ("Great_White-shark", ("n01484850",)),
        ("crane bird", ("n02012849",)),
        ("crane (n03126707)", ("n03126707",)),
        ("crane", ("n02012849", "n03126707")),
        ("Cardigan", ("n02113186", "n02963159")),
        ("maillot", ("n03710637", "n03710721")),
        ("maillot, tank suit", ("n03710721",)),
        ("rot", ()),
    ],
)
def test_a_class_of_imagenet_has_an_id_and_english_names(name: str, ids: tuple[str, ...]) -> None:
    assert synsets_named(name) == ids


def test_each_name_that_a_model_gets_means_one_class() -> None:
    for row in imagenet():
        assert synsets_named(row.name) == synsets_named(row.id) == (row.id,)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.json", json.dumps(["cat", "dog"])),
        ("classes.json", json.dumps({"1": "dog", "0": "cat"})),
        ("classes.txt", "cat\ndog\n"),
        ("classes", "\ufeffcat\r\ndog"),
    ],
)
def test_files_of_names(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert read_class_names(tmp_path / name) == ("cat", "dog")
    assert read_class_names(str(tmp_path / name)) == ("cat", "dog")


def test_names_themselves() -> None:
    assert read_class_names(["cat", "dog"]) == ("cat", "dog")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "cannot be read: .*or imagenet"),
        ("c.json", b"[1, 2]", "no JSON list of names"),
        ("c.json", b'{"0": "cat", "2": "dog"}', "its 2 keys are not 0 to 1"),
        ("c.json", b'{"0": "cat", "1": 2}', "no JSON list of names"),
        ("c.json", b"[", "no JSON"),
        ("c.json", b"[" * 100_000, "no JSON"),
        ("c.txt", b"cat\n\ndog\n", "line 2 is empty"),
        ("c.txt", b"\xff\xfe\x00", "cannot be read"),
        ("c.txt", b"", "holds no names"),
    ],
)
def test_what_names_nothing_is_refused(
    tmp_path: Path, name: str, content: Any, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PatchwordError, match=message) as caught:
        read_class_names(tmp_path / name if content is not None else "imagenette")
    assert isinstance(caught.value, UsageError)
