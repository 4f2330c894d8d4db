"""Every access of the data room to private parts of torch and fsspec.

Each function hides a private name, so an upgrade that breaks it breaks a single test in `tests/data/test_compat.py`.
Imports no torch itself: corpora are read on machines without it.
"""

import threading
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from typing import Any


def read_store_range(store: Any, url: str, start: int, end: int, *, timeout_s: float) -> bytes:
    """Read the bytes `start` to `end` of an object in an fsspec store, with a time limit.

    The public `cat_file` of an asynchronous store has no time limit: a silent connection would block it.

    Raises:
        fsspec.exceptions.FSTimeoutError: the answer took longer than `timeout_s`.
    """
    from fsspec.asyn import sync

    data = sync(store.loop, store._cat_file, url, start=start, end=end, timeout=timeout_s)
    assert isinstance(data, bytes)
    return data


def loader_workers(batches: Any) -> Sequence[BaseProcess]:
    """Return the worker processes of a DataLoader's iterator, if it has any."""
    return getattr(batches, "_workers", ())


def kill_workers_at_shutdown(batches: Any) -> None:
    """Make a DataLoader's iterator kill its workers at shutdown instead of asking them to exit."""
    batches._workers_done_event = _KillWorkers(batches._workers, batches._workers_done_event)


def shut_down_workers(batches: Any) -> None:
    """End the workers of a DataLoader's iterator, if any, now rather than when it is garbage-collected."""
    if hasattr(batches, "_workers"):
        batches._shutdown_workers()


def new_shared_storage(size: int) -> Any:
    """Allocate a `torch.UntypedStorage` of `size` bytes in shared memory without writing to it."""
    import torch

    return torch.UntypedStorage._new_shared(size)


class _KillWorkers(threading.Event):
    """The event that DataLoader sets to end its workers. Setting it kills them, since they hold nothing worth saving.

    DataLoader's own event is shared with the workers. A worker killed while it holds the event's lock would block the
    trainer.
    """

    def __init__(self, workers: Sequence[BaseProcess], shared: Any) -> None:
        super().__init__()
        self._workers = workers
        self._shared = shared  # kept alive for workers that are still starting

    def set(self) -> None:
        for worker in self._workers:
            worker.kill()
        super().set()
