"""Runs of these tests write a report only where one is asked for."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def reported() -> None:
    """Asks for the reports of runs."""


@pytest.fixture(autouse=True)
def no_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report takes longer than these runs: only where one is asked for, and in `finished`."""
    if "reported" not in request.fixturenames:
        monkeypatch.setattr("patchword.run.finish.report_run", lambda *_: None)
        monkeypatch.setattr("patchword.run.pretraining.report", lambda *_: None)
