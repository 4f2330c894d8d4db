"""Long work is shown as a bar on a terminal, and in a log as a line now and then."""

import io
import logging
import sys
import time

import pytest

from vjepa import progress as module
from vjepa.progress import progress, track


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Replace standard error by a terminal. A fixture would do so before pytest's capture does."""
    made = io.StringIO()
    monkeypatch.setattr(made, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", made)
    return made


def wait_for_line(caplog: pytest.LogCaptureFixture, text: str) -> None:
    deadline = time.monotonic() + 20
    while not any(text in message for message in caplog.messages):
        assert time.monotonic() < deadline, caplog.messages
        time.sleep(0.01)


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "LOG_EVERY_S", 0.02)
    with caplog.at_level(logging.INFO), progress("reading") as bar:
        wait_for_line(caplog, "reading: 0 s")
        bar(1, 4)
        bar.advance()
        wait_for_line(caplog, "reading: 2 of 4 after 0 s")


def test_short_work_leaves_the_log_empty(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert list(track("abc", "reading", 3)) == ["a", "b", "c"]
    assert not caplog.messages


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    with progress("reading") as bar:
        bar(1, 4)
    assert "reading" in terminal.getvalue()
    assert "1/4" in terminal.getvalue()


def test_work_inside_other_work_adds_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    with progress("evaluating"), progress("encode", 20) as inner:
        inner.advance(8)
    assert "evaluating" in terminal.getvalue()
    assert "8/20" in terminal.getvalue()


def test_other_ranks_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    with progress("encode", 20, show=False) as bar:
        bar.advance(8)
    assert not terminal.getvalue()
