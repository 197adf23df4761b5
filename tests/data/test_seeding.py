"""Seeds by what random numbers are for."""

from patchword.data.seeding import derived_seed


def test_each_seed_purpose_and_number_has_its_own():
    asked = [(0, "order"), (0, "augment"), (1, "order"), (0, "order", 0), (0, "order", 1)]
    asked += [(0, "order", 1, 23), (0, "order", 12, 3), (0, "order", 1, 2, 3), (0, "order1")]
    found = {derived_seed(*one) for one in asked}
    assert len(found) == len(asked)
    assert all(0 <= seed < 1 << 63 for seed in found)


def test_seeds_stay_what_they_are():
    """Else runs that were stopped would go on with other images."""
    assert derived_seed(0, "order", 0) == 7955589716765508323
