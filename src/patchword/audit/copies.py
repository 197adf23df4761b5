"""Images that are in the data more than once: the same pixels, or nearly the same picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from patchword.audit.findings import Finding, Item, finding
from patchword.audit.hashing import near_pairs
from patchword.audit.scan import Scan
from patchword.data.sources import Source

_KEEP = {part: rank for rank, part in enumerate(("test", "val", "train", ""))}


def split_names(source: Source) -> np.ndarray:
    """The part that each image belongs to, str `[N]`; "" where the data give none."""
    names = np.full(len(source), "", "U5")
    for part, positions in source.parts.items():
        names[positions] = part
    return names


def groups_of_copies(scan: Scan) -> list[list[int]]:
    """Positions of images with the same pixels, two or more each, rising."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index in scan.good.tolist():
        groups[scan.facts["pixels"][index].tobytes()].append(index)
    return [group for group in groups.values() if len(group) > 1]


def surplus_copies(source: Source, scan: Scan) -> list[tuple[int, int]]:
    """(position, position of the one to keep) of images that are in the data again under the same
    label. The one in test is kept, else in val, else in train; of several, the first by key."""
    split = split_names(source)
    found: list[tuple[int, int]] = []
    for group in groups_of_copies(scan):
        by_label: dict[int, list[int]] = defaultdict(list)
        for index in group:
            by_label[int(source.labels[index])].append(index)
        for same in by_label.values():
            first, *rest = sorted(same, key=lambda i: (_KEEP[str(split[i])], source.keys[i]))
            found += [(index, first) for index in rest]
    return sorted(found)


def copies(source: Source, scan: Scan, split: np.ndarray) -> Iterator[Finding]:
    """Images with the same pixels; `split` is what `split_names` gives."""
    leaks: list[Item] = []
    contradictions: list[Item] = []
    copies: list[Item] = []
    surplus = 0
    for group in groups_of_copies(scan):
        names = _keys(source, group)
        parts, labels = _spread(source, split, group)
        same_file = len({scan.facts["file"][i].tobytes() for i in group}) == 1
        if len(parts) > 1:
            leaks.append(Item(names, " and ".join(parts)))
        if len(labels) > 1:
            contradictions.append(Item(names, " and ".join(labels)))
        places = len({(split[i], source.labels[i]) for i in group})
        if len(group) > places:
            surplus += len(group) - places
            copies.append(Item(names, "same file" if same_file else "same pixels"))
    yield from finding(
        "leakage",
        "error",
        "the same image in several parts",
        leaks,
        "measured accuracy is too high: --fix keeps the copy in test",
    )
    yield from finding(
        "contradiction",
        "error",
        "the same image under several labels",
        contradictions,
        "choose one label and remove the others",
    )
    advice = "set the surplus aside with --fix, before the data are divided"
    yield from finding("duplicate", "warning", "surplus copies", copies, advice, surplus)


def near_copies(source: Source, scan: Scan, split: np.ndarray, bits: int) -> Iterator[Finding]:
    """Near duplicates among the first ones of all groups of copies."""
    again = {index for group in groups_of_copies(scan) for index in group[1:]}
    once = np.array([i for i in scan.good.tolist() if i not in again], np.int64)
    pairs, likeness = near_pairs(scan.facts["thumb"][once], bits)
    leaks: list[Item] = []
    contradictions: list[Item] = []
    rest: list[Item] = []
    for pair, likeness_of_pair in zip(once[pairs].tolist(), likeness.tolist(), strict=True):
        names = _keys(source, pair)
        parts, labels = _spread(source, split, pair)
        alike = f"alike {likeness_of_pair:.2f}"
        if len(parts) > 1:
            leaks.append(Item(names, f"{' and '.join(parts)}, {alike}"))
        if len(labels) > 1:
            contradictions.append(Item(names, f"{' and '.join(labels)}, {alike}"))
        if len(parts) == len(labels) == 1:
            rest.append(Item(names, alike))
    yield from finding(
        "near-leakage",
        "error",
        "nearly the same image in several parts (pairs)",
        leaks,
        "measured accuracy is too high: remove those of train",
    )
    yield from finding(
        "near-contradiction",
        "warning",
        "nearly the same image under several labels (pairs)",
        contradictions,
        "look at them; correct the wrong labels",
    )
    advice = "keep the copies of one picture in one part"
    yield from finding("near-duplicate", "warning", "near duplicates (pairs)", rest, advice)


def _keys(source: Source, positions: Iterable[int]) -> tuple[str, ...]:
    return tuple(source.keys[i] for i in positions)


def _spread(source: Source, split: np.ndarray, group: Sequence[int]) -> tuple[list[str], list[str]]:
    """The parts and the labels that a group of images is in."""
    parts = dict.fromkeys(str(split[i]) for i in group)
    labels = dict.fromkeys(source.classes[source.labels[i]] for i in group)
    return list(parts), list(labels)
