"""How a child process of ours behaves: it dies with its parent, leaves signals to it, and keeps its memory."""

import contextlib
import ctypes
import fcntl
import os
import select
import signal
from collections.abc import Iterator

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


def ignore_stop_signals() -> None:
    """Leave it to the training process to answer the signals that a terminal or a scheduler sends to all of a job."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


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
