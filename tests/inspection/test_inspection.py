"""The names of `patchword.inspection`, and what importing them loads."""

from __future__ import annotations

import subprocess
import sys

import pytest

from patchword import inspection


def test_names_resolve() -> None:
    assert len(set(inspection.__all__)) == len(inspection.__all__) >= 7
    assert all(callable(getattr(inspection, name)) for name in inspection.__all__)
    assert set(inspection.__all__) <= set(dir(inspection))
    missing = "attention_distances"
    with pytest.raises(AttributeError, match=f"no attribute '{missing}'"):
        getattr(inspection, missing)


def test_arrays_need_nothing_that_draws() -> None:
    code = (
        "import sys; from patchword.inspection import *; "
        "print(sorted({'torch', 'matplotlib', 'sklearn', 'PIL'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.strip() == "['torch']", answer.stderr
