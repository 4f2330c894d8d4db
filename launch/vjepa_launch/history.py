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

import yaml

from vjepa_launch import policy
from vjepa_launch.atomic import read_json, write_json
from vjepa_launch.policy import Decision, Outcome, RankExit, RankRecord
from vjepa_launch.settings import BadLaunch, Restart

SAVED = re.compile(r": step (\d+): saved ")
"""The trainer's log line about a complete checkpoint."""


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


def steps_in(config: str) -> int | None:
    """Return the steps of the whole run. A pattern finds them, because parsing a hundred YAML files takes a second."""
    found = re.search(r"^steps: (\d+)\s*$", config, re.MULTILINE)
    return int(found[1]) if found else None


def saves_elsewhere(config: str) -> bool:
    """Return whether a run keeps its checkpoints outside of its folder (`checkpoint.folder`)."""
    settings = yaml.safe_load(config) or {}
    return bool((settings.get("checkpoint") or {}).get("folder"))


def check_checkpoints_exist(run: Path, home: Path | None = None) -> None:
    """Check that a run that has saved still has a checkpoint. Starting at step 0 would overwrite its record.

    A run that was killed before its first checkpoint starts at step 0, and so does one that went back to step 0.

    Args:
        run: the run folder.
        home: folder of the checkpoints, if it is not in the run folder.

    Raises:
        BadLaunch: the record tells of a checkpoint, and there is none.
    """
    if newest_checkpoint(run) is not None:
        return
    home = home or run / "checkpoints"
    step, source = _newest_saved(run, home)
    if step and not (home / f"unhealthy_step_{step:08d}").exists():
        raise BadLaunch(
            f"{run} has no checkpoint, but {source} records a checkpoint of step {step}. Bring it back to {home}, "
            f"start over in another folder (--out), or remove {run} to start over here."
        )


def _newest_saved(run: Path, home: Path) -> tuple[int, Path]:
    """Return the newest checkpoint in the records of a run, and its record. Step 0 without a checkpoint."""
    latest, environment, log = home / "latest", run / "environment.json", run / "log.txt"
    found = [(0, run)]
    if latest.is_file():
        found += [(int(step), latest) for step in re.findall(r"step_(\d+)", latest.read_text())]
    events = [event for event in read_events(run) if event["event"] != "launch"]
    found += [(event.get("checkpoint") or 0, launch_folder(run) / "attempts.jsonl") for event in events]
    attempts = (read_json(environment) or {}).get("attempts", [])
    found += [(attempt.get("step") or 0, environment) for attempt in attempts]
    if log.is_file():
        found += [(int(step), log) for step in SAVED.findall(log.read_text(errors="replace"))]
    return max(found, key=lambda record: record[0])


def read_owner(run: Path) -> dict[str, Any] | None:
    """Return job.json: the job that owns a run folder, with its command and profile. None if it was never launched.

    Paths below the run folder are current, also if the folder was moved or renamed since the launch. In a copy of a run
    folder, `is_copy` is true: the job belongs to the original.
    """
    owner = read_json(launch_folder(run) / "job.json")
    if owner is None or "command" not in owner:
        return owner
    before, now = _recorded_folder(owner), run.absolute()
    if before is None or before.resolve() == now.resolve():
        return owner
    owner["is_copy"] = (read_json(launch_folder(before) / "job.json") or {}).get("job") == owner["job"]
    logs = Path(owner["logs"])
    if logs == launch_folder(before):
        owner["logs"] = str(launch_folder(now))
    elif logs == launch_folder(before.parent):  # of a sweep
        owner["logs"] = str(launch_folder(now.parent))
    owner["command"] = [_relocated(word, before, now) for word in owner["command"]]
    return owner


def _recorded_folder(owner: Mapping[str, Any]) -> Path | None:
    """Return the run folder at the time of the launch. Version 0.1 recorded it only as `--out` of a training run."""
    words = list(owner["command"])
    if "run" in owner:
        return Path(owner["run"])
    if words[:4] == ["python", "-m", "vjepa", "train"] and "--out" in words:
        return Path(words[words.index("--out") + 1])
    return None


def _relocated(word: str, before: Path, now: Path) -> str:
    path = Path(word)
    return str(now / path.relative_to(before)) if path.is_relative_to(before) else word


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


def error_path(run: Path, attempt: str, rank: int) -> Path:
    """Return the file to which a rank writes its exception, before it ends. Its folder is created."""
    folder = launch_folder(run) / "ends" / attempt
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"error_{rank:04d}.json"


def rank_record(end: RankExit, node: str, outcome: Outcome, error: Path) -> RankRecord:
    """Return the record of a rank that ended just now, with the exception that it reported.

    The time is that of the report, which comes first, by the clock of the file server.
    """
    reported = read_json(error)
    if not reported or outcome not in ("failed", "bad_input"):
        return RankRecord(end, node, outcome, time.time())
    text, extra = reported["message"]["message"], reported["message"]["extraInfo"]
    end = dataclasses.replace(
        end,
        reason=f"{end.reason}: {text.splitlines()[0] if text else ''}",
        error=text,
        is_consequence=extra.get("is_consequence", False),
    )
    return RankRecord(end, node, outcome, error.stat().st_mtime)


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
    """Decide how a run continues after an attempt, and record the end and the decision.

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


def record_cancelled_in_queue(run: Path, job: str) -> None:
    """Record that a job was cancelled before it started, so that no attempt of it will record its end."""
    event = {"event": "end", "attempt": f"{job} in the queue", "outcome": "cancelled", "requeue": False}
    nothing_made = {"checkpoint": newest_checkpoint(run), "progress": False, "reason": "", "node": None}
    append_event(run, {**event, **nothing_made, "why": "cancelled while it waited in the queue"})
