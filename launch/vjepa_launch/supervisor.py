"""Start the processes of the ranks, pass stop signals on to them, and end ranks that stall or whose run has failed.

Ranks are child processes of the supervisor, not functions inside it. So the supervisor outlives any rank (an exit, a
fault in native code, `kill -9`, out of memory), reports how it ended, and can kill a stalled rank.

Which processes SLURM signals depends on its ProctrackType. Under `cgroup` only the supervisor is signalled, under
`linuxproc` every process of a step. Stop signals are therefore always passed on, and a rank may receive them twice.
"""

import contextlib
import ctypes
import logging
import math
import os
import resource
import signal
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from vjepa_launch.policy import STOPPED, RankExit, is_failure
from vjepa_launch.process_info import ignores_usr2, process_state

log = logging.getLogger(__name__)

POLL_S = 0.05
REPEAT_S = 2.0
"""USR2 is repeated until the rank ends, because a rank that is still starting ignores it."""

GRACE_S = 10.0
"""Time that the other ranks get to end by themselves after a failure. Then they get ABRT, and later KILL."""

LOOK_S = 20.0
"""Time between two looks at the heartbeat file. It lies on a disk that all nodes share, and another node writes it, so
that every look asks the file server, on Lustre also the writer."""

LONGEST_POLL_S = 1.0
"""The time between two polls counts as at most this much. If the supervisor was suspended or starved together with its
ranks (a sleeping laptop, `scontrol suspend`), the ranks are not considered stalled."""

SUSPENDED_S = 10.0
"""A rank that is suspended (SIGSTOP) for this long, while the supervisor is not, counts as stalled."""


def catch_stop_signals() -> set[int]:
    """Collect the stop signals of this process in the returned set, instead of acting on them.

    USR2 means: save, then requeue (the time limit or a preemption is near). TERM, or INT, means: save, then let the
    scheduler decide (a cancellation or a preemption). Forked children ignore these signals.
    """
    received: set[int] = set()
    pid = os.getpid()

    def receive(number: int, frame: FrameType | None) -> None:
        if os.getpid() == pid:
            received.add(signal.SIGTERM if number == signal.SIGINT else number)

    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, receive)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    return received


@dataclass
class RankProcess:
    """The running process of a rank."""

    rank: int
    process: subprocess.Popen[bytes]
    suspended_polls: int = 0
    """Consecutive polls at which the process was suspended."""
    killed_by_us: bool = False
    stall: str = ""
    """Description of the stall, once it is detected."""
    stalled_at: float = 0.0
    stopped_early: bool = False
    """A stop signal came while the rank was still importing, and it was killed."""

    def send(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.process.poll() is None:
            self.process.send_signal(number)


def start(
    command: Sequence[str], environments: Mapping[int, Mapping[str, str]], logs: Mapping[int, Path]
) -> list[RankProcess]:
    """Start a process for each rank. A rank without a file in `logs` writes to the output of this process."""
    ranks = []
    for rank, environment in environments.items():
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(logs[rank].open("ab")) if rank in logs else None
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, preexec_fn=_prepare_child)
        ranks.append(RankProcess(rank, process))
    return ranks


