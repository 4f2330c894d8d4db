"""How a child of ours behaves: it dies with its parent, leaves signals to it, keeps its memory. And when it hangs."""

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import time
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

PR_SET_PDEATHSIG = 1
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 256 << 20  # freed at the top of the heap before any is given back; a clip of 64 frames needs 70 MB
LARGEST_BYTES = 32 << 20  # glibc takes no larger threshold


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies; end at once if it has died already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def die_with_owner(sentinel: int) -> None:
    """Have the kernel kill this process when a pipe's other end closes, where the owner is not the parent.

    Args:
        sentinel: read end of a pipe whose write end only the owner holds.
    """
    fcntl.fcntl(sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(sentinel, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([sentinel], [], [], 0)[0]:  # it has closed already
        os._exit(1)


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What a terminal or a scheduler sends to all processes of a job; the training process answers for all."""


def ignore_stop_signals() -> None:
    """Leave it to the training process to answer."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@contextlib.contextmanager
def deaf_from_birth() -> Iterator[None]:
    """Start children that hear no stop signal until they `ignore_stop_signals`; to us they come when this ends.

    A child takes seconds to import what it needs, and would be killed meanwhile by what is sent to all of a job.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_fork_server(modules: list[str]) -> None:
    """Have what workers are forked from import some modules; it never hears a stop signal.

    Nor does what multiprocessing keeps its semaphores with, or it would be killed and complain of each of them.
    """
    forkserver.set_forkserver_preload(modules)
    with deaf_from_birth():
        resource_tracker.ensure_running()
        with deaf_from_birth():  # again: the line above has unblocked two of them
            forkserver.ensure_running()


def keep_memory() -> None:
    """Have malloc keep what is freed for the next clip.

    By default it gives the frames of every clip back to the kernel, and fetching as much again costs 700 to 2,000 page
    faults: an eighth of the decoding time (benchmarks/README.md). Elsewhere than in glibc nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, LARGEST_BYTES)


@contextlib.contextmanager
def on_one_core() -> Iterator[None]:
    """Keep this thread, and those that it starts meanwhile, on the core where it runs now; then let it go again.

    decord hands every frame from one thread to another, a hundred times a clip. Where they lie on different cores, each
    hand-over wakes a core up, which may take longer than to decode the frame.
    """
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {ctypes.CDLL(None).sched_getcpu()})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


class Patience:
    """How much of its time a child has had: while it slept and while it computed, not while it was kept from both.

    One that gets no core is not slow, nor is one that is suspended together with us (SIGSTOP to a job, `scontrol
    suspend`, a virtual machine that pauses). By the clock on the wall both would be given up, and what a run sees would
    depend on how busy its machine is.
    """

    def __init__(self, pid: int, limit_s: float) -> None:
        """Args:
        pid: of the child, whose time begins now.
        limit_s: seconds that it gets.
        """
        self.limit_s, self.tick_s = limit_s, min(1.0, limit_s / 4)
        self._pid, self._had_s = pid, 0.0
        self._looked_s, self._used_s = time.monotonic(), None

    def is_over(self) -> bool:
        """Look at the child, every `tick_s` seconds: of a longer pause it is assumed that we were suspended as well."""
        now_s = time.monotonic()
        if now_s - self._looked_s < self.tick_s:
            return False
        is_running, used_s = _is_running_and_cpu_s(self._pid)
        worked_s = used_s - (used_s if self._used_s is None else self._used_s)
        self._had_s += worked_s if is_running else self.tick_s
        self._looked_s, self._used_s = now_s, used_s
        return self._had_s >= self.limit_s


def _is_running_and_cpu_s(pid: int) -> tuple[bool, float]:
    """Say whether any thread of a child runs, wants a core or waits for a disk, and the CPU time that all have used."""
    states = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            states.add(_facts(task)[0])
    facts = _facts(Path(f"/proc/{pid}"))
    return not states.isdisjoint("RD"), (int(facts[11]) + int(facts[12])) / os.sysconf("SC_CLK_TCK")


def _facts(process: Path) -> list[str]:
    return (process / "stat").read_text().rsplit(")", 1)[1].split()
