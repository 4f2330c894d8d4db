"""Show the progress of a verb: a bar on a terminal, else a log line now and then."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

Advance = Callable[[int, int], None]
"""Called with the units that are done and the units in total."""

LOG_EVERY_S = 30.0


@contextlib.contextmanager
def progress(text: str) -> Iterator[Advance]:
    """Show that `text` is under way, and how far it is once the returned function was called.

    On a terminal a bar appears on standard error. It shows the elapsed time until the total is known. Elsewhere a line
    is logged at most every 30 seconds, so that the log of a short job stays short.
    """
    if not sys.stderr.isatty():
        yield _Logger(text)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar, _log_above_the_bar():
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def _log_above_the_bar() -> Iterator[None]:
    """Log through the standard error that rich puts in place while its bar is shown."""
    handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.StreamHandler)]
    earlier = [handler.setStream(sys.stderr) for handler in handlers]
    try:
        yield
    finally:
        for handler, stream in zip(handlers, earlier, strict=True):
            if stream is not None:
                handler.setStream(stream)


class _Logger:
    """Log a line at most every `LOG_EVERY_S` seconds."""

    def __init__(self, text: str) -> None:
        self._text, self._started = text, time.monotonic()
        self._logged = self._started

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._logged >= LOG_EVERY_S:
            self._logged = now
            log.info("%s: %d of %d after %.0f s", self._text, done, total, now - self._started)