_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _prepare_child() -> None:
    """Set up the child before it becomes the command.

    - USR2 is ignored until the command installs a handler. By default it would kill the process during its imports.
    - The kernel kills the child when the supervisor dies, since then nothing supervises it.
    - No core files: a stalled rank is aborted for its stacks, and its core would be as large as its memory.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def supervise(
    ranks: Sequence[RankProcess],
    received: Collection[int],
    *,
    heartbeat: Path | None,
    stall_s: float,
    handles_usr2: bool = True,
) -> list[RankExit]:
    """Wait until all ranks have ended. Pass stop signals on, and end ranks that stall or whose run has failed.

    A stop signal is always passed on as USR2. A rank can save undisturbed after a second USR2, but TERM would kill a
    rank that has no handler yet, or that has saved and is shutting down. A rank that ignores a second USR2 has made no
    step and is killed: its start may take longer than the job has left.

    Args:
        ranks: the ranks of this supervisor.
        received: stop signals that this process has received. Signal handlers add to it.
        heartbeat: a file that changes while the run makes progress. None if another supervisor watches it: when it ends
            its rank, the scheduler ends the other ranks.
        stall_s: seconds without a change of `heartbeat` after which the run counts as stalled.
        handles_usr2: the command handles USR2 once it has started.
    """
    exits: dict[int, RankExit] = {}
    signalled_at, failed_at = -math.inf, None
    clock = _ProgressClock(heartbeat, stall_s)
    while len(exits) < len(ranks):
        time.sleep(POLL_S)
        now = time.monotonic()
        quiet_s = clock.quiet_s(now)
        running = [rank for rank in ranks if rank.rank not in exits]
        for rank in running:
            code = rank.process.poll()
            if code is not None:
                if rank.stopped_early and code == -signal.SIGKILL:
                    exits[rank.rank] = RankExit(rank.rank, STOPPED, "stopped before its first step")
                    continue
                reason = rank.stall or describe_exit(code)
                exits[rank.rank] = RankExit(rank.rank, code, reason, rank.killed_by_us)
                if is_failure(code, received) and failed_at is None:
                    failed_at = now
        if received and now - signalled_at > REPEAT_S:
            for rank in running:
                if handles_usr2 and signalled_at > -math.inf and ignores_usr2(rank.process.pid):
                    rank.stopped_early = True
                    rank.send(signal.SIGKILL)
                rank.send(signal.SIGUSR2)
            signalled_at = now
        if failed_at is not None and now - failed_at > GRACE_S:
            for rank in running:
                rank.send(signal.SIGKILL if rank.killed_by_us else signal.SIGABRT)
                rank.killed_by_us = True
            failed_at = now
        for rank in running:
            _end_if_stalled(rank, now=now, quiet_s=quiet_s, stall_s=stall_s)
    return list(exits.values())


def describe_exit(code: int) -> str:
    """Describe an exit code of a process in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _end_if_stalled(rank: RankProcess, *, now: float, quiet_s: float, stall_s: float) -> None:
    """Abort a rank that stalls, and kill it if it does not respond."""
    rank.suspended_polls = rank.suspended_polls + 1 if process_state(rank.process.pid) == "T" else 0
    if rank.stall:
        if now - rank.stalled_at > GRACE_S:  # it did not write its stacks either
            rank.send(signal.SIGKILL)
        return
    if rank.suspended_polls * POLL_S > SUSPENDED_S:
        rank.stall = f"suspended (SIGSTOP) for {SUSPENDED_S:.0f} s"
    elif quiet_s > stall_s:
        rank.stall = f"no progress for {stall_s / 60:.1f} min"
    else:
        return
    rank.stalled_at = now
    log.error("rank %d: %s; aborting it to get the stacks of its threads", rank.rank, rank.stall)
    # PYTHONFAULTHANDLER writes the stacks on SIGABRT. A suspended process receives it when it continues.
    rank.send(signal.SIGABRT)
    rank.send(signal.SIGCONT)


class _ProgressClock:
    """Measure for how long a file has not changed, leaving out the time when this process was suspended.

    The file is looked at every `LOOK_S`, or four times in `stall_s` if that is shorter.
    """

    def __init__(self, path: Path | None, stall_s: float) -> None:
        self._path, self._stall_s, self._every_s = path, stall_s, min(LOOK_S, stall_s / 4)
        self._polled_at, self._modified, self._quiet_s = time.monotonic(), _modification_time(path), 0.0
        self._until_look_s = self._every_s

    def quiet_s(self, now: float) -> float:
        """Return the seconds since the last change of the file that was seen. Call it at every poll."""
        if self._path is None:
            return 0.0
        elapsed_s = min(now - self._polled_at, LONGEST_POLL_S)
        self._polled_at = now
        self._quiet_s += elapsed_s
        self._until_look_s -= elapsed_s
        if self._until_look_s <= 0 or self._quiet_s > self._stall_s:  # never a verdict without a look
            self._until_look_s = self._every_s
            modified = _modification_time(self._path)
            if modified != self._modified:
                self._modified, self._quiet_s = modified, 0.0
        return self._quiet_s


def _modification_time(path: Path | None) -> float:
    """Return the modification time by the clock of the file server, which may differ from the clock of this node."""
    try:
        return path.stat().st_mtime if path is not None else 0.0
    except OSError:
        return 0.0
