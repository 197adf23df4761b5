"""Images of an unusual form: small, narrow, blank, stored in another way than the rest."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import numpy as np

from patchword.audit.findings import Finding, Item, finding
from patchword.audit.hashing import BLANK, contrast
from patchword.audit.scan import KINDS, Scan
from patchword.data.files import is_image
from patchword.data.images import SUFFIXES
from patchword.data.sources import Source

TINY = 32
"""Pixels of the short side, below which an image is called tiny."""
LONGEST = 4.0
"""Ratio of the sides, above which a centre crop misses most of an image."""

_CUT = "a centre crop shows little of them: cut them to what matters"
_RENAME = "read by content here; rename them for other programs"
_TURN = "turned upright here; other programs may not"


def forms(source: Source, scan: Scan) -> Iterator[Finding]:
    """What is unusual about single images: notes only."""
    good = scan.good
    height, width = (scan.facts[side][good] for side in ("height", "width"))
    short, long = np.minimum(height, width), np.maximum(height, width)
    size = [f"{w} x {h}" for h, w in zip(height.tolist(), width.tolist(), strict=True)]
    formats = scan.facts["format"][good].tolist()
    blank = contrast(scan.facts["thumb"][good]) < BLANK
    names = [source.keys[int(i)] for i in good]
    wrong = np.array([_misnamed(*pair) for pair in zip(names, formats, strict=True)], np.bool_)
    turned, animated = (scan.facts[name][good] for name in ("turned", "animated"))
    narrow = long > LONGEST * np.maximum(short, 1)
    yield from _channels(source, scan)
    for code, where, what, about, advice in (
        ("blank", blank, "images of almost one colour", size, "check that they are not broken"),
        ("tiny", short < TINY, f"short side below {TINY} pixels", size, "is that all there is?"),
        ("aspect", narrow, f"one side over {LONGEST:g} times the other", size, _CUT),
        ("suffix", wrong, "suffix of another format", formats, _RENAME),
        ("turned", turned, "turned by EXIF orientation", size, _TURN),
        ("animated", animated, "more than one frame", size, "only the first is read"),
    ):
        items = [Item((names[row],), about[row]) for row in np.flatnonzero(where)]
        yield from finding(code, "note", what, items, advice)


def _misnamed(name: str, kind: str) -> bool:
    """Whether a file of Pillow's format `kind` has the suffix of another one."""
    own = SUFFIXES.get("JPEG" if kind == "MPO" else kind)
    return own is not None and is_image(name) and os.path.splitext(name)[1].lower() not in own


def _channels(source: Source, scan: Scan) -> Iterator[Finding]:
    """Images that are stored in another way than most."""
    good = scan.good
    kinds = Counter(scan.facts["kind"][good].tolist()).most_common()
    usual = min(kind for kind, count in kinds if count == kinds[0][1]) if kinds else 0
    if len(kinds) < 2:
        return
    others = good[scan.facts["kind"][good] != usual]
    counts = ", ".join(f"{count:,} {KINDS[kind]}" for kind, count in kinds)
    yield Finding(
        "channels",
        "note",
        f"mixed channels: {counts}",
        len(others),
        tuple(Item((source.keys[int(i)],), KINDS[scan.facts["kind"][i]]) for i in others),
        "converted when read; colour may give the class away",
    )
