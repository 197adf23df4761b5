"""Settings shared by all tests."""

import os

import hypothesis
import pytest

os.environ["MPLBACKEND"] = "Agg"

# No deadline: the machine is shared, and a first call pays for torch's own start.
hypothesis.settings.register_profile("patchword", deadline=None, print_blob=True)
hypothesis.settings.load_profile("patchword")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same weights and images, in whatever order the tests run."""
    import torch

    torch.manual_seed(0)
