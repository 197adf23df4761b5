"""Names of classes that a user gives for a model without any, and those of ImageNet-1k.

Standard library only. `imagenet.tsv` lists the thousand classes in their order, which is that of
their WordNet ids: Google's, torchvision's and timm's files all have it, and name none of them.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from patchword.spec.parse import UsageError

IMAGENET = "imagenet"
"""The word for the thousand names of ImageNet-1k."""

ClassNames = str | Path | Sequence[str]
"""`IMAGENET`, a file of names, or the names themselves."""


@dataclass(frozen=True)
class Synset:
    """A class of ImageNet-1k."""

    id: str
    """of WordNet 3.0, such as n01440764"""
    name: str
    """in English, unlike any other's; with the id where another class is called the same"""
    synonyms: str
    """WordNet's names, with commas between them"""


@cache
def plain_name(name: str) -> str:
    """`name` as all its spellings have it: case, white space, `_`, `-` and Unicode form aside."""
    text = unicodedata.normalize("NFKC", name).casefold()
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", text)).strip()


def imagenet() -> tuple[Synset, ...]:
    """The classes of ImageNet-1k, in their order."""
    text = resources.files("patchword.data").joinpath("imagenet.tsv").read_text(encoding="utf-8")
    return tuple(
        Synset(*line.split("\t")) for line in text.splitlines() if not line.startswith("#")
    )


def synsets_named(name: str) -> tuple[str, ...]:
    """The ids of the classes of ImageNet-1k that a name may mean: an id, the English name, or
    WordNet's first name or all of them; case, `_` and `-` do not matter. Several where classes
    share it: a crane is a bird and a machine."""
    return _named().get(plain_name(name), ())


@cache
def _named() -> dict[str, tuple[str, ...]]:
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for row in imagenet():
        shared = row.name.removesuffix(f" ({row.id})")
        for name in (row.id, row.name, shared, row.synonyms, row.synonyms.partition(",")[0]):
            found[plain_name(name)][row.id] = None
    return {name: tuple(ids) for name, ids in found.items()}


def read_class_names(given: ClassNames) -> tuple[str, ...]:
    """The names of a model's classes, in its order: `imagenet`, a JSON file of a list of names (a
    run's `classes.json`) or of an object from index to name, or a text file of a name a line.

    Raises `UsageError` if the file cannot be read or holds something else.
    """
    if given == IMAGENET:
        return tuple(row.name for row in imagenet())
    if not isinstance(given, str | Path):
        return tuple(given)
    path = Path(given)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the class names {str(path)!r} cannot be read: {error}; give a file, or imagenet"
        ) from None
    names = _from_json(text, path) if path.suffix == ".json" else _from_lines(text, path)
    if not names:
        raise UsageError(f"{path} holds no names; give one for each class of the model")
    return names


def _from_json(text: str, path: Path) -> tuple[str, ...]:
    try:
        values: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON: {error}; give a list of names") from None
    if isinstance(values, dict):
        places = [str(index) for index in range(len(values))]
        if set(values) != set(places):
            raise UsageError(
                f"{path}: its {len(values)} keys are not 0 to {len(values) - 1}, the numbers of "
                "the classes; number all of them"
            )
        values = [values[place] for place in places]
    if not isinstance(values, list) or not all(isinstance(name, str) for name in values):
        raise UsageError(f"{path} holds no JSON list of names, or object from index to name")
    return tuple(values)


def _from_lines(text: str, path: Path) -> tuple[str, ...]:
    names = [line.strip() for line in text.rstrip().splitlines()]
    if "" in names:
        raise UsageError(f"{path}: line {names.index('') + 1} is empty; write a class a line")
    return tuple(names)
