"""Show the progress of long work: a bar on a terminal, else a log line now and then."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

log = logging.getLogger(__name__)

LOG_EVERY_S = 30.0

T = TypeVar("T")


class Progress:
    """Units that are done, and units in total once they are known.

    Callbacks of the data room report both numbers: `progress(done, total)`.
    """

    def __init__(self, text: str, total: int | None) -> None:
        self.text, self.done, self.total = text, 0, total
        self._began_s = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        self._show()

    def advance(self, count: int = 1) -> None:
        """Report that `count` more units are done."""
        self.done += count
        self._show()

    def __str__(self) -> str:
        units = "" if self.total is None else f"{self.done} of {self.total} after "
        return f"{self.text}: {units}{time.monotonic() - self._began_s:.0f} s"

    def _show(self) -> None:
        """Redraw the line. A log needs no redrawing."""


class _Bar(Progress):
    """A line of the terminal's bars."""

    def __init__(self, text: str, total: int | None, bars: Bars) -> None:
        super().__init__(text, total)
        self.bars, self.task = bars, bars.add_task(text, total=total)

    def _show(self) -> None:
        self.bars.update(self.task, completed=self.done, total=self.total)


_bars: list[Bars] = []
"""The bars on the terminal. There is at most one set, and nested work adds a line to it."""


@contextlib.contextmanager
def progress(text: str, total: int | None = None, *, show: bool = True) -> Iterator[Progress]:
    """Show that `text` is under way, and how many units are done once they are reported.

    On a terminal a bar appears on standard error, with the elapsed time until the total is known. Elsewhere, as in the
    log of a job, a line is logged every 30 seconds, also while no unit is finished.

    Args:
        text: the work, for instance `encode 24 videos`.
        total: number of units, if it is known.
        show: false on all ranks but the first.
    """
    if not show or total == 0:
        yield Progress(text, total)
    elif _bars:
        yield from _line(text, total, _bars[0])
    elif sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars, _log_above(bars):
            yield from _line(text, total, bars)
    else:
        yield from _log_now_and_then(Progress(text, total))


def track(items: Iterable[T], text: str, total: int, *, show: bool = True) -> Iterator[T]:
    """Yield the items and show how many are done."""
    with progress(text, total, show=show) as bar:
        for item in items:
            yield item
            bar.advance()


def _line(text: str, total: int | None, bars: Bars) -> Iterator[Progress]:
    """Add a line to the bars, which stays there when the work is over."""
    yield _Bar(text, total, bars)


def _log_now_and_then(state: Progress) -> Iterator[Progress]:
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(LOG_EVERY_S):
            log.info("%s", state)

    thread = threading.Thread(target=repeat, name="progress", daemon=True)
    thread.start()
    try:
        yield state
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def _log_above(bars: Bars) -> Iterator[None]:
    """Let lines of the log appear above the bars, through the standard error that rich puts in place."""
    handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.StreamHandler)]
    earlier = [handler.setStream(sys.stderr) for handler in handlers]
    _bars.append(bars)
    try:
        yield
    finally:
        _bars.clear()
        for handler, stream in zip(handlers, earlier, strict=True):
            if stream is not None:
                handler.setStream(stream)
