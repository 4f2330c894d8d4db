"""Ranks that keep the others waiting. A step takes as long as its slowest rank, and no rank's clock shows which.

What a rank does alone can be compared: its wait for data, and a pulse, one matrix product that nobody else takes part
in (a GPU that throttles, or a core that others use, is slow at that too).
"""

import logging
import statistics
import time
from collections.abc import Sequence

import torch

log = logging.getLogger(__name__)

PATIENCE = 3
"""Readings in a row before a rank is named: one may be chance."""


class Stragglers:
    """Names a rank once it was late a few times in a row."""

    def __init__(self, ratio: float) -> None:
        """Args:
        ratio: how many times the median is late.
        """
        self._ratio = ratio
        self._late: dict[str, tuple[int, int]] = {}

    def see(self, what: str, seconds: Sequence[float], hosts: Sequence[str], *, at_least_s: float) -> None:
        """Compare ranks.

        Args:
            what: they did.
            seconds: that each took.
            hosts: where each is.
            at_least_s: the slowest must be behind the median by this, or it does not matter.
        """
        usual, worst = statistics.median(seconds), max(seconds)
        rank, times = self._late.get(what, (-1, 0))
        if worst < self._ratio * usual or worst - usual < at_least_s:
            self._late.pop(what, None)
            return
        slowest = seconds.index(worst)
        times = times + 1 if rank == slowest else 1
        self._late[what] = slowest, times
        if times == PATIENCE:
            log.warning(
                "rank %d on %s is slow at %s: %.3g s where the median rank takes %.3g s, %d times in a row",
                slowest, hosts[slowest], what, worst, usual, times,
            )  # fmt: skip


class Pulse:
    """A matrix product of always the same size, on this rank's device."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        size, dtype = (4096, torch.bfloat16) if self._on_device else (256, torch.float32)
        self._matrix = torch.ones(size, size, device=device, dtype=dtype)
        self.measure_s()

    def measure_s(self) -> float:
        """Seconds of the fastest of three; the device must be idle."""
        return min(self._once_s() for _ in range(3))

    def _once_s(self) -> float:
        start = time.perf_counter()
        torch.mm(self._matrix, self._matrix)
        if self._on_device:
            torch.cuda.synchronize()
        return time.perf_counter() - start
