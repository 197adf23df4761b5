"""Class names that may mean one class."""

import pytest

from patchword.audit.labels import likely_typos, same_spelling


@pytest.mark.parametrize(
    "names",
    [
        ("Cat", "cat"),
        ("cat", "cat "),
        ("red fox", "red_fox", "red-fox"),
        ("cafe\u0301", "caf\u00e9"),
        ("STRASSE", "straße"),
        ("ﬁnch", "finch"),
    ],
)
def test_spellings_of_one_name(names: tuple[str, ...]):
    assert same_spelling([*names, "dog"]) == [tuple(sorted(names))]
    assert likely_typos([*names, "dog"]) == []


@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        ("cat", "cats", "singular and plural"),
        ("box", "boxes", "singular and plural"),
        ("Berry", "berries", "singular and plural"),
        ("daffodil", "dafodil", "one letter differs"),
        ("tulip", "tuilp", "one letter differs"),
        ("tulip", "tulib", "one letter differs"),
        ("sunflower", "sunflowre", "one letter differs"),
        ("dandelion", "dendelian", "2 letters differ"),
        ("class 1 roses", "class_1_rosse", "one letter differs"),
    ],
)
def test_typos(a: str, b: str, why: str):
    assert likely_typos([a, "elephant", b]) == [(*sorted((a, b)), why)]
    assert same_spelling([a, b]) == []


@pytest.mark.parametrize(
    "names",
    [
        "0123456789",
        ["n01440764", "n01443537", "n01440765"],
        ["class_1", "class_2", "class_11"],
        ["cat", "car", "bat", "dog", "deer", "bird", "frog", "lion", "loon", "moth"],
        ["tulips", "lilies"],
        ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    ],
)
def test_other_names_are_other_classes(names: list[str]):
    assert same_spelling(names) == []
    assert likely_typos(names) == []
