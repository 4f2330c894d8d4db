"""Show, follow, cancel and requeue runs, from their folders and a single query to the scheduler. No torch, no sacct."""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from vjepa_launch import history, job_control, slurm, snapshot
from vjepa_launch.atomic import read_json
from vjepa_launch.history import log_path
from vjepa_launch.plain_path import is_link_to_run
from vjepa_launch.settings import BadLaunch

TAIL_BYTES = 65536
"""Bytes to read from the end of metrics.jsonl, enough to measure the pace."""

SCHEDULER_TIMEOUT_S = 10.0
ENDED = ("done", "failed", "refused", "cancelled", "stopped", "lost", "idle")
"""States after which nothing more is written, unless the run is launched again."""

COLOURS = {"running": "green", "queued": "cyan", "done": "blue", "failed": "red", "refused": "red", "lost": "red"}


@dataclass(frozen=True)
class RunStatus:
    """The state of a run."""

    name: str
    state: str
    """queued, running, stopping, done, failed, refused, cancelled, stopped, lost, idle or unknown."""
    detail: str
    """Why it is queued, where it runs, or how it ended."""
    job: str | None
    step: int | None
    """Newest recorded step."""
    steps: int | None
    """Steps of the whole run."""
    loss: float | None
    age_s: float | None
    """Seconds since the newest recorded step."""
    checkpoint: int | None
    attempts: int
    eta_s: float | None
    """Seconds to the last step at the pace of this attempt."""


RUN_FILES = ("config.yaml", ".lock")
"""Files of which a run folder has at least one. A trainer writes its settings shortly before its first step."""


def find_runs(root: Path) -> list[Path]:
    """Return the run folders in a folder and in the sweeps in it."""
    found = {path.parent for depth in ("*", "*/*") for name in RUN_FILES for path in root.glob(f"{depth}/{name}")}
    return sorted(run for run in found if not is_link_to_run(run))


def read_all(runs: Sequence[Path]) -> tuple[list[RunStatus], str]:
    """Return the status of runs, with a single query to the scheduler, and a warning if it does not answer."""
    owners = {run: history.read_owner(run) for run in runs}
    jobs: dict[str, slurm.QueuedJob] | None = {}
    warning = ""
    on_slurm = [owner for owner in owners.values() if owner and owner["executor"] == "slurm"]
    if on_slurm:
        try:
            users = {owner["uid"] for owner in on_slurm if "uid" in owner}
            jobs = slurm.queued_jobs(users, timeout_s=SCHEDULER_TIMEOUT_S)
        except slurm.SchedulerUnreachable as error:
            jobs, warning = None, f"the scheduler does not answer ({error}); states come from the run folders"
    return [_read(run, owner, jobs) for run, owner in owners.items()], warning


def _read(run: Path, owner: Mapping[str, Any] | None, jobs: Mapping[str, slurm.QueuedJob] | None) -> RunStatus:
    events = history.read_events(run)
    starts = [event for event in events if event["event"] == "start"]
    rows = _last_rows(run / "metrics.jsonl")
    row = rows[-1] if rows else {}
    state, detail = _state(run, owner, events, jobs)
    config = run / "config.yaml"
    steps = history.steps_in(config.read_text()) if config.exists() else None
    step, checkpoint = row.get("step"), history.newest_checkpoint(run)
    if state in ("idle", "lost") and steps and checkpoint == steps:
        state, detail = "done", "" if owner else detail
    eta_s = None
    recent = [row for row in rows if not starts or row["time"] >= starts[-1]["time"]]
    if state == "running" and steps and len(recent) > 1 and recent[-1]["step"] > recent[0]["step"]:
        pace_s = (recent[-1]["time"] - recent[0]["time"]) / (recent[-1]["step"] - recent[0]["step"])
        eta_s = (steps - recent[-1]["step"]) * pace_s
    return RunStatus(
        name=run.name,
        state=state,
        detail=detail,
        job=owner["job"] if owner else None,
        step=step,
        steps=steps,
        loss=row.get("loss/total", row.get("loss/prediction")),  # runs of version 0.1 have the latter
        age_s=time.time() - row["time"] if row else None,
        checkpoint=checkpoint,
        attempts=len(starts),
        eta_s=eta_s,
    )


