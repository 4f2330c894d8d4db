"""Health checks: non-finite losses, spikes and collapse."""

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vjepa.config import Health

log = logging.getLogger(__name__)

HISTORY = 200
WATCHED = ("monitor/rankme", "monitor/std")


class Unhealthy(RuntimeError):
    """The last steps went wrong. Resuming from an earlier checkpoint may help."""

    def __init__(self, text: str, *, healthy: int, last: int) -> None:
        """Args:
        text: the fault.
        healthy: last step known to be healthy.
        last: updates made.
        """
        super().__init__(text)
        self.healthy, self.last = healthy, last


class Collapsed(RuntimeError):
    """The features collapsed, and the settings say to stop."""


class HealthMonitor:
    """Checks the records as they are written. The result is the same on all ranks, as the records are."""

    def __init__(self, settings: Health, alert: Callable[[str, str], None]) -> None:
        self.settings, self._alert = settings, alert
        self._bad = self._good = self._varied = 0
        self._losses: deque[float] = deque(maxlen=HISTORY)
        self._highest: dict[str, float] = {}
        self._warned: set[str] = set()

    def restore(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Restore the running statistics, so that collapse detection survives a restart.

        Args:
            records: result of `read_history`, equal on all ranks.
        """
        for record in records:
            if record.get("loss/total") is not None:
                self._losses.append(record["loss/total"])
            for name in WATCHED:
                if record.get(name) is not None:
                    self._highest[name] = max(record[name], self._highest.get(name, 0.0))
            self._good = self._varied = record["step"]

    def check(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Check the records of the last steps.

        Raises:
            Unhealthy: too many steps in a row were skipped, or had a loss far above the previous losses.
            Collapsed: a collapse monitor fell far below its earlier values, and the settings say to stop.
        """
        for record in records:
            what = self._complaint(record)
            self._bad, self._good = (self._bad + 1, self._good) if what else (0, record["step"])
            if what and self._bad == 1:
                self._alert("a bad step", f"step {record['step']}: {what}")
            if what and self._bad >= self.settings.max_skipped_in_a_row:
                text = f"step {record['step']} is the last of {self._bad} bad ones in a row: {what}"
                raise Unhealthy(text, healthy=self._good, last=record["step"])
            self._watch_collapse(record)

    def _complaint(self, record: Mapping[str, Any]) -> str | None:
        loss = record["loss/total"]
        if not record["optim/applied"]:
            return f"loss {loss}, gradient norm {record['optim/grad_norm']}; skipped on all ranks"
        usual = statistics.median(self._losses) if len(self._losses) >= HISTORY // 10 else None
        if usual and self.settings.max_loss_ratio and loss > self.settings.max_loss_ratio * usual:
            return f"loss {loss:.4g} is {loss / usual:.1f} times the usual {usual:.4g}"
        self._losses.append(loss)
        return None

    def _watch_collapse(self, record: Mapping[str, Any]) -> None:
        seen = [name for name in WATCHED if math.isfinite(record.get(name, math.nan))]
        for name in seen:
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
            if self.settings.on_collapse == "roll_back":
                raise Unhealthy(text, healthy=self._varied, last=record["step"])
            if name not in self._warned:
                self._warned.add(name)
                self._alert("features collapse", text)
        if seen and not self._warned:
            self._varied = record["step"]


def read_history(file: Path) -> list[dict[str, Any]]:
    """Read the history that a `HealthMonitor` needs: the collapse monitors of all steps and the last losses.

    Args:
        file: `metrics.jsonl`, up to the step from which the run resumes.
    """
    names = ("step", "loss/total", *WATCHED)
    found: list[dict[str, Any]] = []
    recent: deque[dict[str, Any]] = deque(maxlen=HISTORY)
    with file.open() as lines:
        for line in lines:
            record = json.loads(line)
            kept = {name: record[name] for name in names if name in record}
            if len(recent) == HISTORY and any(name in recent[0] for name in WATCHED):
                found.append(recent[0])
            recent.append(kept)
    return [*found, *recent]
