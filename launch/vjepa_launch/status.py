"""How runs are doing, for people: from the run folders and one question to the scheduler. No torch, no sacct."""

import fcntl
import json
import re
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from vjepa_launch import history, job_control, slurm, snapshot
from vjepa_launch.settings import BadInput

TAIL_BYTES = 65536
"""Enough of the end of metrics.jsonl for a rate."""

SCHEDULER_TIMEOUT_S = 10.0
COLOURS = {"running": "green", "queued": "cyan", "done": "blue", "failed": "red", "refused": "red", "lost": "red"}


@dataclass(frozen=True)
class RunStatus:
    """One run."""

    folder: Path
    name: str
    state: str
    """queued, running, stopping, done, failed, refused, cancelled, stopped, lost, idle or unknown."""
    detail: str
    """Why it waits, where it runs, or how it ended."""
    job: str | None
    step: int | None
    """Newest step that was recorded."""
    steps: int | None
    """Steps in the whole run."""
    loss: float | None
    age_s: float | None
    """Seconds since that step."""
    checkpoint: int | None
    attempts: int
    eta_s: float | None
    """Seconds to the last step, at the pace of this attempt."""


def find_runs(root: Path) -> list[Path]:
    """Run folders under a folder, and under the sweeps in it."""
    found = {path.parent for pattern in ("*/config.yaml", "*/*/config.yaml") for path in root.glob(pattern)}
    return sorted(found)


def read_all(runs: Sequence[Path]) -> tuple[list[RunStatus], str]:
    """The status of runs, with one question to the scheduler for all.

    Returns:
        The statuses, and a warning when the scheduler did not answer.
    """
    owners = {run: history.read_json(history.launch_folder(run) / "job.json") for run in runs}
    states: dict[str, slurm.State] | None = {}
    warning = ""
    if any(owner and owner["executor"] == "slurm" for owner in owners.values()):
        try:
            states = slurm.states(timeout_s=SCHEDULER_TIMEOUT_S)
        except slurm.SchedulerUnreachable as error:
            states, warning = None, f"the scheduler does not answer ({error}); states are taken from the run folders"
    return [_read(run, owner, states) for run, owner in owners.items()], warning


def _read(run: Path, owner: Mapping[str, Any] | None, states: Mapping[str, slurm.State] | None) -> RunStatus:
    events = history.read_events(run)
    starts = [event for event in events if event["event"] == "start"]
    rows = _last_rows(run / "metrics.jsonl")
    row = rows[-1] if rows else {}
    state, detail = _state(run, owner, events, states)
    steps, step, checkpoint = _steps(run), row.get("step"), history.newest_checkpoint(run)
    if state == "idle" and steps and checkpoint == steps:
        state = "done"
    eta_s = None
    recent = [one for one in rows if not starts or one["time"] >= starts[-1]["time"]]
    if state == "running" and steps and len(recent) > 1 and recent[-1]["step"] > recent[0]["step"]:
        pace_s = (recent[-1]["time"] - recent[0]["time"]) / (recent[-1]["step"] - recent[0]["step"])
        eta_s = (steps - recent[-1]["step"]) * pace_s
    return RunStatus(
        folder=run,
        name=run.name,
        state=state,
        detail=detail,
        job=owner["job"] if owner else None,
        step=step,
        steps=steps,
        loss=row.get("loss/prediction"),
        age_s=time.time() - row["time"] if row else None,
        checkpoint=checkpoint,
        attempts=len(starts),
        eta_s=eta_s,
    )


