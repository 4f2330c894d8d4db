"""When a run must not simply go on: numbers that are not finite, spikes, collapse, and steps that never end."""

import faulthandler
import logging
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vjepa.config import Health

log = logging.getLogger(__name__)

HISTORY = 200
WATCHED = ("monitor/rankme", "monitor/std")


class Unhealthy(RuntimeError):
    """The last steps went wrong; going on from the newest checkpoint may help."""


class Collapsed(RuntimeError):
    """The features lost their variety; going on will not help."""


class Nurse:
    """Reads the record as it is written and says when something is wrong. Alike on all ranks, as the record is."""

    def __init__(self, settings: Health, alert: Callable[[str, str], None]) -> None:
        self.settings, self._alert = settings, alert
        self._bad = 0
        self._losses: deque[float] = deque(maxlen=HISTORY)
        self._highest: dict[str, float] = {}
        self._warned: set[str] = set()

    def check(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Look at the lines of the last steps.

        Raises:
            Unhealthy: too many steps in a row were skipped, or had a loss far above the ones before.
            Collapsed: by setting, when a monitor of collapse fell far below what it was.
        """
        for record in records:
            what = self._complaint(record)
            self._bad = self._bad + 1 if what else 0
            if what and self._bad == 1:
                self._alert("a bad step", f"step {record['step']}: {what}")
            if what and self._bad >= self.settings.max_skipped_in_a_row:
                raise Unhealthy(f"step {record['step']} is the last of {self._bad} bad ones in a row: {what}")
            self._watch_collapse(record)

    def _complaint(self, record: Mapping[str, Any]) -> str | None:
        loss = record["loss/prediction"]
        if not record["optim/applied"]:
            return f"loss {loss}, gradient norm {record['optim/grad_norm']}; skipped on all ranks"
        usual = statistics.median(self._losses) if len(self._losses) >= HISTORY // 10 else None
        if usual and self.settings.max_loss_ratio and loss > self.settings.max_loss_ratio * usual:
            return f"loss {loss:.4g} is {loss / usual:.1f} times the usual {usual:.4g}"
        self._losses.append(loss)
        return None

    def _watch_collapse(self, record: Mapping[str, Any]) -> None:
        for name in WATCHED:
            if name not in record:
                continue
            value, highest = record[name], max(record[name], self._highest.get(name, 0.0))
            self._highest[name] = highest
            if value >= self.settings.collapse_share * highest:
                self._warned.discard(name)
                continue
            text = (
                f"step {record['step']}: {name} fell to {value:.4g}, from {highest:.4g}; "
                f"try a lower optim.lr or a higher optim.ema"
            )
            if self.settings.on_collapse == "stop":
                raise Collapsed(text)
            if name not in self._warned:
                self._warned.add(name)
                self._alert("features collapse", text)


class Watchdog:
    """A thread that notices when steps stop coming, and writes down what every thread was doing."""

    def __init__(self, settings: Health, folder: Path, rank: int) -> None:
        self._settings, self._rank = settings, rank
        self._file = folder / "stacks" / f"rank_{rank:05d}.txt"
        self._last_s, self._doing, self._steps = time.monotonic(), "starting", 0
        self._dumped = False
        self._over = threading.Event()

    def beat(self, doing: str, *, step: int | None = None) -> None:
        """Say that there is progress, and what comes next."""
        self._last_s, self._doing, self._dumped = time.monotonic(), doing, False
        self._steps += step is not None

    def watch(self) -> None:
        """The thread's work, until it is over."""
        settings = self._settings
        stall_s = settings.stall_s
        while not self._over.wait(min(1.0, settings.stall_s / 4)):
            quiet_s = time.monotonic() - self._last_s
            stall_s = settings.stall_s if self._steps else 10 * settings.stall_s
            if quiet_s > stall_s and not self._dumped:
                self._dump(quiet_s)
            if quiet_s > max(settings.hang_s, stall_s):
                log.error("rank %d: no step for %.0f s while %s; ending", self._rank, quiet_s, self._doing)
                os._exit(1)

    def _dump(self, quiet_s: float) -> None:
        self._dumped = True
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            file.write(f"\n{time.ctime()}: rank {self._rank}, {quiet_s:.0f} s without a step while {self._doing}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        log.warning(
            "rank %d: no step for %.0f s while %s; stacks are in %s", self._rank, quiet_s, self._doing, self._file
        )

    def stop(self) -> None:
        """End the thread."""
        self._over.set()


@contextmanager
def watchdog(settings: Health, folder: Path, rank: int) -> Iterator[Watchdog]:
    """Watch over the block."""
    dog = Watchdog(settings, folder, rank)
    thread = threading.Thread(target=dog.watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield dog
    finally:
        dog.stop()
        thread.join()
