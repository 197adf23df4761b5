"""Which weights are the best."""

from __future__ import annotations

import math

import pytest

from patchword.training.criterion import LINEAR, LOSS, TOP1


def test_as_good_is_no_worse():
    """Equal figures too: without an error to allow for, the best itself must be kept."""
    for criterion, better, worse in ((TOP1, 0.9, 0.8), (LINEAR, 0.9, 0.8), (LOSS, 0.8, 0.9)):
        assert criterion.holds(better, worse)
        assert criterion.holds(worse, worse)
        assert not criterion.holds(worse, better)
        assert criterion.top([worse, math.nan, better]) == better
    assert (TOP1.top([math.nan]), LOSS.top([])) == (-math.inf, math.inf)


def test_a_share_of_images_has_a_standard_error():
    """By Laplace's estimate of the share: 91 of 102 for 90 of 100."""
    share = 91 / 102
    wanted = 0.9 - math.sqrt(share * (1 - share) / 100)
    assert TOP1.bar(0.9, {"n": 100}) == pytest.approx(wanted)
    assert 0.98 < TOP1.bar(1.0, {"n": 100}) < 1  # there is one at 100 % too
    assert LINEAR.bar(0.9, {"n": 100}) == 0.9
    assert LOSS.bar(0.9, {"n": 100}) == 0.9
