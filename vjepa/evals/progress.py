"""Progress of long commands, on stderr."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

LOG_EVERY_S = 30.0

T = TypeVar("T")


@contextmanager
def progress_bar(text: str, total: int, *, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Give a function that reports how many more items are done.

    A terminal shows a bar with the remaining time. Elsewhere, as in the log of a job, a line is logged every 30 s.

    Args:
        text: the work, for instance `encode 24 videos`.
        total: number of items.
        show: false on all ranks but the first.
    """
    console = Console(stderr=True)
    if not show or not total:
        yield lambda count: None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(text, total=total)
            yield lambda count: bar.advance(task, count)
    else:
        yield _logged(text, total)


def track(items: Iterable[T], text: str, total: int, *, show: bool = True) -> Iterator[T]:
    """Yield the items and show how many are done."""
    with progress_bar(text, total, show=show) as advance:
        for item in items:
            yield item
            advance(1)


def _logged(text: str, total: int) -> Callable[[int], None]:
    done, logged_s = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, logged_s
        done += count
        if time.monotonic() - logged_s > LOG_EVERY_S:
            log.info("%s: %d of %d", text, done, total)
            logged_s = time.monotonic()

    return advance
