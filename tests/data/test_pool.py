"""A child that hangs, crashes or fails costs its task and nothing else."""

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from vjepa_data import child_process
from vjepa_data.child_process import ChildFailed, ChildProcess
from vjepa_data.media.pool import WorkerPool
from vjepa_data.media.video import Reason, Refused

WORK = """
import os, signal, time
from vjepa_data.child_process import heartbeat
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
    if kind == "killed":
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
    if kind == "detach":
        os.closerange(3, 100)
        time.sleep(1000)
    if kind == "import":
        import no_such_package
    if kind == "beating":
        for _ in range(int(value) * 10):
            time.sleep(0.1)
            heartbeat()
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


def test_answers_come_in_the_order_of_tasks(module: str) -> None:
    tasks = ["slow:0.3", *(f"t{number}" for number in range(30))]
    assert answers(module, tasks) == ["slow", *(f"t{number}" for number in range(30))]


def test_a_failure_affects_only_its_task(module: str, tmp_path: Path) -> None:
    tasks = ["a", "crash", "b", f"once:{tmp_path}/mark", "refuse", "memory", "c"]
    assert answers(module, tasks) == ["a", "crashed", "b", "once", "damaged", "too_large", "c"]


def test_a_task_survives_kills_of_its_child_from_outside(module: str, tmp_path: Path) -> None:
    assert answers(module, ["a", f"killed:{tmp_path}/kills", "b"]) == ["a", "killed", "b"]
    assert (tmp_path / "kills").read_text() == "xxxxx"


def test_a_hanging_child_is_killed_in_time(module: str) -> None:
    begin = time.monotonic()
    assert answers(module, ["a", "hang", "b"], timeout_s=3.0) == ["a", "timed_out", "b"]
    assert time.monotonic() - begin < 30


def test_an_exception_costs_its_task_and_names_its_type(module: str) -> None:
    with WorkerPool[str, str](module, workers=1, timeout_s=30) as pool:
        (_, bug), (_, other) = pool.map(["bug", "b"])
    assert isinstance(bug, Refused)
    assert bug.reason is Reason.CRASHED
    assert "ZeroDivisionError" in bug.detail
    assert other == "b"


def test_a_missing_package_ends_the_build(module: str) -> None:
    with pytest.raises(RuntimeError, match="no_such_package"):
        answers(module, ["a", "import", "b"])


def test_heartbeats_renew_the_time_budget(module: str) -> None:
    assert answers(module, ["beating:4"], workers=1, timeout_s=1.5) == ["beating"]


def test_leaving_the_pool_early_ends_its_children(module: str) -> None:
    with WorkerPool[str, str](module, workers=2, timeout_s=30) as pool:
        _, first = next(pool.map(f"who:{number}" for number in range(1000)))
        assert isinstance(first, str)
        pid = int(first.split()[-1])
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_only_a_few_tasks_are_taken_ahead(module: str) -> None:
    taken = 0

    def tasks():
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield f"t{number}"

    with WorkerPool[str, str](module, workers=2, timeout_s=30) as pool:
        next(pool.map(tasks()))
    assert taken <= 10


def test_a_refusal_keeps_its_reason_and_detail(module: str) -> None:
    with WorkerPool[str, str](module, workers=1, timeout_s=30) as pool:
        [(_, answer)] = pool.map(["refuse"])
    assert isinstance(answer, Refused)
    assert (answer.reason, answer.detail) == (Reason.DAMAGED, "no")


def test_a_child_that_stays_after_closing_its_connection_is_killed(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_process, "EXIT_TIMEOUT_S", 0.1)
    child = ChildProcess("vjepa_data.media.pool:task_service", module)
    child.send("detach")
    with pytest.raises(ChildFailed, match="crash"):
        child.wait(30)
    assert child.exit_code() == -9
    child.close()


def test_threads_of_the_pool_end_with_it(module: str) -> None:
    before = threading.active_count()
    answers(module, ["a", "b", "c"])
    assert threading.active_count() == before
