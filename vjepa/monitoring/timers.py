"""Where the time of a step goes, without waiting for the device to tell.

On a GPU the host only queues work, so times are taken by events in the same queue and read when the record is written.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from vjepa.methods import Models

T = TypeVar("T")
Mark = float | torch.cuda.Event


class Clock:
    """Seconds by part of the step, gathered from hooks so that the loop need not speak of time.

    data | prepare | target, encoder, predictor forward | backward | optimizer
                   ^ target's forward begins    predictor's ends ^          ^ optimizer's step begins

    `prepare` is the way to the device, and the masks.
    """

    def __init__(self, models: Models, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._spans: list[tuple[str, Mark, Mark]] = []
        self._begun: dict[str, Mark] = {}
        self._host_s: defaultdict[str, float] = defaultdict(float)
        self._aside = False
        self._hooks: list[Any] = [
            models.target.register_forward_pre_hook(lambda *_: self._begin_forward()),
            models.encoder.register_forward_pre_hook(lambda *_: self._begin_forward()),  # where no target is asked
            models.predictor.register_forward_hook(lambda *_: self._turn("forward", "backward")),
            optimizer.register_step_pre_hook(lambda *_: self._turn("backward", "optimizer")),
            optimizer.register_step_post_hook(lambda *_: self._turn("optimizer", None)),
        ]

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def host(self, name: str) -> Iterator[None]:
        """Time something that the host does."""
        start = time.perf_counter()
        yield
        self._host_s[name] += time.perf_counter() - start

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part of the step that no hook sees; what came before it has ended."""
        self._turn(None, name)
        yield
        self._turn(name, None)

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """Time something that may run the networks but is no part of a step."""
        self._aside = True
        with self.host(name):
            yield
        self._aside = False

    def waiting(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The same items, with the time spent waiting for each."""
        iterator = iter(items)
        while True:
            with self.host(name):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def read(self) -> dict[str, float]:
        """Seconds since the last reading, by part; waits for the device."""
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

    def _begin_forward(self) -> None:
        if "forward" not in self._begun and not self._aside:
            self._turn(None, "forward")

    def _turn(self, ends: str | None, begins: str | None) -> None:
        """One part of the step ends where the next begins."""
        now = self._now()
        # With accumulation a backward pass is ended by the next forward.
        for name in [ends] if ends else list(self._begun):
            if name in self._begun:
                self._spans.append((name, self._begun.pop(name), now))
        if begins:
            self._begun[begins] = now

    def _now(self) -> Mark:
        if not self._on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
