"""What happened to a run, on disk, and the rule that decides what happens next.

    RUN/launch/job.json                       the job that owns the folder now
    RUN/launch/attempts.jsonl                 its history: {"event": "launch" | "start" | "end", ...}, a line each
    RUN/launch/ends/ATTEMPT/rank_0003.json    one file per rank that failed, and always one for rank 0
    RUN/launch/stop                           asks that the run not be requeued after its next checkpoint

An attempt is one start of the processes of a run; a requeued job keeps its id and makes a new attempt.
"""

import json
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vjepa_launch.settings import Restart

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75

Outcome = Literal["done", "stopped", "cancelled", "failed", "bad_input"]


@dataclass(frozen=True)
class End:
    """How one rank ended."""

    rank: int
    node: str
    code: int
    """Exit code; the negative of a signal that killed it."""
    outcome: Outcome
    reason: str
    """The same in words."""
    echo: bool = False
    """It fell because others had: it was told to end, and is not to blame."""
    time: float = 0.0
    """Unix seconds."""


@dataclass(frozen=True)
class Decision:
    """What becomes of a run after an attempt."""

    requeue: bool
    why: str
    exclude: tuple[str, ...] = ()


def launch_folder(run: Path) -> Path:
    return run / "launch"


def stop_path(run: Path) -> Path:
    return launch_folder(run) / "stop"


def newest_checkpoint(run: Path) -> int | None:
    """Step of the newest checkpoint; a checkpoint folder that has its final name is complete."""
    steps = [re.fullmatch(r"step_(\d+)", path.name) for path in (run / "checkpoints").glob("step_*")]
    return max((int(step[1]) for step in steps if step), default=None)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a file in one piece, so that a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a file, or None when it is not there (yet)."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def append_event(run: Path, event: Mapping[str, Any]) -> None:
    """Add one line to the history of a run, with the time."""
    path = launch_folder(run) / "attempts.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({**event, "time": time.time()}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_events(run: Path) -> list[dict[str, Any]]:
    """The history of a run, oldest first; a last line that was cut short by a crash is left out."""
    path = launch_folder(run) / "attempts.jsonl"
    events = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


def write_end(run: Path, attempt: str, end: End) -> None:
    write_json(launch_folder(run) / "ends" / attempt / f"rank_{end.rank:04d}.json", asdict(end))


def read_ends(run: Path, attempt: str) -> list[End]:
    """How ranks of an attempt ended: all that failed, and rank 0; the one to blame first.

    Those told to end come last. Among the others a death by signal says more than an exit, which may be an unnoticed
    echo of it (a lost connection); then the earlier one is to blame.
    """
    paths = sorted((launch_folder(run) / "ends" / attempt).glob("rank_*.json"))
    ends = [End(**record) for record in map(read_json, paths) if record]
    return sorted(ends, key=lambda one: (one.outcome not in ("failed", "bad_input"), one.echo, one.code >= 0, one.time))


def decide(
    events: Sequence[Mapping[str, Any]], rule: Restart, *, outcome: Outcome, progress: bool, stop_asked: bool = False
) -> Decision:
    """Say what becomes of a run after an attempt. Pure: reads the history and nothing else.

    Args:
        events: the history before this end.
        rule: how patient to be.
        outcome: how the attempt ended.
        progress: whether it left a newer checkpoint than it found.
        stop_asked: the user asked for a stop after the next checkpoint.
    """
    if outcome == "done":
        return Decision(False, "done")
    if outcome == "bad_input":
        return Decision(False, "refused its input; see the log, mend it and launch again")
    if outcome == "cancelled":
        return Decision(False, "cancelled")
    if stop_asked:
        return Decision(False, "stopped after a checkpoint, as asked")
    if outcome == "stopped":
        return Decision(True, "stopped in good order")
    failed = 0 if progress else 1 + _failures_in_a_row(events)
    if failed >= rule.attempts:
        return Decision(
            False, f"failed {failed} times in a row without a new checkpoint; see the log, mend it and launch again"
        )
    if progress:
        return Decision(True, "failed, after a new checkpoint")
    return Decision(True, f"failed; attempt {failed} of {rule.attempts} without a new checkpoint")


def _failures_in_a_row(events: Sequence[Mapping[str, Any]]) -> int:
    """Latest attempts that failed without a new checkpoint; a launch by hand starts the count anew."""
    count = 0
    for event in reversed(events):
        if event["event"] == "launch" or (event["event"] == "end" and event["progress"]):
            break
        count += event["event"] == "end" and event["outcome"] == "failed"
    return count


def nodes_to_exclude(events: Sequence[Mapping[str, Any]], rule: Restart) -> tuple[str, ...]:
    """Nodes on which failures began too often, over all attempts of a run."""
    blamed = Counter(event["node"] for event in events if event["event"] == "end" and event.get("node"))
    return tuple(sorted(node for node, count in blamed.items() if count >= rule.node_failures))