def _state(
    run: Path,
    owner: Mapping[str, Any] | None,
    events: Sequence[Mapping[str, Any]],
    jobs: Mapping[str, slurm.QueuedJob] | None,
) -> tuple[str, str]:
    """Return the state of a run in a word, and a detail."""
    if owner is None:
        if job_control.trainer_holds(run):
            return "running", "not launched"
        has_settings = (run / "config.yaml").exists()
        return "idle", "not launched" if has_settings else "it ended before its first step; see its log"
    last = events[-1] if events else {}
    is_copy = owner.get("is_copy", False)
    job = jobs.get(owner["job"]) if jobs and owner["executor"] == "slurm" and not is_copy else None
    if job and job.is_alive:
        words = {"PENDING": "queued", "RUNNING": "running", "COMPLETING": "stopping"}
        return words.get(job.state, job.state.lower()), "" if job.state == "COMPLETING" else job.reason.strip("()")
    if owner["executor"] == "local" and not is_copy and job_control.is_alive("local", owner["job"]):
        return "running", "this machine"
    if last.get("event") == "end" and not last["requeue"]:
        outcome = str(last["outcome"])
        if outcome in ("done", "cancelled"):
            return outcome, ""
        detail = f"{last['reason']}; {last['why']}" if last["reason"] else str(last["why"])
        return {"bad_input": "refused"}.get(outcome, outcome), detail
    if owner["executor"] == "slurm" and jobs is None:
        return "unknown", ""
    holder = job_control.trainer_holds(run)
    if holder:  # a job of another machine without a scheduler
        return "running", holder
    if is_copy:
        return "idle", "a copy of another run folder; `vjepa runs requeue` resumes it here"
    return _state_without_record(run, owner, last, job)


def _state_without_record(
    run: Path, owner: Mapping[str, Any], last: Mapping[str, Any], job: slurm.QueuedJob | None
) -> tuple[str, str]:
    """Return the state of a run whose job is over and left no record of its end."""
    waited = last.get("event") != "start" and owner["executor"] == "slurm"
    was_cancelled = job.state == "CANCELLED" if job else not log_path(run, 0).exists()
    if waited and was_cancelled:
        return "cancelled", "while it waited in the queue"
    again = "`vjepa runs requeue` resumes from the checkpoint"
    if history.newest_checkpoint(run) is None:
        again = "it made no checkpoint; see the log, then `vjepa runs requeue` starts it again"
    if (job.state == "TIMEOUT") if job else _reached_time_limit(log_path(run, 0)):
        cause = "before a rank started; shorten `setup` or raise the limit" if waited else "before its end was recorded"
        return "failed", f"the time limit ended the job {cause}; {again}"
    fate = f" ({job.state})" if job else ""
    return "lost", f"the job ended without a record{fate}; {again}"


def _reached_time_limit(log: Path) -> bool:
    """Tell whether SLURM wrote into a log that it ended the job at its time limit. It forgets jobs after minutes."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            return re.search(rb"\*\*\* (JOB|STEP) .* DUE TO TIME LIMIT \*\*\*", file.read()) is not None
    except OSError:
        return False


def _last_rows(path: Path) -> list[dict[str, Any]]:
    """Return the last complete lines of a metrics file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            text = file.read()
    except FileNotFoundError:
        return []
    lines = text.split(b"\n")[:-1]
    if size > TAIL_BYTES:
        lines = lines[1:]
    rows = [json.loads(line) for line in lines if line.startswith(b"{") and line.endswith(b"}")]
    return [row for row in rows if "step" in row and "time" in row]


def table(statuses: Sequence[RunStatus]) -> Table:
    """Return runs as a table with a row each."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("run", "state", "step", "loss", "age", "checkpoint", "attempts", "left", "job", ""):
        right = title in ("step", "loss", "age", "checkpoint", "attempts", "left")
        shown.add_column(title, justify="right" if right else "left", no_wrap=title != "")
    for run in statuses:
        step = "-" if run.step is None else f"{run.step:,}" + (f" / {run.steps:,}" if run.steps else "")
        shown.add_row(
            Text(run.name),
            Text(run.state, COLOURS.get(run.state, "")),
            step,
            "-" if run.loss is None else f"{run.loss:.4f}",
            _duration(run.age_s),
            "-" if run.checkpoint is None else f"{run.checkpoint:,}",
            str(run.attempts or "-"),
            _duration(run.eta_s),
            run.job or "-",
            Text(run.detail),
        )
    return shown


def describe(run: Path) -> str:
    """Return the state, attempts, code and output files of a run as text."""
    (status,), warning = read_all([_check_run(run)])
    owner = history.read_owner(run)
    code = read_json(history.launch_folder(snapshot.code_owner(run)) / "code.json")
    lines = [
        f"{status.name}: {status.state}" + (f" ({status.detail})" if status.detail else ""),
        f"  step        {status.step if status.step is not None else '-'} of {status.steps or '?'}"
        + (f", {_duration(status.age_s)} ago" if status.age_s is not None else ""),
        f"  loss        {'-' if status.loss is None else f'{status.loss:.4f}'}",
        f"  checkpoint  {'-' if status.checkpoint is None else status.checkpoint}",
        f"  left        {_duration(status.eta_s)}",
        f"  folder      {run.resolve()}",
    ]
    if owner:
        lines += [f"  job         {owner['job']} on {owner['executor']}", f"  log         {log_path(run, 0)}"]
    if code:
        changes = " with uncommitted changes" if code["dirty"] else ""
        commit = f"commit {code['commit'][:12]}{changes}" if code["commit"] else "not from a git clone"
        lines.append(f"  code        {commit}, sha256 {code['digest'][:12]}")
    attempts = _describe_attempts(history.read_events(run))
    if attempts:
        lines += ["", *attempts]
    if warning:
        lines += ["", warning]
    return "\n".join(lines)


def _describe_attempts(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line per launch and attempt: when and where it started, from which step, and how it ended."""
    lines = []
    ends = {event["attempt"]: event for event in events if event["event"] == "end"}
    for event in events:
        if event["event"] == "launch":
            lines.append(f"{_clock(event['time'])}  launched")
        elif event["event"] == "start":
            first = event["checkpoint"] or 0
            text = f"{_clock(event['time'])}  {event['attempt']}  {event['world']} ranks on {','.join(event['nodes'])}"
            end = ends.get(event["attempt"])
            if end:
                lasted = _duration(end["time"] - event["time"])
                reason = f": {end['reason']}" if end["reason"] else ""
                text += (
                    f", steps {first} to {end['checkpoint'] or 0} in {lasted}, {end['outcome']}{reason} -> {end['why']}"
                )
            else:
                text += f", from step {first}, no end recorded"
            lines.append(text)
    return lines


