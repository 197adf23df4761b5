"""Tokens as colours, and the map of features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from patchword.inspection.figures.drawing import BLUE, INK
from patchword.inspection.figures.features import (
    COLOURS,
    MOST_CLASSES,
    REST,
    Thumbnail,
    draw_feature_map,
    draw_tokens,
)

Pixels = Callable[[bytes | Figure], np.ndarray]
ShareOf = Callable[..., float]


def points(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 2))


def thumbnail(caption: str, right: bool = True) -> Thumbnail:
    return Thumbnail(np.full((8, 8, 1), 120, np.uint8), caption, right)


@pytest.mark.parametrize("grid", [(1, 1), (2, 7), (5, 3)])
def test_tokens_are_shown_in_their_colours(
    grid: tuple[int, int], pixels: Pixels, share_of: ShareOf
) -> None:
    colours = np.zeros((*grid, 3))
    colours[..., 0] = 1
    figure = draw_tokens(np.zeros((40, 40, 1), np.uint8), colours)
    assert share_of(pixels(figure), "#FF0000", 2) > 0.2


@pytest.mark.parametrize("classes", [1, 7, MOST_CLASSES, MOST_CLASSES + 30])
def test_any_number_of_classes(classes: int, pixels: Pixels, share_of: ShareOf) -> None:
    labels = np.repeat(np.arange(classes), 4)
    names = [f"class {k}" for k in range(classes)]
    figure = draw_feature_map(points(len(labels)), labels, names)
    (axes,) = figure.axes
    drawn = {to_hex(tuple(np.asarray(c.get_facecolor())[0, :3])) for c in axes.collections}
    assert len(drawn) == min(classes, len(COLOURS)) + (classes > MOST_CLASSES)
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(said) == min(classes, MOST_CLASSES) + (classes > MOST_CLASSES)
    assert ("30 other classes" in said) == (classes > MOST_CLASSES)
    image = pixels(figure)
    assert share_of(image, BLUE, 40) > 0.0002
    assert (REST.lower() in drawn) == (classes > MOST_CLASSES)


def test_the_most_frequent_classes_are_coloured() -> None:
    labels = np.concatenate([np.arange(60), np.repeat(59, 5)])
    figure = draw_feature_map(points(65), labels, [f"c{k}" for k in range(60)])
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "c59" in said
    assert "c58" not in said


def test_mistakes_are_ringed_and_those_shown_are_numbered(pixels: Pixels) -> None:
    places = points(20)
    rows = [[thumbnail("a,\nsaid b", False), thumbnail("b", False)], [thumbnail("c", False)]]
    figure = draw_feature_map(
        places, np.arange(20) % 3, ["a", "b", "c"], mistakes=[4, 9, 2], rows=rows
    )
    axes = figure.axes[-1]
    rings = [c for c in axes.collections if not len(c.get_facecolor())]
    shown = [np.asarray(ring.get_offsets()).tolist() for ring in rings]
    assert shown == [[places[2].tolist()], [places[4].tolist(), places[9].tolist()]]
    texts: list[Any] = list(axes.texts)
    numbered = {text.get_text(): text.xy for text in texts}
    assert numbered == {"1": tuple(places[4]), "2": tuple(places[9])}
    captions = [ax.get_xlabel() for ax in figure.axes if ax.get_xlabel()]
    assert captions == ["a,\nsaid b", "b", "c"]
    pixels(figure)


def test_a_neighbour_of_the_right_class_is_told_apart() -> None:
    rows = [[thumbnail("a", False), thumbnail("a"), thumbnail("b", False)]]
    figure = draw_feature_map(points(3), [0, 0, 1], ["a", "b"], mistakes=[0], rows=rows)
    colours = [ax.xaxis.label.get_color() for ax in figure.axes if ax.get_xlabel()]
    assert colours[1] == INK
    assert colours[0] == colours[2] != INK


def test_awkward_class_names(pixels: Pixels) -> None:
    names = ["$\\frac{", "_hidden", "日本語", "", "two\nlines", "\udc80"]
    rows = [[thumbnail(name) for name in names]]
    figure = draw_feature_map(points(6), np.arange(6), names, mistakes=[0], rows=rows)
    assert len(figure.legends) + sum(len(f.legends) for f in figure.subfigs) == 1
    pixels(figure)
