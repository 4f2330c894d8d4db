"""What a supervisor does with a process that does not do as it is told."""

import os
import sys
from pathlib import Path

import pytest

from vjepa_launch import children
from vjepa_launch.children import Heard

STUBBORN = """
import pathlib, signal, sys, time
signal.signal(signal.SIGABRT, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""


def test_what_hangs_and_gives_no_stacks_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "ECHO_S", 0.2)
    heard = Heard.__new__(Heard)  # no handlers in the process of the tests
    heard.signals = set()
    alive = tmp_path / "metrics.jsonl"
    started = children.start([sys.executable, "-c", STUBBORN, str(alive)], {0: os.environ}, {})
    while not alive.exists():
        assert started[0].process.poll() is None
    (ended,) = children.wait(started, heard, alive=alive, stall_s=0.5)
    assert ended.code == -9
    assert "no progress" in ended.reason
