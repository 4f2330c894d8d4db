"""A watchdog: a thread that reports work which makes no progress for too long."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

log = logging.getLogger(__name__)

LONGEST_TICK_S = 1.0


@dataclass(frozen=True)
class Alarm:
    """A call that is due after some time without progress, once in that time."""

    after_s: float
    call: Callable[[float], None]
    """Called in the watchdog's thread with the seconds without progress. An OSError or ValueError is logged."""


class Watchdog:
    """Calls alarms when the time between two beats is too long. Its thread sleeps most of the time.

        dog = Watchdog([Alarm(60, warn), Alarm(3600, end)], name="step")
        dog.beat()      # the work begins, or makes progress
        dog.rest()      # the work is over

    Time during which the process is suspended does not count, because the thread adds up its own pauses.
    """

    def __init__(self, alarms: Sequence[Alarm], *, name: str) -> None:
        """Start the thread. No alarm is due before the first beat."""
        self.alarms = alarms
        """May be replaced. The new alarms count from the next beat."""
        self._beats, self._is_resting = 0, True  # written by the caller's thread alone
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=name, daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Report progress."""
        self._beats += 1
        self._is_resting = False

    def rest(self) -> None:
        """Expect no progress until the next beat."""
        self._is_resting = True

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        beats, quiet_s, alarms, tick_s = 0, 0.0, list(self.alarms), 0.0
        while not self._closed.wait(tick_s := min(LONGEST_TICK_S, *(alarm.after_s / 4 for alarm in self.alarms))):
            if self._beats != beats:
                beats, quiet_s, alarms = self._beats, 0.0, list(self.alarms)
            quiet_s += tick_s
            for alarm in [] if self._is_resting else [alarm for alarm in alarms if quiet_s > alarm.after_s]:
                alarms.remove(alarm)
                try:
                    alarm.call(quiet_s)
                except (OSError, ValueError) as error:  # a full disk must not silence the later alarms
                    log.error("%s: cannot report %.0f s without progress: %s", self._thread.name, quiet_s, error)
