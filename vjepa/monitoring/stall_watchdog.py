"""Stall detection: stacks of all threads, the collective in which ranks wait, and the ranks that have not joined it.

    stacks/rank_00003.txt    stacks of all threads of a rank, at every stall
           rank_00003.json   from torch's flight recorders: the last collective of each group that it joined

NCCL and gloo have a recorder each, and a rank with a GPU uses both. A rank that is stopped or dead
writes no file and is reported for that. A rank writes some kilobytes, and the first rank that responds reads them all:
whole recorders have 10 to 25 MB, and every rank reading every file would stop a job of 500 ranks for minutes.
"""

import faulthandler
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from vjepa.compat import flight_records
from vjepa.config import Health
from vjepa.distributed.world import World
from vjepa_data.watchdog import Alarm, Watchdog

log = logging.getLogger(__name__)

GRACE_S = 5.0
"""Ranks detect a stall by their own clocks. After this many seconds all responsive ranks have written their files."""


LATER_TURNS = 2
"""Ranks after rank 0 that name the late ranks in its place, if it does not respond."""


class StallWatchdog:
    """Detects a stall, dumps the stacks of all threads, names the late ranks, and ends a process that hangs."""

    def __init__(self, settings: Health, folder: Path, world: World) -> None:
        self._settings, self._rank, self._size = settings, world.rank, world.size
        self._folder = folder / "stacks"
        self._doing = "starting"
        self._watchdog = Watchdog(self._alarms(10 * settings.stall_s), name=f"rank {world.rank}")  # for the first step
        self._watchdog.beat()

    def beat(self, doing: str, *, step: int | None = None, patience: float = 1.0) -> None:
        """Report progress and the next activity.

        Args:
            doing: the activity.
            step: updates made. After the first step the watchdog waits `health.stall_s`.
            patience: multiple of `health.stall_s` to wait for this activity, which may take longer than a step.
        """
        self._doing = doing
        if step is not None or patience > 1:
            self._watchdog.alarms = self._alarms(patience * self._settings.stall_s)
        self._watchdog.beat()

    def close(self) -> None:
        """End the thread."""
        self._watchdog.close()

    def _alarms(self, stall_s: float) -> list[Alarm]:
        grace_s = min(GRACE_S, self._settings.stall_s)
        end = Alarm(max(self._settings.hang_s, stall_s), self._end)
        # The ranks after rank 0 look later, and only if no rank has reported by then.
        turn = 1 + min(self._rank, LATER_TURNS)
        return [Alarm(stall_s, self._dump), Alarm(stall_s + turn * grace_s, self._name_the_late), end]

    def _dump(self, quiet_s: float) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"rank_{self._rank:05d}.txt"
        with file.open("a") as stream:
            stream.write(f"\n{time.ctime()}: rank {self._rank}, {quiet_s:.0f} s without a step while {self._doing}\n")
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)
        log.warning(
            "rank %d: no step for %.0f s while %s; stacks are in %s", self._rank, quiet_s, self._doing, file
        )  # fmt: skip
        beside = self._folder / f".rank_{self._rank:05d}.part"
        last = list(_last_of_each_group(flight_records()).values())
        beside.write_text(json.dumps({"time": time.time(), "entries": last}))
        os.replace(beside, file.with_suffix(".json"))

    def _name_the_late(self, quiet_s: float) -> None:
        report = self._folder / "report.txt"
        if self._rank > LATER_TURNS or (report.is_file() and time.time() - report.stat().st_mtime < quiet_s):
            return  # a rank before this one has reported this stall
        text = name_the_late(self._folder, self._size)
        report.write_text(text + "\n")
        log.warning("rank %d: %s", self._rank, text)

    def _end(self, quiet_s: float) -> None:
        log.error("rank %d: no step for %.0f s while %s; ending", self._rank, quiet_s, self._doing)
        os._exit(1)


def name_the_late(folder: Path, world: int, *, since: float | None = None) -> str:
    """Compare the flight recorders of all ranks and name the late ranks and the collective.

    Collectives of a group are numbered and joined by all ranks. A rank that joined fewer than another is late.

    Args:
        folder: folder of the recorder files.
        world: number of ranks.
        since: files older than this belong to an earlier stall, seconds since the epoch. By default ten minutes
            ago.
    """
    since = time.time() - 600 if since is None else since
    joined: dict[int, dict[str, dict[str, Any]]] = {}
    for rank in range(world):
        file = folder / f"rank_{rank:05d}.json"
        record: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"time": 0.0}
        if record["time"] >= since:
            joined[rank] = _last_of_each_group(record.get("entries", []))
    silent = [rank for rank in range(world) if rank not in joined]
    if silent:
        return (
            f"rank {_some(silent)} wrote no stack dump: it is stopped or dead, or cannot write to this folder; "
            "check its node first"
        )
    for group in sorted({group for last in joined.values() for group in last}):
        numbers = {rank: last[group]["collective_seq_id"] for rank, last in joined.items() if group in last}
        most = max(numbers.values())
        late = [rank for rank, number in numbers.items() if number < most]
        if late:
            first = next(rank for rank, number in numbers.items() if number == most)
            entry = joined[first][group]
            return (
                f"rank {_some(late)} has not joined {entry['profiling_name']} (number {most} of group {group}, "
                f"{entry.get('input_sizes')}), in which rank {first} waits; see what it does in its stacks"
            )
    return "all ranks joined the same collectives, so no rank is late; suspect the GPUs or the network"


def _last_of_each_group(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    last: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if not entry.get("is_p2p"):
            backend = entry["profiling_name"].partition(":")[0]  # a group may have two, each with its own count
            last[" ".join(map(str, (*entry["process_group"], backend)))] = entry
    return last


def _some(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
