"""Open untrusted files in a pool of child processes that can be killed.

    parent                       child
    WorkerPool.map  -- task -->  MODULE.work(task)
                    <-- answer -- or a Refused, or nothing within the time budget: the child is killed and replaced

A child that fails, crashes or hangs costs its task, never the build. The time budget counts silence: every heartbeat
of the child (`child_process.heartbeat`) renews it, so that work on a long video is not mistaken for a hang. Answers
come in the order of the tasks, so nothing downstream depends on the number of children.
"""

import importlib
import itertools
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, TypeVar

from vjepa_data.child_process import ChildFailed, ChildProcess
from vjepa_data.media.video import Reason, Refused

Task = TypeVar("Task")
Answer = TypeVar("Answer")

TASKS_PER_CHILD = 2000
"""Tasks after which a child is replaced. Decoders that fail to open a file leak (decord 0.6: up to 160 KB each)."""

MAX_OUTSIDE_KILLS = 5
"""Kills of its child from outside (out of memory, a scheduler, a user) that a task may survive."""

MEMORY_GIB = 8
"""Address space of a child. A file that needs more fails in its child alone."""


class WorkerPool(Generic[Task, Answer]):
    """A few children that run `work(task)` of a module, each driven by its own thread.

    Args:
        module: name of the module. Its `work` must be a function of its task and raise `Refused` for bad input.
        workers: number of children.
        timeout_s: time budget of a task between two heartbeats, in seconds of work or sleep.
    """

    def __init__(self, module: str, *, workers: int, timeout_s: float) -> None:
        self._module, self._workers, self._timeout_s = module, workers, timeout_s
        self._threads = ThreadPoolExecutor(workers, "worker pool")
        self._lock, self._is_closed = threading.Lock(), False
        self._children: dict[int, ChildProcess] = {}
        """By the thread that drives it."""

    def __enter__(self) -> "WorkerPool[Task, Answer]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._is_closed = True
            for child in self._children.values():
                child.kill()
        self._threads.shutdown(cancel_futures=True)
        for child in self._children.values():
            child.close()

    def map(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Answer | Refused]]:
        """Run the tasks a few ahead of the consumer, and yield tasks and answers in order.

        Raises:
            RuntimeError: the child does not start or lacks a package. The message is its traceback.
        """
        source = iter(tasks)
        ahead: deque[tuple[Task, Future[Any]]] = deque()
        while True:
            for task in itertools.islice(source, 4 * self._workers - len(ahead)):
                ahead.append((task, self._threads.submit(self._run, task)))
            if not ahead:
                return
            task, answer = ahead.popleft()
            yield task, answer.result()

    def _run(self, task: Task) -> Answer | Refused:
        """Run a task, once more if its child fails: the machine may have been overloaded."""
        attempts = kills = 0
        while True:
            child = self._child()
            child.send(task)
            try:
                answer = child.wait(self._timeout_s)
            except ChildFailed as failure:
                reason = failure.reason
            else:
                if child.served >= TASKS_PER_CHILD:
                    self._remove(child)
                if isinstance(answer, ImportError):
                    raise RuntimeError(f"{self._module} lacks a package: {answer}; run `vjepa doctor`")
                return answer
            code = child.exit_code() if reason == "crash" else None
            output = child.output()
            self._remove(child)
            if code == 1 and not child.is_ready:
                raise RuntimeError(f"{self._module} does not start:\n{output}")
            if code == -signal.SIGKILL and kills < MAX_OUTSIDE_KILLS:
                kills += 1
                continue
            attempts += 1
            if attempts == 2 and reason == "timeout":
                return Refused(Reason.TIMED_OUT, f"no progress for {self._timeout_s:g} s, twice")
            if attempts == 2:
                return Refused(Reason.CRASHED, "the decoder or encoder crashed twice")

    def _child(self) -> ChildProcess:
        """Return the child of this thread, started if there is none."""
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the worker pool is closed")
            thread = threading.get_ident()
            if thread not in self._children:
                self._children[thread] = ChildProcess(
                    f"{__name__}:task_service", self._module, memory_bytes=MEMORY_GIB << 30
                )
            return self._children[thread]

    def _remove(self, child: ChildProcess) -> None:
        with self._lock:
            del self._children[threading.get_ident()]
        child.close()


def task_service(module: str) -> Callable[[Any], Any]:
    """Make the function that answers tasks in a child."""
    return guarded(importlib.import_module(module).work)


def guarded(work: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a function that answers with the exceptions of `work`, named as reasons, instead of raising them."""

    def answer(task: Any) -> Any:
        try:
            return work(task)
        except Refused as refusal:
            return refusal
        except ImportError as error:  # of the installation, not of the file
            return error
        except MemoryError:
            return Refused(Reason.TOO_LARGE, f"needs more than {MEMORY_GIB} GiB")
        except Exception as error:  # noqa: BLE001 - files can break any library in unlisted ways
            return Refused(Reason.CRASHED, _failure(error))

    return answer


def _failure(error: Exception) -> str:
    """Name the type and the place of an exception. Its message may hold local paths, so it is left out."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "vjepa_data" in frame.filename]
    place = f" in {frames[-1].filename.rpartition('vjepa_data')[2].lstrip('/')}, {frames[-1].name}" if frames else ""
    return f"{type(error).__name__}{place}; please report it"
