"""When the stream must be spoken about, or stopped: rejected samples and stalls."""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from vjepa_data.reader.batch import Batch, RejectedSample
from vjepa_data.settings import BadInput

log = logging.getLogger(__name__)

WATCHED_DRAWS = 10_000  # draws over which the share of rejected samples is taken
FEWEST_DRAWS = 1_000  # a share of fewer says little: one bad clip in the first batch is no reason to stop


class TooManyRejects(BadInput):
    """So much of the data is bad that going on would train on something else than was asked for."""


class RejectLog:
    """The record of rejected samples, and the rule that stops a run when there are too many."""

    def __init__(self, max_share: float, folder: Path | None, rank: int) -> None:
        self.max_share = max_share
        self.path = None
        if folder is not None:
            self.path = folder / ("rejected.jsonl" if rank == 0 else f"rejected-{rank:05d}.jsonl")
        self.total = 0
        self._recent: deque[tuple[int, int]] = deque()
        self._draws = self._bad = 0

    def add(self, batch: Batch) -> None:
        """Record what a batch rejected.

        Raises:
            TooManyRejects: the share over the last 10,000 draws (of at least 1,000) is too large.
        """
        draws, bad = len(batch) + len(batch.rejected), len(batch.rejected)
        self._recent.append((draws, bad))
        self._draws, self._bad, self.total = self._draws + draws, self._bad + bad, self.total + bad
        while self._draws - self._recent[0][0] >= WATCHED_DRAWS:
            old = self._recent.popleft()
            self._draws, self._bad = self._draws - old[0], self._bad - old[1]
        if bad:
            self._write(batch.rejected)
        if self._bad > self.max_share * max(self._draws, FEWEST_DRAWS):
            last = batch.rejected[-1]
            raise TooManyRejects(
                f"{self._bad} of the last {self._draws} samples cannot be used, more than data.rejects.max_share "
                f"({self.max_share:g}) allows; the last is {last.key} in {last.shard}: {last.detail}; check the data "
                "with `vjepa verify`, or allow more"
            )

    def _write(self, rejected: tuple[RejectedSample, ...]) -> None:
        for r in rejected:
            log.warning(
                "rejected %s in %s at step %d slot %d: %s (%s)", r.key, r.shard, r.step, r.slot, r.reason, r.detail
            )
        if self.path is None:
            return
        lines = "".join(json.dumps({"time": time.time(), **r.__dict__}) + "\n" for r in rejected)
        with open(self.path, "a") as out:
            out.write(lines)


class LoaderWatchdog:
    """Tells when something takes too long: `with watchdog: wait()`. One thread, asleep nearly always."""

    def __init__(self, limit_s: float, tell: Callable[[float], None]) -> None:
        self.limit_s, self.tell = limit_s, tell
        self._since: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="loader watchdog", daemon=True)
        self._thread.start()

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._since = None

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        told = None
        while not self._closed.wait(min(1.0, self.limit_s / 4)):
            since = self._since
            if since is not None and since != told and (waited := time.monotonic() - since) > self.limit_s:
                told = since
                self.tell(waited)
