"""The processes of the ranks, and what is done with signals, failures and hangs.

The ranks are children of the supervisor that submitit starts, rather than functions in it, because then whatever a rank
dies of (an exit, a fault in native code, `kill -9`, out of memory) somebody is left to say so, to end a process that
hangs, and to decide. What SLURM signals depends on its ProctrackType: under `cgroup` the supervisor only, under
`linuxproc` every process of a step. So a wish to stop is always passed on, and a child must take it for a flag that may
be set twice.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from vjepa_launch.history import DONE, STOPPED

log = logging.getLogger(__name__)

POLL_S = 0.05
REPEAT_S = 2.0
"""USR2 is repeated until it is heeded: a child that is still starting does not listen yet."""

ECHO_S = 10.0
"""Time for other ranks to end by themselves when one has failed, before they are told and then killed."""

LOOK_S = 1.0
"""What lies between two looks counts for no more than this: who was suspended or starved together with its children (a
laptop asleep, `scontrol suspend`) must not take them to hang."""

SUSPENDED_S = 10.0
"""A child that is suspended (SIGSTOP) for so long, while we are not, is taken to hang."""


class StopSignals:
    """Signals that asked this process to stop, in place of doing anything at the time.

    USR2 means: save, and come back (time limit or preemption is near). TERM means: save, and the scheduler decides
    (it is a cancellation or a preemption). A process that was forked from this one has other worries.
    """

    def __init__(self) -> None:
        self.signals: set[int] = set()
        self._pid = os.getpid()
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hear)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._pid:
            self.signals.add(signal.SIGTERM if number == signal.SIGINT else number)

    @property
    def to_return(self) -> bool:
        return signal.SIGUSR2 in self.signals

    @property
    def to_end(self) -> bool:
        return signal.SIGTERM in self.signals

    @property
    def to_stop(self) -> bool:
        return bool(self.signals)


@dataclass(frozen=True)
class RankExit:
    """How a child ended."""

    rank: int
    code: int
    """Exit code; the negative of a signal that killed it."""
    reason: str
    echo: bool = False
    """It was told to end because others had."""


@dataclass
class _Child:
    rank: int
    process: subprocess.Popen[bytes]
    suspended: int = 0
    """Looks in a row at which it was suspended."""
    told: bool = False
    hang: str = ""
    """What was noticed, once it hangs."""
    hung_at: float = 0.0


def start(
    command: Sequence[str], environments: Mapping[int, Mapping[str, str]], logs: Mapping[int, Path]
) -> list[_Child]:
    """Start one process per rank; a rank with a log of its own writes there, the others where we write."""
    children = []
    for rank, environment in environments.items():
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(logs[rank].open("ab")) if rank in logs else None
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, preexec_fn=_prepare)
        children.append(_Child(rank, process))
    return children


_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _prepare() -> None:
    """In the child, before it becomes the command.

    It ignores USR2 until it says otherwise: by default the signal would kill it while it imports. And it does not
    outlive us: nobody would be left to look after it. We abort what hangs, for its stacks; that leaves no core, which
    for a trainer would be as large as its memory.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def wait(children: Sequence[_Child], heard: StopSignals, *, alive: Path, stall_s: float) -> list[RankExit]:
    """Wait until all have ended, passing the wish to stop on, ending those that hang or whose companions have failed.

    The wish is passed on as USR2, whichever signal brought it: a child can save at leisure after a second one, while
    TERM would end one that does not listen yet, or that has saved and is tidying up.

    Args:
        children: the ranks of this supervisor.
        heard: the signals that this process received and receives.
        alive: a file that changes while the run makes progress.
        stall_s: seconds without a change after which the run is taken to hang.
    """
    ended: dict[int, RankExit] = {}
    signalled, failed_at = -math.inf, None
    looked, quiet_s, modified = time.monotonic(), 0.0, _modified(alive)
    while len(ended) < len(children):
        time.sleep(POLL_S)
        now = time.monotonic()
        before, modified = modified, _modified(alive)
        quiet_s = 0.0 if modified != before else quiet_s + min(now - looked, LOOK_S)
        looked = now
        running = [child for child in children if child.rank not in ended]
        for child in running:
            code = child.process.poll()
            if code is not None:
                ended[child.rank] = RankExit(child.rank, code, child.hang or describe(code), echo=child.told)
                if code not in (DONE, STOPPED) and not killed_by_us(code, heard) and failed_at is None:
                    failed_at = now
        if heard.to_stop and now - signalled > REPEAT_S:
            signalled = now
            _send(running, signal.SIGUSR2)
        if failed_at is not None and now - failed_at > ECHO_S:
            for child in running:
                _send([child], signal.SIGKILL if child.told else signal.SIGABRT)
                child.told = True
            failed_at = now
        _end_hanging(running, now=now, quiet_s=quiet_s, stall_s=stall_s)
    return list(ended.values())


def killed_by_us(code: int, heard: StopSignals) -> bool:
    """A child that a stop signal killed before it listened, or after it had let go of its handlers, was stopping."""
    return (heard.to_return and code == -signal.SIGUSR2) or (heard.to_end and code == -signal.SIGTERM)


def describe(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _end_hanging(running: Sequence[_Child], *, now: float, quiet_s: float, stall_s: float) -> None:
    for child in running:
        child.suspended = child.suspended + 1 if _state(child.process.pid) == "T" else 0
        if child.hang:
            if now - child.hung_at > ECHO_S:  # it does not even give its stacks
                _send([child], signal.SIGKILL)
            continue
        if child.suspended * POLL_S > SUSPENDED_S:
            child.hang = f"suspended (SIGSTOP) for {SUSPENDED_S:.0f} s"
        elif quiet_s > stall_s:
            child.hang = f"no progress for {stall_s / 60:.1f} min"
        else:
            continue
        child.hung_at = now
        log.error("rank %d: %s; its stacks follow, and it is ended", child.rank, child.hang)
        # PYTHONFAULTHANDLER turns the abort into the stacks of all threads; a suspended process dies as it wakes.
        _send([child], signal.SIGABRT)
        _send([child], signal.SIGCONT)


def _send(children: Sequence[_Child], number: int) -> None:
    for child in children:
        if child.process.poll() is None:
            child.process.send_signal(number)


def _state(pid: int) -> str:
    """One letter of /proc: R running, S sleeping, D waiting for a disk, T suspended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _modified(path: Path) -> float:
    """When, by the clock of whoever keeps the file, which need not be ours."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
