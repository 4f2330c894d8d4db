"""Run code that may hang, crash or take all memory in a child process that can be killed.

    parent                                              child (imports only what it needs)
      ChildProcess("module:factory", argument) --->       limits its memory and ignores stop signals
                                                          answer = factory(argument)
      send(request)                            --->       reply = answer(request)
      wait(limit_s=20)                         <---       heartbeats of a long request, then the reply

The kernel kills the child when its parent dies. Requests and replies are pickled. Large arrays can go through
`SharedMemory`. A child that exceeds its time budget or exits raises `ChildFailed`, and the caller decides whether to
retry in a new child. Each `heartbeat` renews the budget. DataLoader workers, which are not of this kind, share the
functions for signals and for dying together.
"""

import contextlib
import ctypes
import fcntl
import importlib
import mmap
import os
import resource
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, Literal

PR_SET_PDEATHSIG = 1
START_TIMEOUT_S = 180.0
"""Time budget for starting Python and importing modules, which is slow on a slow disk."""
HEARTBEAT_S = 0.5
"""Shortest time between two heartbeats. Heartbeats in between are not sent."""
EXIT_TIMEOUT_S = 10.0
"""Time for a child to exit once it has closed its connection. Threads of a decoder may delay it."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a terminal or a scheduler sends to all processes of a job. Only the main process handles them."""


class Heartbeat:
    """Message of a child that its request makes progress."""

    connection: Connection | None = None
    """Connection of this process to its parent, if it is a child that answers a request."""
    sent_s = 0.0
    """Time of the last heartbeat."""


def heartbeat() -> None:
    """Tell the parent that the current request makes progress, which renews its time budget.

    Call it after each frame or block of bytes. Outside a child it does nothing.
    """
    if Heartbeat.connection is not None and time.monotonic() - Heartbeat.sent_s > HEARTBEAT_S:
        Heartbeat.sent_s = time.monotonic()
        Heartbeat.connection.send(Heartbeat())


class ChildFailed(Exception):
    """The child did not reply: it exceeded its time budget ("timeout") or exited ("crash")."""

    def __init__(self, reason: Literal["timeout", "crash"]) -> None:
        super().__init__(reason)
        self.reason = reason


