"""A watchdog for the wait for a batch."""

import threading
import time
from collections.abc import Callable


class LoaderWatchdog:
    """Reports a wait that takes too long: `with watchdog: wait()`. It runs a thread, which sleeps nearly always."""

    def __init__(self, limit_s: float, report: Callable[[float], None]) -> None:
        """Start the thread.

        Args:
            limit_s: longest wait, in seconds.
            report: called once per wait that is longer, with the seconds waited so far.
        """
        self.limit_s, self.report = limit_s, report
        self._since: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="loader watchdog", daemon=True)
        self._thread.start()

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._since = None

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        reported = None
        while not self._closed.wait(min(1.0, self.limit_s / 4)):
            since = self._since
            if since is not None and since != reported and (waited := time.monotonic() - since) > self.limit_s:
                reported = since
                self.report(waited)