def _state(
    run: Path,
    owner: Mapping[str, Any] | None,
    events: Sequence[Mapping[str, Any]],
    states: Mapping[str, slurm.State] | None,
) -> tuple[str, str]:
    """One word for how a run is, and a few more."""
    if owner is None:
        return ("running", "not launched") if _is_locked(run / ".lock") else ("idle", "not launched")
    last = events[-1] if events else {}
    if owner["executor"] == "slurm" and states is None:
        return "unknown", str(last.get("why", ""))
    if owner["executor"] == "slurm" and states and owner["job"] in states:
        known = states[owner["job"]]
        words = {"PENDING": "queued", "RUNNING": "running", "COMPLETING": "stopping"}
        reason = known.reason.strip("()")
        return words.get(known.name, known.name.lower()), reason if known.name != "COMPLETING" else ""
    if owner["executor"] == "local" and job_control.is_alive("local", owner["job"]):
        return "running", "this machine"
    if last.get("event") == "end" and not last["requeue"]:
        outcome = str(last["outcome"])
        if outcome in ("done", "cancelled"):
            return outcome, ""
        detail = f"{last['reason']}; {last['why']}" if last["reason"] else str(last["why"])
        return {"bad_input": "refused"}.get(outcome, outcome), detail
    return "lost", "the job is gone without a word; `vjepa runs requeue` goes on from the checkpoint"


def _last_rows(path: Path) -> list[dict[str, Any]]:
    """The last complete lines of a metrics file."""
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


def _steps(run: Path) -> int | None:
    """Steps in the whole run, from its settings; a pattern, since a hundred YAML files take a second to parse."""
    try:
        found = re.search(r"^steps: (\d+)\s*$", (run / "config.yaml").read_text(), re.MULTILINE)
    except FileNotFoundError:
        return None
    return int(found[1]) if found else None


def _is_locked(path: Path) -> bool:
    """Whether a trainer holds the lock of its run folder. Asks without taking it."""
    try:
        with path.open("r+") as file:
            question = struct.pack("hhqqi", fcntl.F_WRLCK, 0, 0, 0, 0)
            answer = fcntl.fcntl(file, fcntl.F_GETLK, question)
    except OSError:
        return False
    return struct.unpack("hhqqi", answer)[0] != fcntl.F_UNLCK


def table(statuses: Sequence[RunStatus]) -> Table:
    """Runs as a table, a line each."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("run", "state", "step", "loss", "seen", "checkpoint", "attempts", "left", "job", ""):
        right = title in ("step", "loss", "seen", "checkpoint", "attempts", "left")
        shown.add_column(title, justify="right" if right else "left", no_wrap=title != "")
    for one in statuses:
        step = "-" if one.step is None else f"{one.step:,}" + (f" / {one.steps:,}" if one.steps else "")
        shown.add_row(
            one.name,
            Text(one.state, COLOURS.get(one.state, "")),
            step,
            "-" if one.loss is None else f"{one.loss:.4f}",
            _duration(one.age_s),
            "-" if one.checkpoint is None else f"{one.checkpoint:,}",
            str(one.attempts or "-"),
            _duration(one.eta_s),
            one.job or "-",
            one.detail,
        )
    return shown


def describe(run: Path) -> str:
    """All about one run, as text: its state, its attempts, its code, and where its output is."""
    (status,), warning = read_all([_existing(run)])
    owner = history.read_json(history.launch_folder(run) / "job.json") or {}
    code = history.read_json(history.launch_folder(snapshot.home(run)) / "code.json")
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
        commit = (
            f"commit {code['commit'][:12]}{' and changes' if code['dirty'] else ''}" if code["commit"] else "no clone"
        )
        lines.append(f"  code        {commit}, sha256 {code['digest'][:12]}")
    attempts = _attempts(history.read_events(run))
    if attempts:
        lines += ["", *attempts]
    if warning:
        lines += ["", warning]
    return "\n".join(lines)


def _attempts(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each attempt: when it started, from where, how long it took and how it ended."""
    lines = []
    ends = {event["attempt"]: event for event in events if event["event"] == "end"}
    for event in events:
        if event["event"] == "launch":
            lines.append(f"{_clock(event['time'])}  launched")
        elif event["event"] == "start":
            begin = event["checkpoint"] or 0
            text = f"{_clock(event['time'])}  {event['attempt']}  {event['world']} ranks on {','.join(event['nodes'])}"
            end = ends.get(event["attempt"])
            if end:
                lasted = _duration(end["time"] - event["time"])
                reason = f": {end['reason']}" if end["reason"] else ""
                text += (
                    f", steps {begin} to {end['checkpoint'] or 0} in {lasted}, {end['outcome']}{reason} -> {end['why']}"
                )
            else:
                text += f", from step {begin}, no end noted"
            lines.append(text)
    return lines