class ChildProcess:
    """A child process that answers one request at a time."""

    def __init__(
        self,
        target: str,
        *arguments: str | int,
        memory_bytes: int = 0,
        file_bytes: int = 0,
        shared: Sequence["SharedMemory"] = (),
    ) -> None:
        """Args:
        target: `module:factory`. In the child, `factory(*arguments)` returns the function that answers requests.
        arguments: passed to the factory, followed by the descriptors of `shared`.
        memory_bytes: limit of the child's address space, or 0 for no limit.
        file_bytes: largest size of a file that it writes, captured output included, or 0 for no limit.
        shared: memory that the child can attach to.
        """
        ours, theirs = Pipe()
        self._connection: Connection = ours
        self.served = 0
        """Requests answered so far."""
        self.is_ready = False
        """Whether the child has started and imported its module."""
        self._output = os.memfd_create("output")
        descriptors = [memory.descriptor for memory in shared]
        call = (target, [*arguments, *descriptors], theirs.fileno(), os.getpid(), memory_bytes, file_bytes)
        package_parent = str(Path(__file__).resolve().parents[1])
        path = [package_parent, *os.environ.get("PYTHONPATH", "").split(os.pathsep), *sys.path]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with block_stop_signals():
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from vjepa_data.child_process import _serve; _serve(*{call})"],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=[theirs.fileno(), *descriptors],
                env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(filter(None, dict.fromkeys(path)))},
            )
        theirs.close()
        self._finalizer = weakref.finalize(self, _end, self._process, ours, self._output)

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def send(self, request: Any) -> None:
        """Send a request, any object that can be pickled. If the child has exited, the next `wait` raises."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send(request)

    def wait(self, limit_s: float) -> Any:
        """Wait for the reply to the last request.

        Args:
            limit_s: time budget in seconds of work or sleep since the last heartbeat. The start of the child has a
            budget of its own.

        Raises:
            ChildFailed: the child exited or exceeded its time budget.
        """
        if not self.is_ready:
            self._receive(START_TIMEOUT_S)
            self.is_ready = True
        reply = self._receive(limit_s)
        self.served += 1
        return reply

    def _receive(self, limit_s: float) -> Any:
        while True:
            budget = ActiveTimeBudget(self.pid, limit_s)
            while not self._connection.poll(budget.tick_s):
                if budget.is_over():
                    raise ChildFailed("timeout")
            try:
                reply = self._connection.recv()
            except (EOFError, OSError):
                raise ChildFailed("crash") from None
            if not isinstance(reply, Heartbeat):
                return reply

    def exit_code(self) -> int:
        """Return the exit code of a child that has closed its connection. A child that stays is killed."""
        try:
            return self._process.wait(EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def output(self) -> str:
        """Return the last 20,000 bytes that the child wrote to its standard output and error."""
        size = os.fstat(self._output).st_size
        return os.pread(self._output, 20_000, max(0, size - 20_000)).decode(errors="replace")

    def resident_bytes(self) -> int:
        """Return the physical memory that the child uses."""
        with open(f"/proc/{self.pid}/statm") as file:  # half the time of Path.read_text; called for every clip
            return int(file.read().split()[1]) * resource.getpagesize()

    def kill(self) -> None:
        """Kill the child, so that a `wait` in another thread raises."""
        self._process.kill()

    def close(self) -> None:
        """Kill the child and release everything it used."""
        self._finalizer()


def _end(process: subprocess.Popen, connection: Connection, output: int) -> None:
    process.kill()
    process.wait()
    connection.close()
    os.close(output)


def _serve(target: str, arguments: list[Any], descriptor: int, parent: int, memory_bytes: int, file_bytes: int) -> None:
    """Answer requests until the parent closes the connection: the main function of a child."""
    die_with_parent(parent)
    ignore_stop_signals()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for kind, limit in ((resource.RLIMIT_FSIZE, file_bytes), (resource.RLIMIT_AS, memory_bytes)):
        if limit:
            resource.setrlimit(kind, (limit, limit))
    module, _, factory = target.partition(":")
    answer = getattr(importlib.import_module(module), factory)(*arguments)
    connection = Heartbeat.connection = Connection(descriptor)
    connection.send("ready")
    while True:
        try:
            request = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        connection.send(answer(request))


class SharedMemory:
    """Memory that a process shares with its child. It grows and never shrinks."""

    def __init__(self, descriptor: int | None = None) -> None:
        """Args:
        descriptor: memory of the parent to attach to. By default new memory is allocated.
        """
        self._is_ours = descriptor is None
        self.descriptor = os.memfd_create("vjepa-child") if descriptor is None else descriptor
        self.map = mmap.mmap(-1, 1)
        """The mapped bytes; valid until the next `reserve`. Arrays made from an older map keep that map alive."""
        if self._is_ours:
            weakref.finalize(self, os.close, self.descriptor)

    def reserve(self, size: int) -> int:
        """Make room for at least `size` bytes and return the size of the map, by which the child reserves as well."""
        if size > len(self.map):
            if self._is_ours:
                size = (size + (1 << 20)) >> 20 << 20
                os.ftruncate(self.descriptor, size)
            self.map = mmap.mmap(self.descriptor, size)
        return len(self.map)


class ActiveTimeBudget:
    """The time that a child has spent computing or sleeping, compared with a limit.

    Time without a core does not count, nor does time while the child is suspended together with its parent (SIGSTOP to
    a job, `scontrol suspend`, a paused virtual machine). A wall-clock limit would kill such children, and the stream
    would depend on how busy the machine is.
    """

    def __init__(self, pid: int, limit_s: float) -> None:
        """Args:
        pid: process id of the child, whose time starts now.
        limit_s: the budget in seconds.
        """
        self.limit_s, self.tick_s = limit_s, min(1.0, limit_s / 4)
        self._pid, self._spent_s = pid, 0.0
        self._checked_s, self._cpu_s = time.monotonic(), None

    def is_over(self) -> bool:
        """Update the time spent and compare it with the limit.

        Call it about every `tick_s` seconds: if more time has passed, the parent is assumed to have been suspended.
        """
        now_s = time.monotonic()
        if now_s - self._checked_s < self.tick_s:
            return False
        is_running, cpu_s = _is_running_and_cpu_s(self._pid)
        worked_s = cpu_s - (cpu_s if self._cpu_s is None else self._cpu_s)
        self._spent_s += worked_s if is_running else self.tick_s
        self._checked_s, self._cpu_s = now_s, cpu_s
        return self._spent_s >= self.limit_s


def _is_running_and_cpu_s(pid: int) -> tuple[bool, float]:
    """Return whether any thread runs, waits for a core or waits for a disk, and the CPU time of all threads."""
    states = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            states.add(_stat(task)[0])
    fields = _stat(Path(f"/proc/{pid}"))
    return not states.isdisjoint("RD"), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _stat(process: Path) -> list[str]:
    return (process / "stat").read_text().rsplit(")", 1)[1].split()


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies. Exit at once if the parent is dead already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def die_with_owner(sentinel: int) -> None:
    """Have the kernel kill this process when the other end of a pipe closes, for owners that are not the parent.

    Args:
        sentinel: read end of a pipe whose write end only the owner holds.
    """
    fcntl.fcntl(sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(sentinel, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([sentinel], [], [], 0)[0]:  # closed before we asked
        os._exit(1)


def ignore_stop_signals() -> None:
    """Ignore stop signals and unblock them, since the main process handles them."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@contextlib.contextmanager
def block_stop_signals() -> Iterator[None]:
    """Start children with blocked stop signals, until they call `ignore_stop_signals`. Ours arrive at the end.

    A child imports modules for seconds and would be killed meanwhile by a signal sent to the whole job.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_fork_server(modules: list[str]) -> None:
    """Start multiprocessing's fork server with some modules imported and stop signals blocked.

    The resource tracker starts likewise. A stop signal would kill it, and it would warn about every semaphore.
    """
    forkserver.set_forkserver_preload(modules)
    with block_stop_signals():
        resource_tracker.ensure_running()
        with block_stop_signals():  # again: the line above has unblocked two of them
            forkserver.ensure_running()
