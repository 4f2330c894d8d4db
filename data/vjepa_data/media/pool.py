"""Child processes that may be killed: the only safe place to open a file that a stranger made.

    parent                    child (python -m vjepa_data.media.pool MODULE)
    Pool.map  -- task -->     MODULE.work(task)
              <-- answer --   or a Refused, or nothing before the time-out: SIGKILL, and a new child

A child that crashes or hangs costs its task, never the build. Answers come back in the order of the tasks whatever
the order in which they are finished, so that nothing downstream depends on the number of children.
"""

import contextlib
import importlib
import os
import resource
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType
from typing import Any, Generic, TypeVar

from vjepa_data.media.video import Reason, Refused
from vjepa_data.process import Patience, die_with_parent

Task = TypeVar("Task")
Answer = TypeVar("Answer")

TASKS_PER_CHILD = 2000
"""After so many tasks a child is replaced: decoders that fail to open a file leak (decord 0.6: up to 160 KB each)."""

KILLS = 5
"""So often a task may lose its child to a signal from outside before that counts against the task itself."""

LEAVE_S = 10.0
"""For a child to be gone once it has closed its pipe."""

MEMORY_GIB = 8
"""Address space of a child; a file that asks for more fails in its child alone."""


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    pipe: Connection
    errors: int
    """File descriptor of what the child wrote to its standard error."""
    done: int = 0
    job: "_Job | None" = None
    patience: Patience | None = None


@dataclass
class _Job:
    task: Any
    attempts: int = 0
    kills: int = 0
    """Times that its child was killed by somebody else: the kernel short of memory, a scheduler, a user."""
    answer: Any = None
    is_done: bool = False


class WorkerPool(Generic[Task, Answer]):
    """A few children that each run `work(task)` of one module.

    Args:
        module: name of the module; its `work` must be a function of its task, and raise `Refused` for bad input.
        workers: number of children.
        timeout_s: seconds, asleep or at work, after which a task's child is killed.
    """

    def __init__(self, module: str, *, workers: int, timeout_s: float) -> None:
        self._module, self._timeout_s = module, timeout_s
        self._children: list[_Child] = []
        self._workers = workers

    def __enter__(self) -> "WorkerPool[Task, Answer]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._children:
            _end(child)
        self._children.clear()

    def map(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Answer | Refused]]:
        """Run the tasks, a few ahead of what is asked for, and give the answers in order.

        Raises:
            RuntimeError: `work` itself is at fault; the child's traceback is the message.
        """
        queue: deque[_Job] = deque()
        waiting: deque[_Job] = deque()
        source = iter(tasks)
        ahead = 4 * self._workers
        is_more = True
        while is_more or queue:
            while is_more and len(queue) < ahead:
                task = next(source, _END)
                if task is _END:
                    is_more = False
                    break
                job = _Job(task)
                queue.append(job)
                waiting.append(job)
            self._hand_out(waiting)
            if queue and not queue[0].is_done:
                self._collect(waiting)
                continue
            while queue and queue[0].is_done:
                job = queue.popleft()
                yield job.task, job.answer

    def _hand_out(self, waiting: deque[_Job]) -> None:
        while waiting:
            idle = next((child for child in self._children if child.job is None), None)
            if idle is None:
                if len(self._children) == self._workers:
                    return
                idle = _start(self._module)
                self._children.append(idle)
            idle.job = waiting.popleft()
            idle.job.attempts += 1
            idle.patience = Patience(idle.process.pid, self._timeout_s)
            try:
                idle.pipe.send(idle.job.task)
            except BrokenPipeError:
                self._lost(idle, Reason.CRASHED, waiting)

    def _collect(self, waiting: deque[_Job]) -> None:
        """Wait for any child to answer, die or run out of time."""
        busy = [child for child in self._children if child.job is not None]
        ready = set(wait([child.pipe for child in busy], min(1.0, self._timeout_s / 4)))
        for child in busy:
            assert child.job is not None
            assert child.patience is not None
            if child.pipe in ready:
                try:
                    child.job.answer = child.pipe.recv()
                except (EOFError, ConnectionResetError):
                    self._lost(child, Reason.CRASHED, waiting)
                    continue
                child.job.is_done, child.job = True, None
                child.done += 1
                if child.done >= TASKS_PER_CHILD:
                    self._retire(child)
            elif child.patience.is_over():
                self._lost(child, Reason.TIMED_OUT, waiting)

    def _retire(self, child: _Child) -> None:
        _end(child)
        self._children.remove(child)

    def _lost(self, child: _Child, reason: Reason, waiting: deque[_Job]) -> None:
        """A child is gone or must go: give its task one more chance; the machine may be overloaded."""
        job = child.job
        assert job is not None
        if reason is Reason.CRASHED:
            code = _exit_code(child)
            if code == 1:
                message = _errors(child)
                self._retire(child)
                raise RuntimeError(f"{self._module} failed on {job.task}:\n{message}")
            if code in (-signal.SIGKILL, -signal.SIGTERM) and job.kills < KILLS:
                job.kills, job.attempts = job.kills + 1, job.attempts - 1
        self._retire(child)
        if job.attempts < 2:
            waiting.appendleft(job)
            return
        detail = (
            f"after {self._timeout_s:g} s, twice"
            if reason is Reason.TIMED_OUT
            else "the decoder or encoder crashed twice"
        )
        job.answer, job.is_done = Refused(reason, detail), True


_END: Any = object()


def _start(module: str) -> _Child:
    ours, theirs = Pipe()
    errors = os.memfd_create("errors")
    process = subprocess.Popen(
        [sys.executable, "-m", "vjepa_data.media.pool", module, str(theirs.fileno()), str(os.getpid())],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        start_new_session=True,  # Ctrl-C is the parent's to handle, and the whole group can be killed
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
    )
    theirs.close()
    return _Child(process, ours, errors)


def _exit_code(child: _Child) -> int:
    """How a child ended whose pipe is closed: soon, unless threads of a decoder keep it from going."""
    try:
        return child.process.wait(LEAVE_S)
    except subprocess.TimeoutExpired:
        child.process.kill()
        return child.process.wait()


def _end(child: _Child) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.process.pid, signal.SIGKILL)
    child.process.wait()
    child.pipe.close()
    os.close(child.errors)


def _errors(child: _Child) -> str:
    size = os.fstat(child.errors).st_size
    return os.pread(child.errors, 20_000, max(0, size - 20_000)).decode(errors="replace")


def main() -> None:
    """Be a child: work until the pipe closes or the parent dies."""
    module, pipe_fd, parent = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    die_with_parent(parent)  # not even kill -9 of it leaves us behind
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_GIB << 30, MEMORY_GIB << 30))
    work = importlib.import_module(module).work
    pipe = Connection(pipe_fd)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            answer = work(task)
        except Refused as refusal:
            answer = refusal
        except MemoryError:
            answer = Refused(Reason.TOO_LARGE, f"needs more than {MEMORY_GIB} GiB")
        pipe.send(answer)


if __name__ == "__main__":
    main()
