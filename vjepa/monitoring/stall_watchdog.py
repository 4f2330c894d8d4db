"""Stall detection: stacks of all threads, the collective in which ranks wait, and the ranks that have not joined it.

    stacks/rank_00003.txt    stacks of all threads of a rank, at every stall
           rank_00003.json   torch's flight recorders: the last collectives that it joined

There are two recorders, one for NCCL and one for gloo, and a rank with a GPU uses both. A rank that is stopped or dead
writes no file and is reported for that.
"""

import faulthandler
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch._C import _distributed_c10d as c10d

from vjepa.config import Health
from vjepa.distributed.world import World

log = logging.getLogger(__name__)

GRACE_S = 5.0
"""Ranks detect a stall by their own clocks. After this many seconds all responsive ranks have written their files."""


class Watchdog:
    """A thread that detects a stall and dumps the stacks of all threads."""

    def __init__(self, settings: Health, folder: Path, world: World) -> None:
        self._settings, self._rank, self._size = settings, world.rank, world.size
        self._folder = folder / "stacks"
        self._quiet_s, self._doing, self._steps = 0.0, "starting", 0
        self._dumped = self._told = False
        self._over = threading.Event()

    def beat(self, doing: str, *, step: int | None = None) -> None:
        """Report progress and the next activity."""
        self._quiet_s, self._doing, self._dumped, self._told = 0.0, doing, False, False
        self._steps += step is not None

    def watch(self) -> None:
        """Run until closed. Time during which the whole job is suspended does not count."""
        settings = self._settings
        tick_s = min(1.0, settings.stall_s / 4)
        while not self._over.wait(tick_s):
            self._quiet_s += tick_s
            quiet_s = self._quiet_s
            stall_s = settings.stall_s if self._steps else 10 * settings.stall_s
            try:
                self._report(quiet_s, stall_s)
            except (OSError, ValueError) as error:  # a full disk must not keep a hanging process alive
                log.error("rank %d: stacks cannot be written or compared: %s", self._rank, error)
            if quiet_s > max(settings.hang_s, stall_s):
                log.error("rank %d: no step for %.0f s while %s; ending", self._rank, quiet_s, self._doing)
                os._exit(1)

    def _report(self, quiet_s: float, stall_s: float) -> None:
        """Dump this rank's stacks and, a little later, name the late ranks; each once in a stall."""
        if quiet_s > stall_s and not self._dumped:
            self._dump(quiet_s)
        if quiet_s > stall_s + min(GRACE_S, self._settings.stall_s) and not self._told:
            self._told = True
            log.warning("rank %d: %s", self._rank, name_the_late(self._folder, self._size))

    def _dump(self, quiet_s: float) -> None:
        self._dumped = True
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"rank_{self._rank:05d}.txt"
        with file.open("a") as stream:
            stream.write(f"\n{time.ctime()}: rank {self._rank}, {quiet_s:.0f} s without a step while {self._doing}\n")
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)
        text = f"rank {self._rank}: no step for {quiet_s:.0f} s while {self._doing}; stacks are in {file}"
        log.warning(text)
        beside = self._folder / f".rank_{self._rank:05d}.part"
        beside.write_text(json.dumps({"time": time.time(), "entries": joined_collectives()}))
        os.replace(beside, file.with_suffix(".json"))

    def stop(self) -> None:
        """End the thread."""
        self._over.set()


@contextmanager
def watchdog(settings: Health, folder: Path, world: World) -> Iterator[Watchdog]:
    """Run a watchdog during the block."""
    dog = Watchdog(settings, folder, world)
    thread = threading.Thread(target=dog.watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield dog
    finally:
        dog.stop()
        thread.join()


def joined_collectives() -> list[dict[str, Any]]:
    """Return the entries of torch's flight recorders of this process, oldest first for each recorder."""
    dumps = ("_dump_nccl_trace_json", "_dump_fr_trace_json")  # builds without NCCL lack the first
    texts = [getattr(c10d, name)() for name in dumps if hasattr(c10d, name)]
    return [entry for text in texts for entry in json.loads(text).get("entries", [])]


def name_the_late(folder: Path, world: int, *, since: float | None = None) -> str:
    """Compare the flight recorders of all ranks and name the late ranks and the collective.

    Collectives of a group are numbered and joined by all ranks. A rank that joined fewer than another is late.

    Args:
        folder: folder of the recorder files.
        world: number of ranks.
        since: files older than this belong to an earlier stall, seconds since the epoch; by default ten minutes
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
