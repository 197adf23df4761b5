"""How fast a run goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from patchword.spec.batch import Batch
from patchword.training.trainer import Progress


class Clock:
    """Times the steps of a run, evaluations and checkpoints left out."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._mark = time.monotonic()
        self._pace = 0.0
        self.restart_window()

    def restart_window(self) -> None:
        """Begin the means that the next log line reports."""
        self._seconds = self._waited = 0.0
        self._images = 0

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, the time spent waiting for each noted."""
        while True:
            started = time.monotonic()
            batch = next(batches, None)
            self._waited += time.monotonic() - started
            if batch is None:
                return
            yield batch

    def count(self, images: int) -> None:
        """A step is done."""
        now = time.monotonic()
        taken, self._mark = now - self._mark, now
        self._progress.seconds += taken
        self._seconds += taken
        self._images += images
        self._pace = 0.9 * self._pace + 0.1 * taken if self._pace else taken

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count."""
        yield
        self._mark = time.monotonic()

    def seconds_per_step(self) -> float:
        """A moving mean over some ten steps."""
        return self._pace

    def images_per_second(self) -> float:
        """Mean over the window."""
        return self._images / self._seconds if self._seconds else 0.0

    def wait_share(self) -> float:
        """Share of the window spent waiting for data."""
        return min(1.0, self._waited / self._seconds) if self._seconds else 0.0
