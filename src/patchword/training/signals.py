"""SIGTERM and SIGINT, noted instead of obeyed at once."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from patchword.spec.parse import Interrupted

logger = logging.getLogger("patchword")


@contextmanager
def watch_signals(received: list[int]) -> Iterator[None]:
    """Note SIGTERM or SIGINT in `received` instead of dying of it; outside the main thread, where
    Python allows no handlers, do nothing.

    A second signal stops at once, unless it comes within a second of the first: timeout(1) and
    others send to a process and then to its group.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    patience = 0.0

    def note(signum: int, _: FrameType | None) -> None:
        nonlocal patience
        if not received:
            patience = time.monotonic() + 1
            received.append(signum)
            with suppress(RuntimeError):  # the signal came while the log was being written
                name = signal.Signals(signum).name
                logger.warning("%s: finishing this step, then saving", name)
        elif time.monotonic() > patience:
            raise Interrupted(f"stopped at once by {signal.Signals(signum).name}", signum)

    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
