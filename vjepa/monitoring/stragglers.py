"""Straggler detection: ranks for which all ranks wait.

A step takes as long as its slowest rank, and no rank's step time shows which rank that is. Work that a rank does alone
can be compared: its wait for data, and a pulse, a local matrix product. A throttled GPU or a shared core is slow
there.
"""

import logging
import statistics
import time
from collections.abc import Sequence

import torch

log = logging.getLogger(__name__)

PATIENCE = 3
"""Readings in a row before a rank is named. A single reading may be chance."""


class Stragglers:
    """Names a rank that was late several times in a row."""

    def __init__(self, ratio: float) -> None:
        """Args:
        ratio: multiple of the median from which a rank counts as late.
        """
        self._ratio = ratio
        self._late: dict[str, tuple[int, int]] = {}

    def see(self, what: str, seconds: Sequence[float], hosts: Sequence[str], *, at_least_s: float) -> None:
        """Compare the times of all ranks.

        Args:
            what: the activity.
            seconds: time of each rank.
            hosts: host of each rank.
            at_least_s: smallest delay behind the median that matters.
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
    """A matrix product of fixed size on this rank's device."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        size, dtype = (4096, torch.bfloat16) if self._on_device else (256, torch.float32)
        self._matrix = torch.ones(size, size, device=device, dtype=dtype)
        self.measure_s()

    def measure_s(self) -> float:
        """Return the seconds of the fastest of three runs. The device must be idle."""
        return min(self._once_s() for _ in range(3))

    def _once_s(self) -> float:
        start = time.perf_counter()
        torch.mm(self._matrix, self._matrix)
        if self._on_device:
            torch.cuda.synchronize()
        return time.perf_counter() - start
