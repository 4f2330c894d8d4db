"""Children that hang, crash or fail cost their task and nothing else."""

import os
import sys
import time
from pathlib import Path

import pytest

from vjepa_data.media.pool import WorkerPool
from vjepa_data.media.video import Reason, Refused

WORK = """
import os, signal, time
from vjepa_data.media.video import Reason, Refused
def work(task):
    kind, _, value = task.partition(":")
    if kind == "hang":
        time.sleep(1000)
    if kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "once" and not os.path.exists(value):
        open(value, "w").close()
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "shot":
        with open(value, "a") as file:
            file.write("x")
        if os.path.getsize(value) <= 4:
            os.kill(os.getpid(), signal.SIGKILL)
    if kind == "memory":
        return len(bytearray(20 << 30))
    if kind == "refuse":
        raise Refused(Reason.DAMAGED, "no")
    if kind == "bug":
        raise ZeroDivisionError("ours")
    if kind == "slow":
        time.sleep(float(value))
    return f"{kind} in {os.getpid()}" if kind == "who" else kind
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "work_of_a_test.py").write_text(WORK)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    return "work_of_a_test"


def answers(module: str, tasks: list[str], *, workers: int = 2, timeout_s: float = 30.0) -> list[str]:
    with WorkerPool[str, str](module, workers=workers, timeout_s=timeout_s) as pool:
        return [a.reason.value if isinstance(a, Refused) else a for _, a in pool.map(tasks)]


def test_answers_come_in_the_order_of_the_tasks(module: str) -> None:
    tasks = ["slow:0.3", *(f"t{number}" for number in range(30))]
    assert answers(module, tasks) == ["slow", *(f"t{number}" for number in range(30))]


def test_each_kind_of_trouble_costs_its_task_alone(module: str, tmp_path: Path) -> None:
    tasks = ["a", "crash", "b", f"once:{tmp_path}/mark", "refuse", "memory", "c"]
    assert answers(module, tasks) == ["a", "crashed", "b", "once", "damaged", "too_large", "c"]


def test_a_child_that_somebody_else_kills_is_not_its_task_s_fault(module: str, tmp_path: Path) -> None:
    assert answers(module, ["a", f"shot:{tmp_path}/shots", "b"]) == ["a", "shot", "b"]
    assert (tmp_path / "shots").read_text() == "xxxxx"


def test_a_child_that_hangs_is_killed_in_time(module: str) -> None:
    begin = time.monotonic()
    assert answers(module, ["a", "hang", "b"], timeout_s=3.0) == ["a", "timed_out", "b"]
    assert time.monotonic() - begin < 30


def test_a_bug_of_ours_stops_the_build_with_its_traceback(module: str) -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError: ours"):
        answers(module, ["a", "bug"])


def test_children_are_gone_when_the_pool_is_left_half_way(module: str) -> None:
    with WorkerPool[str, str](module, workers=2, timeout_s=30) as pool:
        _, first = next(pool.map(f"who:{number}" for number in range(1000)))
        assert isinstance(first, str)
        pid = int(first.split()[-1])
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_no_more_tasks_are_taken_than_can_be_worked_on_soon(module: str) -> None:
    taken = 0

    def tasks():
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield f"t{number}"

    with WorkerPool[str, str](module, workers=2, timeout_s=30) as pool:
        next(pool.map(tasks()))
    assert taken <= 10


def test_a_refusal_crosses_the_pipe_whole(module: str) -> None:
    with WorkerPool[str, str](module, workers=1, timeout_s=30) as pool:
        [(_, answer)] = pool.map(["refuse"])
    assert isinstance(answer, Refused)
    assert (answer.reason, answer.detail) == (Reason.DAMAGED, "no")
