"""What a section is made of. The page shows every kind of block, the model card those of text.

What a block says comes first: where that is empty, the block is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from PIL.Image import Image


class Text(NamedTuple):
    """A paragraph; `strong` is the part of it that matters most."""

    text: str
    muted: bool = False
    strong: str = ""


class Items(NamedTuple):
    """A list of sentences."""

    items: Sequence[str]


class Code(NamedTuple):
    """What is to be typed."""

    text: str
    language: str = "sh"


class Pairs(NamedTuple):
    """Names and values; `defaults` are those of values that differ, `first` heads the names."""

    rows: Mapping[str, str]
    defaults: Mapping[str, str] = {}
    first: str = "Item"
    title: str = ""


class Table(NamedTuple):
    """Rows under named columns, each with its kind: "" and "name" are text, "number", "number
    extra" (left out where there is little room), and "meter": fractions, drawn too, or None."""

    rows: Sequence[Sequence[str | float | None]]
    columns: Mapping[str, str]
    title: str = ""
    scroll: str = ""
    """what it shows, for a table so long that it scrolls"""


class Picture(NamedTuple):
    """An image in PNG, drawn when it is shown; a chart takes the colours of the page."""

    png: Callable[[], bytes]
    hint: str
    kind: Literal["chart", "paper"] = "chart"


class Mistake(NamedTuple):
    """A wrongly classified image."""

    key: str
    """what the source calls it, such as its path"""
    label: str
    predicted: str
    probability: float
    """of the predicted class"""
    thumbnail: Image


class Group(NamedTuple):
    """Blocks side by side, where there is room."""

    parts: Sequence[Sequence[Block]]
    layout: Literal["plots", "beside", "groups", "mistakes"] = "plots"


Block = Text | Items | Code | Pairs | Table | Picture | Mistake | Group


class Section(NamedTuple):
    """A title and what stands below it."""

    anchor: str
    """of the section on the page; empty where it is in the card alone"""
    title: str
    blocks: Sequence[Block]
    card: bool = False


class Headline(NamedTuple):
    """The figure that a run is known by, how many notes must be read with it, and others."""

    figure: str
    claim: str
    aside: str
    notes: int
    tiles: Mapping[str, str]
