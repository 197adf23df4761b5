"""Pictures of predictions: three rows, a column for each image, pixels as they are."""

from __future__ import annotations

import numpy as np
import pytest

from patchword.inspection.figures.drawing import encode
from patchword.inspection.figures.reconstruction import ROWS, draw_predictions


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 8])
def test_every_image_is_shown_in_every_row(channels: int, count: int):
    rng = np.random.default_rng(0)
    rows = [rng.random((count, 8, 12, channels)) for _ in ROWS]
    figure = draw_predictions(*rows)
    assert len(figure.axes) == 3 * count
    for number, axes in enumerate(figure.axes):
        (shown,) = axes.images
        wanted = rows[number // count][number % count]
        found = np.asarray(shown.get_array(), dtype=np.float64) / 255
        assert np.abs(found - wanted).max() < 0.01
    assert [axes.get_ylabel() for axes in figure.axes[::count]] == list(ROWS)
    assert encode(figure).startswith(b"\x89PNG")
