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
    leaks, contradictions, again = _Cases(), _Cases(), _Cases()
    surplus = 0
    for group in groups_of_copies(scan):
        parts, labels = _spread(source, split, group)
        leaks.note(source, group, parts)
        contradictions.note(source, group, labels)
        places = len({(split[i], source.labels[i]) for i in group})
        if len(group) > places:
            surplus += len(group) - places
            same_file = len({scan.facts["file"][i].tobytes() for i in group}) == 1
            again.append(Item(_keys(source, group), "same file" if same_file else "same pixels"))
    advice = "measured accuracy is too high: --fix keeps the copy in test"
    yield from finding("leakage", "error", "the same image in several parts", leaks, advice)
    what, advice = "the same image under several labels", "choose one label and remove the others"
    yield from finding("contradiction", "error", what, contradictions, advice)
    advice = "set the surplus aside with --fix, before the data are divided"
    yield from finding("duplicate", "warning", "surplus copies", again, advice, surplus)


def near_copies(source: Source, scan: Scan, split: np.ndarray, bits: int) -> Iterator[Finding]:
    """Near duplicates among the first ones of all groups of copies."""
    again = {index for group in groups_of_copies(scan) for index in group[1:]}
    once = np.array([i for i in scan.good.tolist() if i not in again], np.int64)
    pairs, likeness = near_pairs(scan.facts["thumb"][once], bits)
    leaks, contradictions, rest = _Cases(), _Cases(), _Cases()
    for pair, alike in zip(once[pairs].tolist(), likeness.tolist(), strict=True):
        parts, labels = _spread(source, split, pair)
        leaks.note(source, pair, parts, f", alike {alike:.2f}")
        contradictions.note(source, pair, labels, f", alike {alike:.2f}")
        if len(parts) == len(labels) == 1:
            rest.append(Item(_keys(source, pair), f"alike {alike:.2f}"))
    what = "nearly the same image in several parts (pairs)"
    advice = "measured accuracy is too high: remove those of train"
    yield from finding("near-leakage", "error", what, leaks, advice)
    what = "nearly the same image under several labels (pairs)"
    advice = "look at them; correct the wrong labels"
    yield from finding("near-contradiction", "warning", what, contradictions, advice)
    advice = "keep the copies of one picture in one part"
    yield from finding("near-duplicate", "warning", "near duplicates (pairs)", rest, advice)


class _Cases(list[Item]):
    def note(
        self, source: Source, group: Iterable[int], names: Sequence[str], more: str = ""
    ) -> None:
        """A group of images that is in several places, if it is."""
        if len(names) > 1:
            self.append(Item(_keys(source, group), " and ".join(names) + more))


def _keys(source: Source, positions: Iterable[int]) -> tuple[str, ...]:
    return tuple(source.keys[i] for i in positions)


def _spread(source: Source, split: np.ndarray, group: Sequence[int]) -> tuple[list[str], list[str]]:
    """The parts and the labels that a group of images is in."""
    parts = dict.fromkeys(str(split[i]) for i in group)
    labels = dict.fromkeys(source.classes[source.labels[i]] for i in group)
    return list(parts), list(labels)
