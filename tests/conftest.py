"""Settings shared by all tests."""

import os
import tempfile

import hypothesis
import pytest

os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests are small: two threads wait for each other

_cache = tempfile.TemporaryDirectory(prefix="patchword-features-")
os.environ["PATCHWORD_CACHE"] = _cache.name

# No deadline: the machine is shared, and a first call pays for torch's own start.
hypothesis.settings.register_profile("patchword", deadline=None, print_blob=True)
hypothesis.settings.load_profile("patchword")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same weights and images, in whatever order the tests run."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Features are kept with the tests' own files."""
    os.environ["PATCHWORD_CACHE"] = str(tmp_path_factory.mktemp("cache"))
