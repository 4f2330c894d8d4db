"""What a supervisor does with a process that does not do as it is told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vjepa_launch import supervisor
from vjepa_launch.supervisor import StopSignals

STUBBORN = """
import pathlib, signal, sys, time
signal.signal(signal.SIGABRT, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""


def deaf() -> StopSignals:
    """What hears nothing: no handlers in the process of the tests."""
    heard = StopSignals.__new__(StopSignals)
    heard.signals = set()
    return heard


def test_what_was_suspended_together_with_its_supervisor_does_not_hang(tmp_path: Path) -> None:
    alive = tmp_path / "metrics.jsonl"
    alive.touch()
    started = supervisor.start([sys.executable, "-c", "import time; time.sleep(3)"], {0: os.environ}, {})
    # The two of us, as SLURM suspends a job: longer than a hang may last.
    wake = f"sleep 0.5; kill -STOP {os.getpid()} {started[0].process.pid}; sleep 6; kill -CONT {os.getpid()} "
    waker = subprocess.Popen(["sh", "-c", wake + str(started[0].process.pid)], start_new_session=True)
    (ended,) = supervisor.wait(started, deaf(), alive=alive, stall_s=5)
    waker.wait()
    assert (ended.code, ended.reason) == (0, "exit code 0")


def test_what_hangs_and_gives_no_stacks_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "ECHO_S", 0.2)
    alive = tmp_path / "metrics.jsonl"
    started = supervisor.start([sys.executable, "-c", STUBBORN, str(alive)], {0: os.environ}, {})
    while not alive.exists():
        assert started[0].process.poll() is None
    (ended,) = supervisor.wait(started, deaf(), alive=alive, stall_s=0.5)
    assert ended.code == -9
    assert "no progress" in ended.reason