def log_path(run: Path, rank: int) -> Path:
    """Where the output of a rank is: of the run's last job, or of a trainer that was started by hand."""
    owner = history.read_json(history.launch_folder(run) / "job.json")
    if owner is None:
        return run / "log.txt"
    return Path(owner["logs"]) / f"{owner['job']}_{rank}_log.out"


def read_log(run: Path, *, rank: int = 0, lines: int = 100, follow: bool = False) -> Iterator[str]:
    """The end of what a rank wrote, and, if asked, what it goes on to write until the run is over."""
    path = log_path(_existing(run), rank)
    if rank and path.name == "log.txt":
        raise BadInput(f"{run} was not launched, so its one log is of rank 0; leave out --rank {rank}")
    if not path.exists() and not follow:
        known = sorted(path.parent.glob(path.name.replace(f"_{rank}_log", "_*_log")))
        ranks = f"there are {len(known)} ranks with output" if known else "the job has not started"
        raise BadInput(f"rank {rank} of {run} has written nothing to {path}; {ranks}")
    while not path.exists():
        time.sleep(0.5)
    with path.open(errors="replace") as file:
        yield from file.readlines()[-lines:]
        while follow:
            text = file.read()
            if text:
                yield text
            elif _is_over(run):
                return
            else:
                time.sleep(0.5)


def cancel(run: Path, *, after_checkpoint: bool = False) -> str:
    """End a run for good.

    Its ranks save in the seconds that the cluster grants them, or, with `after_checkpoint`, for as long as it takes.

    Returns:
        What was done, for the user.
    """
    owner = _owner(run)
    if not job_control.is_alive(owner["executor"], owner["job"]):
        raise BadInput(f"job {owner['job']} of {run} is over; there is nothing to cancel")
    (status,), _ = read_all([run])
    try:
        if after_checkpoint and status.state == "running":
            history.stop_path(run).touch()
            job_control.send_signal(owner["executor"], owner["job"], "USR2")
            return f"job {owner['job']} was told to save and then to end"
        job_control.cancel(owner["executor"], owner["job"])
    except slurm.SchedulerUnreachable as error:
        raise BadInput(f"job {owner['job']} could not be told: {error}") from None
    return f"job {owner['job']} is cancelled"


def requeue(run: Path) -> str | None:
    """Have a running job save and come back.

    Returns:
        What was done, or None when the job is over, and the run must be launched again (see `owner_of`).
    """
    owner = _owner(run)
    if not job_control.is_alive(owner["executor"], owner["job"]):
        return None
    (status,), _ = read_all([run])
    if status.state != "running":
        raise BadInput(f"job {owner['job']} of {run} is {status.state}; it starts by itself")
    try:
        job_control.send_signal(owner["executor"], owner["job"], "USR2")
    except slurm.SchedulerUnreachable as error:
        raise BadInput(f"job {owner['job']} could not be told: {error}") from None
    return f"job {owner['job']} was told to save and to come back"


def _owner(run: Path) -> dict[str, Any]:
    owner = history.read_json(history.launch_folder(_existing(run)) / "job.json")
    if owner is None:
        raise BadInput(f"{run} was not launched; a trainer that was started by hand is stopped with Ctrl-C")
    return owner


def _existing(run: Path) -> Path:
    if not (run / "config.yaml").exists():
        raise BadInput(f"{run} is not a run folder: it holds no config.yaml; `vjepa runs list` shows those under runs/")
    return run


def _is_over(run: Path) -> bool:
    (status,), _ = read_all([run])
    return status.state not in ("queued", "running", "stopping", "unknown")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h" if hours < 48 else f"{days:.1f} d"


def _clock(unix_s: float) -> str:
    return time.strftime("%m-%d %H:%M:%S", time.localtime(unix_s))
