"""Stop signals: a signal sets a flag, the ranks agree, and the loop ends at the same step on all ranks.

A rank that saved alone after a signal would wait for the other ranks without end. Therefore every rank votes in every
step. The votes are summed with the loss, and all ranks read the sum a step later. On a GPU it is two steps later, so
that the host may be a whole step ahead of the device.
"""

import logging
import os
import signal
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from vjepa.distributed.world import World

log = logging.getLogger(__name__)

STOPPED = 75
"""Exit code of a run that saved and stopped (EX_TEMPFAIL). Requeue to resume it."""

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class Stop:
    """Stop requests of this rank, and the agreement of all ranks."""

    def __init__(self, world: World) -> None:
        self._world, self._pid = world, os.getpid()
        self._signal = 0
        self._sums: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()
        self._delay = 2 if world.device.type == "cuda" else 1

    def request(self, number: int = signal.SIGTERM) -> None:
        """Request a stop from this rank."""
        self._signal = self._signal or number

    @property
    def vote(self) -> float:
        """This rank's vote: 1 to stop, 0 to go on."""
        return float(bool(self._signal))

    def count(self, votes: torch.Tensor) -> None:
        """Take the sum of the votes of all ranks in a step, on the device. It is read later."""
        if votes.is_cuda:
            votes = torch.empty((), pin_memory=True).copy_(votes, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            event = None
        self._sums.append((votes, event))

    def agreed(self) -> bool:
        """Return whether all ranks stop before the next step. Call it once per step on every rank."""
        if self._world.size == 1:
            return bool(self._signal)
        if len(self._sums) < self._delay:
            return False
        votes, event = self._sums.popleft()
        if event is not None:
            event.synchronize()
        return bool(votes.item())

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked worker inherited the handler; the scheduler signals every process
            return
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C stops at once
        if not self._signal and self._world.is_first:
            # Not through logging, because the handler may interrupt it while it holds its lock.
            os.write(2, f"\n{signal.Signals(number).name}: stopping after this step\n".encode())
        self._signal = self._signal or number


@contextmanager
def stop_signals(world: World) -> Iterator[Stop]:
    """Catch USR2 (time limit), TERM and INT (Ctrl-C, twice to stop at once), and restore the handlers at the end."""
    stop = Stop(world)
    before = {number: signal.signal(number, stop._on_signal) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
