"""The record of rejected samples, and the limits at which a run stops."""

import json
import logging
import time
from collections import deque
from pathlib import Path

from vjepa_data.errors import BadInput
from vjepa_data.reader.batch import Batch, RejectedSample

log = logging.getLogger(__name__)

WATCHED_DRAWS = 10_000  # draws over which the fraction of rejected samples is computed
FEWEST_DRAWS = 1_000  # smallest denominator, so that one bad clip in the first batch does not stop a run


class TooManyRejects(BadInput):
    """So many samples are unreadable that the run would train on other data than it was given."""


class RejectLog:
    """Records rejected samples and stops a run that has too many."""

    def __init__(self, max_share: float, folder: Path | None, rank: int) -> None:
        self.max_share = max_share
        self.path = None
        if folder is not None:
            self.path = folder / ("rejected.jsonl" if rank == 0 else f"rejected-{rank:05d}.jsonl")
        self.total = 0
        self._recent: deque[tuple[int, int]] = deque()
        self._draws = self._bad = 0

    def add(self, batch: Batch) -> None:
        """Record the rejected samples of a batch.

        Raises:
            TooManyRejects: their fraction of the last 10,000 draws (of at least 1,000) is too large.
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
                f"{self._bad} of the last {self._draws} samples are unreadable, more than data.rejects.max_share "
                f"({self.max_share:g}) allows, the last is {last.key} in {last.shard} ({last.detail}). Check the data "
                "with `vjepa verify`, or raise data.rejects.max_share."
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
