"""Class names that may mean one class: spelled differently, in the plural, or mistyped."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations

from patchword.data.class_names import plain_name

ONE_TYPO, TWO_TYPOS = 5, 9
"""Letters that a name must have for one or two mistakes in it to be likelier than another word."""


def same_spelling(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Groups of names that differ in case, white space, `_` or `-`, or Unicode form only."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(set(names)):
        groups[plain_name(name)].append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def likely_typos(names: Iterable[str]) -> list[tuple[str, str, str]]:
    """(name, other name, why) of names that differ in a plural, or in one or two letters.

    Names with different digits are different, as `n01440764` and `n01443537` or `class 1` and
    `class 2`.
    """
    plain: dict[str, str] = {}
    for name in sorted(set(names)):
        plain.setdefault(plain_name(name), name)
    found: dict[tuple[str, str], str] = {}
    for word, name in plain.items():
        for plural in _plurals(word):
            if plural in plain and plural != word:
                found[_pair(name, plain[plural])] = "singular and plural"
    shortened: dict[str, set[str]] = defaultdict(set)
    for word in plain:
        for rest in _shortened(word):
            shortened[rest].add(word)
    pairs = {pair for words in shortened.values() for pair in combinations(sorted(words), 2)}
    for a, b in pairs:
        allowed = min(_typos(a), _typos(b))
        if _digits(a) == _digits(b) and 0 < (count := _distance(a, b)) <= allowed:
            letters = "one letter differs" if count == 1 else f"{count} letters differ"
            found.setdefault(_pair(plain[a], plain[b]), letters)
    return [(a, b, why) for (a, b), why in sorted(found.items())]


def _pair(a: str, b: str) -> tuple[str, str]:
    return (a, b) if a < b else (b, a)


def _digits(word: str) -> str:
    return re.sub(r"\D", "", word)


def _plurals(word: str) -> list[str]:
    if len(word) < 3:
        return []
    irregular = [word[:-1] + "ies"] if word.endswith("y") else []
    return [word + "s", word + "es", *irregular]


def _typos(word: str) -> int:
    """Mistakes that `word` may have and still be recognised."""
    letters = sum(letter.isalpha() for letter in word)
    return (letters >= ONE_TYPO) + (letters >= TWO_TYPOS)


def _shortened(word: str) -> set[str]:
    """`word` and what is left of it without up to `_typos` letters: names with the same digits,
    within that many mistakes of each other, share one of these."""
    found = {word}
    for _ in range(_typos(word)):
        found |= {w[:i] + w[i + 1 :] for w in found for i in range(len(w)) if not w[i].isdigit()}
    return found


def _distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Letters to insert, delete, replace or swap with the next (optimal string alignment)."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                row[j] = min(row[j], before[j - 2] + 1)
        before = above
    return row[-1]