def read_log(run: Path, *, rank: int = 0, lines: int = 100, follow: bool = False) -> Iterator[str]:
    """Yield the last lines of a rank's output and, if `follow` is set, new output until the run has ended.

    Raises:
        BadLaunch: the folder is not a run, or the rank has no output.
    """
    path = log_path(_check_run(run), rank)
    if rank and path.name == "log.txt":
        raise BadLaunch(f"{run} was not launched, so it has a log of rank 0 only; leave out --rank {rank}")
    if not path.exists() and not follow:
        known = sorted(path.parent.glob(path.name.replace(f"_{rank}_log", "_*_log")))
        ranks = f"{len(known)} ranks have output" if known else "the job has not started"
        raise BadLaunch(f"rank {rank} of {run} has no output at {path}; {ranks}")
    while not path.exists():
        time.sleep(0.5)
    with path.open(errors="replace") as file:
        yield from file.readlines()[-lines:]
        while follow:
            text = file.read()
            if text:
                yield text
            elif _has_ended(run):
                return
            else:
                time.sleep(0.5)


def cancel(run: Path, *, after_checkpoint: bool = False) -> str:
    """Cancel a run, and return a message for the user.

    Its ranks save within the grace period of the cluster, or with `after_checkpoint` for as long as it takes.
    """
    owner = _check_owner(run)
    if not job_control.is_owner_alive(owner):
        raise BadLaunch(f"nothing to cancel: job {owner['job']} of {run} has ended")
    (status,), _ = read_all([run])
    try:
        if after_checkpoint and status.state == "running":
            history.stop_path(run).touch()
            job_control.send_signal(owner["executor"], owner["job"], "USR2")
            return f"job {owner['job']} will save and end"
        job_control.cancel(owner["executor"], owner["job"])
        if status.state == "queued":
            history.record_cancelled_in_queue(run, owner["job"])
    except slurm.SchedulerUnreachable as error:
        raise BadLaunch(f"job {owner['job']} could not be reached: {error}") from None
    return f"job {owner['job']} is cancelled"


def requeue(run: Path) -> str | None:
    """Ask a running job to save and requeue.

    Returns:
        A message for the user. None if the job has ended, so that the run must be launched again.
    """
    owner = _check_owner(run)
    if not job_control.is_owner_alive(owner):
        return None
    (status,), _ = read_all([run])
    if status.state != "running":
        raise BadLaunch(
            f"job {owner['job']} of {run} is {status.state}, so there is nothing to save; wait until it runs"
        )
    try:
        job_control.send_signal(owner["executor"], owner["job"], "USR2")
    except slurm.SchedulerUnreachable as error:
        raise BadLaunch(f"job {owner['job']} could not be reached: {error}") from None
    return f"job {owner['job']} will save and be requeued"


def _check_owner(run: Path) -> dict[str, Any]:
    """Return the record of the job that owns a run, or raise BadLaunch if the run was never launched."""
    owner = history.read_owner(_check_run(run))
    if owner is None:
        raise BadLaunch(f"{run} was not launched; stop a trainer that was started by hand with Ctrl-C")
    return owner


def _check_run(run: Path) -> Path:
    """Return a run folder, or raise BadLaunch otherwise."""
    if not any((run / name).exists() for name in RUN_FILES):
        raise BadLaunch(f"{run} is not a run folder: config.yaml is missing; `vjepa runs list` shows the runs in runs/")
    return run


def _has_ended(run: Path) -> bool:
    (status,), _ = read_all([run])
    return status.state in ENDED


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h" if hours < 48 else f"{days:.1f} d"


def _clock(unix_s: float) -> str:
    return time.strftime("%m-%d %H:%M:%S", time.localtime(unix_s))
