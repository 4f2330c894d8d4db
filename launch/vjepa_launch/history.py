"""The history of a run on disk.

    RUN/launch/job.json                       the job that owns the folder now
    RUN/launch/attempts.jsonl                 {"event": "launch" | "start" | "end", ...}, an event per line
    RUN/launch/ends/ATTEMPT/rank_0003.json    how a rank ended: every rank that failed, and always rank 0
    RUN/launch/JOB_RANK_log.out               output of a rank (submitit's file name)
    RUN/launch/stop                           present: do not requeue the run after its next checkpoint

An attempt is a start of the processes of a run. A requeued job keeps its id and makes a new attempt.
"""

import dataclasses
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vjepa_launch import policy
from vjepa_launch.atomic import read_json, write_json
from vjepa_launch.policy import Decision, Outcome, RankExit, RankRecord
from vjepa_launch.settings import Restart


def launch_folder(run: Path) -> Path:
    """Return the folder of this package's files in a run folder."""
    return run / "launch"


def stop_path(run: Path) -> Path:
    """Return the path of the file that asks a run to stop after its next checkpoint."""
    return launch_folder(run) / "stop"


def rank_log(launch: Path, job: str, rank: int) -> Path:
    """Return the path of a rank's output in the launch folder of a run or sweep."""
    return launch / f"{job}_{rank}_log.out"


def log_path(run: Path, rank: int) -> Path:
    """Return the path of a rank's output: of the last job, or of a trainer that was started by hand."""
    owner = read_owner(run)
    return rank_log(Path(owner["logs"]), owner["job"], rank) if owner else run / "log.txt"


def newest_checkpoint(run: Path) -> int | None:
    """Return the step of the newest checkpoint, or None. A folder with a final name is complete."""
    steps = [re.fullmatch(r"step_(\d+)", path.name) for path in (run / "checkpoints").glob("step_*")]
    return max((int(step[1]) for step in steps if step), default=None)


def read_owner(run: Path) -> dict[str, Any] | None:
    """Return job.json: the job that owns a run folder, with its command and profile. None if it was never launched."""
    return read_json(launch_folder(run) / "job.json")


def write_owner(run: Path, owner: Mapping[str, Any]) -> None:
    """Write job.json."""
    write_json(launch_folder(run) / "job.json", owner)


def append_event(run: Path, event: Mapping[str, Any]) -> None:
    """Append an event to the history of a run, with the current time."""
    path = launch_folder(run) / "attempts.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({**event, "time": time.time()}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_events(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the events of a run, oldest first, or only one kind. A line that a crash cut short is skipped."""
    path = launch_folder(run) / "attempts.jsonl"
    events = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [event for event in events if kind in (None, event["event"])]


def write_rank_record(run: Path, attempt: str, record: RankRecord) -> None:
    """Store how a rank of an attempt ended."""
    path = launch_folder(run) / "ends" / attempt / f"rank_{record.exit.rank:04d}.json"
    write_json(path, dataclasses.asdict(record))


def read_rank_records(run: Path, attempt: str) -> list[RankRecord]:
    """Return the stored records of an attempt, most to blame first."""
    paths = sorted((launch_folder(run) / "ends" / attempt).glob("rank_*.json"))
    stored = [values for values in map(read_json, paths) if values]
    return policy.most_to_blame_first(RankRecord(**{**values, "exit": RankExit(**values["exit"])}) for values in stored)


def record_start(run: Path, attempt: str, *, nodes: Sequence[str], world: int) -> None:
    """Record the start of an attempt, and the checkpoint that it resumes from."""
    event = {"event": "start", "attempt": attempt, "nodes": list(nodes), "world": world}
    append_event(run, {**event, "checkpoint": newest_checkpoint(run)})


def record_end(run: Path, attempt: str, outcome: Outcome, rule: Restart, *, unexplained: str = "") -> Decision:
    """Decide what happens to a run after an attempt, and record the end and the decision.

    Args:
        run: the run folder.
        attempt: name of the attempt.
        outcome: how it ended.
        rule: how many failures are tolerated.
        unexplained: reason to record if no rank reported any.
    """
    events = read_events(run)
    starts = [event for event in events if event["event"] == "start" and event["attempt"] == attempt]
    checkpoint = newest_checkpoint(run)
    progress = bool(starts) and starts[-1]["checkpoint"] != checkpoint
    records = [record for record in read_rank_records(run, attempt) if record.outcome == outcome]
    culprit = records[0] if records and outcome in ("failed", "bad_input") else None
    event = {
        "event": "end",
        "attempt": attempt,
        "outcome": outcome,
        "checkpoint": checkpoint,
        "progress": progress,
        "reason": f"rank {culprit.exit.rank} on {culprit.node}: {culprit.exit.reason}" if culprit else unexplained,
        "node": culprit.node if culprit and outcome == "failed" else None,
    }
    stop_asked = stop_path(run).exists()
    decision = policy.decide(events, rule, outcome=outcome, progress=progress, stop_asked=stop_asked)
    if decision.requeue:
        decision = dataclasses.replace(decision, exclude=policy.nodes_to_exclude([*events, event], rule))
    append_event(run, {**event, "requeue": decision.requeue, "why": decision.why})
    return decision
