"""Stop signals: a signal sets a flag, the ranks agree, and the loop ends at the same step on all ranks.

A rank that saved alone after a signal would wait for the others without end. Therefore every rank votes in every step,
and all ranks read the result one step later, when it has long arrived.
"""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from vjepa.distributed.world import World

log = logging.getLogger(__name__)

STOPPED = 75
"""Exit code of a run that saved and stopped; requeue to resume (EX_TEMPFAIL)."""

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class Stop:
    """Stop requests of this rank, and the agreement of all ranks."""

    def __init__(self, world: World) -> None:
        self._world, self._pid = world, os.getpid()
        self._signal = 0
        self._vote: tuple[dist.Work, torch.Tensor] | None = None

    def request(self, number: int = signal.SIGTERM) -> None:
        """Request a stop from this rank."""
        self._signal = self._signal or number

    def agreed(self) -> bool:
        """Return whether all ranks stop before the next step. Call it once per step on every rank."""
        if self._world.size == 1:
            return bool(self._signal)
        answer = self._collect()
        ballot = torch.tensor([self._signal], dtype=torch.int64)
        work = dist.all_reduce(ballot, op=dist.ReduceOp.MAX, group=self._world.control, async_op=True)
        assert work is not None
        self._vote = work, ballot
        return answer

    def _collect(self) -> bool:
        if self._vote is None:
            return False
        work, ballot = self._vote
        work.wait()
        self._vote = None
        return bool(ballot.item())

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
    """Catch USR2 (time limit), TERM and INT (Ctrl-C; twice to stop at once), and restore the handlers at the end."""
    stop = Stop(world)
    before = {number: signal.signal(number, stop._on_signal) for number in SIGNALS}
    try:
        yield stop
        if world.size > 1:
            stop._collect()  # no message is pending when the group ends
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
