"""Worker processes that prepare data ahead, and never outlive the program."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from patchword.spec.parse import PatchwordError

T = TypeVar("T")
_ENDING = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class _Failure:
    """An error on its way from a worker: a message, as DataLoader would add a traceback to it."""

    message: str


class _Reporting(Dataset[Any]):
    def __init__(self, batches: Dataset[Any]) -> None:
        self.batches = batches

    def __getitem__(self, number: int) -> Any:
        try:
            return self.batches[number]
        except PatchwordError as error:
            return _Failure(str(error))


def _same(item: Any) -> Any:
    return item


def _start_worker(number: int) -> None:
    """Leave signals to the parent, which ends its workers itself; and never outlive it."""
    for one in _ENDING:
        signal.signal(one, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        parent = multiprocessing.parent_process()
        if parent is not None and os.getppid() != parent.pid:  # it died before
            os._exit(1)


@contextmanager
def _child_signals_kept() -> Iterator[None]:
    """Undo torch's SIGCHLD handler, which raises wherever the program is when a worker dies.

    Waiting for the next batch notices too, within seconds, and there the error is expected.
    """
    number = getattr(signal, "SIGCHLD", None)
    if number is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(number)
    yield
    signal.signal(number, before or signal.SIG_DFL)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Block what would end a worker between its fork and `_start_worker`, as a signal to the whole
    group does; the parent gets it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(batches: Dataset[T], numbers: Sequence[int], workers: int) -> Iterator[T]:
    """`batches[n]` for each of `numbers`, made ahead by worker processes if there are any.

    Closing or forgetting the iterator ends the workers. Raises `PatchwordError` as `batches` does,
    and where a worker dies.
    """
    if workers < 1 or len(numbers) == 0:
        for number in numbers:
            yield batches[number]
        return
    with _child_signals_kept(), _signals_held(), warnings.catch_warnings():
        # Python 3.12 warns of fork in a process with threads, torch of more workers than cores.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "This DataLoader will create")
        iterator = iter(
            DataLoader(
                _Reporting(batches),
                batch_size=None,
                sampler=numbers,
                num_workers=min(workers, len(numbers)),
                collate_fn=_same,
                worker_init_fn=_start_worker,
                generator=torch.Generator(),  # leaves torch's own random state alone
                multiprocessing_context="fork" if sys.platform == "linux" else None,
            )
        )
    try:
        for item in iterator:
            if isinstance(item, _Failure):
                raise PatchwordError(item.message)
            yield item
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise PatchwordError(
            "a data loader process died, perhaps for want of memory; use fewer --workers"
        ) from error
    finally:
        del iterator  # ends the workers
