"""The supervisor and ranks that stall."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vjepa_launch import supervisor

IGNORES_ABORT = """
import pathlib, signal, sys, time
signal.signal(signal.SIGABRT, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""


def test_a_rank_suspended_with_its_supervisor_does_not_stall(tmp_path: Path) -> None:
    heartbeat = tmp_path / "metrics.jsonl"
    heartbeat.touch()
    (rank,) = supervisor.start([sys.executable, "-c", "import time; time.sleep(3)"], {0: os.environ}, {})
    # Suspend both processes, as SLURM suspends a job, for longer than a stall may last.
    pids = f"{os.getpid()} {rank.process.pid}"
    script = f"sleep 0.5; kill -STOP {pids}; sleep 6; kill -CONT {pids}"
    waker = subprocess.Popen(["sh", "-c", script], start_new_session=True)
    (rank_exit,) = supervisor.supervise([rank], set(), heartbeat=heartbeat, stall_s=5)
    waker.wait()
    assert (rank_exit.code, rank_exit.reason) == (0, "exit code 0")


def test_a_stalled_rank_that_ignores_abort_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "GRACE_S", 0.2)
    heartbeat = tmp_path / "metrics.jsonl"
    (rank,) = supervisor.start([sys.executable, "-c", IGNORES_ABORT, str(heartbeat)], {0: os.environ}, {})
    while not heartbeat.exists():
        assert rank.process.poll() is None
    (rank_exit,) = supervisor.supervise([rank], set(), heartbeat=heartbeat, stall_s=0.5)
    assert rank_exit.code == -9
    assert "no progress" in rank_exit.reason


def test_the_heartbeat_is_looked_at_rarely_and_before_a_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heartbeat, looks, now = tmp_path / "metrics.jsonl", [], 0.0
    heartbeat.touch()
    honest = supervisor._modification_time
    monkeypatch.setattr(supervisor, "_modification_time", lambda path: looks.append(now) or honest(path))
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now)
    clock, watched_elsewhere = supervisor._ProgressClock(heartbeat, 100.0), supervisor._ProgressClock(None, 100.0)
    looks.clear()
    while now < 200:
        now += supervisor.POLL_S
        if abs(now - 99.0) < supervisor.POLL_S / 2:  # after the last regular look before the verdict
            os.utime(heartbeat, (1.0, 1.0))
        assert clock.quiet_s(now) <= 101
        assert watched_elsewhere.quiet_s(now) == 0
    assert 9 <= len(looks) <= 12
    now += 101
    quiet_s = [clock.quiet_s(now + second) for second in range(1, 102)]
    assert quiet_s[-1] > 100
