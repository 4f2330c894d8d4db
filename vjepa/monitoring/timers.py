"""Step timers: seconds by part of the step, without synchronising with the device.

On a GPU the host only queues work, so times are taken by events in the same queue and read when the record is written.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
Mark = float | torch.cuda.Event


class StepTimer:
    """Times the parts of a step: `prepare`, `forward`, `backward`, `optimizer`, and host work between."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._spans: list[tuple[str, Mark, Mark]] = []
        self._host_s: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part of the step on the device."""
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    @contextmanager
    def host(self, name: str) -> Iterator[None]:
        """Time work of the host."""
        start = time.perf_counter()
        yield
        self._host_s[name] += time.perf_counter() - start

    def waiting(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the items and time the wait for each."""
        iterator = iter(items)
        while True:
            with self.host(name):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def read(self) -> dict[str, float]:
        """Return the seconds since the last reading, by part. Waits for the device."""
        if self._on_device:
            torch.cuda.synchronize()
        seconds = defaultdict(float, self._host_s)
        for name, start, end in self._spans:
            if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                seconds[name] += start.elapsed_time(end) / 1e3
            elif isinstance(start, float) and isinstance(end, float):
                seconds[name] += end - start
        self._spans.clear()
        self._host_s.clear()
        return dict(seconds)

    def _now(self) -> Mark:
        if not self._on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
