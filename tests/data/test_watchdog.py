"""A watchdog reports work that makes no progress, once, and nothing else."""

import logging
import threading
import time
from collections.abc import Callable

import pytest

from vjepa_data.watchdog import Alarm, Watchdog


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_alarms_are_called_in_order_and_once_for_each_wait() -> None:
    calls: list[str] = []
    alarms = [Alarm(0.04, lambda _: calls.append("warn")), Alarm(0.08, lambda _: calls.append("end"))]
    dog = Watchdog(alarms, name="dog")
    dog.beat()
    wait_for(lambda: len(calls) == 2)
    time.sleep(0.1)
    assert calls == ["warn", "end"]
    dog.beat()
    wait_for(lambda: len(calls) == 4)
    dog.close()


def test_no_alarm_is_due_at_rest() -> None:
    called = threading.Event()
    dog = Watchdog([Alarm(0.02, lambda _: called.set())], name="dog")
    assert not called.wait(0.1)
    dog.beat()
    assert called.wait(20)
    called.clear()
    dog.beat()
    dog.rest()
    assert not called.wait(0.1)
    dog.close()


def test_an_alarm_that_fails_does_not_silence_the_next(caplog: pytest.LogCaptureFixture) -> None:
    def fail(quiet_s: float) -> None:
        raise OSError("No space left on device")

    called = threading.Event()
    dog = Watchdog([Alarm(0.02, fail), Alarm(0.04, lambda _: called.set())], name="dog")
    with caplog.at_level(logging.ERROR):
        dog.beat()
        assert called.wait(20)
    dog.close()
    assert "dog: cannot report 0 s without progress: No space left on device" in caplog.text


def test_an_hour_of_suspension_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    called, clock = threading.Event(), iter(range(0, 10**9, 4000))
    dog = Watchdog([Alarm(60.0, lambda _: called.set())], name="dog")
    with monkeypatch.context() as patch:
        patch.setattr("time.monotonic", lambda: float(next(clock)))
        dog.beat()
        assert not called.wait(0.05)
    dog.close()
