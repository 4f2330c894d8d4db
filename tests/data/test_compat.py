"""Private parts of torch and fsspec behave as `vjepa_data.compat` expects."""

import asyncio
import os
import signal
import time
from typing import Any

import pytest
import torch
from fsspec import asyn
from fsspec.exceptions import FSTimeoutError
from torch.utils.data import DataLoader, Dataset

from vjepa_data.compat import (
    kill_workers_at_shutdown,
    loader_workers,
    new_shared_storage,
    read_store_range,
    shut_down_workers,
)


class Numbers(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return index


@pytest.fixture
def batches():
    before = signal.getsignal(signal.SIGCHLD)
    made: Any = iter(DataLoader(Numbers(), batch_size=None, num_workers=1, multiprocessing_context="fork"))
    signal.signal(signal.SIGCHLD, before)  # DataLoader's handler would raise in later tests that kill workers
    next(made)
    yield made
    shut_down_workers(made)


class Store(asyn.AsyncFileSystem):
    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: object) -> bytes:
        await asyncio.sleep(30 if path == "silent" else 0)
        return b"0123456789"[start:end]


def test_a_range_of_an_object_is_read() -> None:
    assert read_store_range(Store(), "s3://a/b", 2, 5, timeout_s=30) == b"234"


def test_a_silent_store_times_out() -> None:
    began = time.monotonic()
    with pytest.raises(FSTimeoutError):
        read_store_range(Store(), "silent", 0, 1, timeout_s=0.2)
    assert time.monotonic() - began < 20


def test_worker_processes_are_listed(batches: Any) -> None:
    (worker,) = loader_workers(batches)
    assert worker.pid
    assert worker.is_alive()


def test_an_iterator_without_workers_has_none() -> None:
    batches = iter(DataLoader(Numbers(), batch_size=None))
    assert not loader_workers(batches)
    shut_down_workers(batches)


def test_shutdown_kills_workers(batches: Any) -> None:
    (worker,) = loader_workers(batches)
    kill_workers_at_shutdown(batches)
    shut_down_workers(batches)
    worker.join(timeout=60)
    assert worker.exitcode == -9


def test_shutdown_ends_workers(batches: Any) -> None:
    (worker,) = loader_workers(batches)
    shut_down_workers(batches)
    worker.join(timeout=60)
    assert worker.exitcode is not None


def test_shared_storage_is_seen_by_a_forked_child() -> None:
    storage = new_shared_storage(16)
    tensor = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (16,)).fill_(1)  # pyright: ignore[reportCallIssue, reportArgumentType]
    if os.fork() == 0:
        tensor.fill_(7)
        os._exit(0)
    os.wait()
    assert tensor.tolist() == [7] * 16
