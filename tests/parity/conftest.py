"""Writes the table of differences at the end of a session that asks for it."""

import os
from pathlib import Path

from parity_record import write_table


def pytest_sessionfinish():
    if "PARITY_TABLE" in os.environ:
        write_table(Path(os.environ["PARITY_TABLE"]))
