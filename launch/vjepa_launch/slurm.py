"""Questions and orders to SLURM, each with a limit on its patience: a busy or absent slurmctld must not hang a run.

Only squeue, scontrol and scancel are used. sacct needs a database that many clusters do not keep; submitit, which asks
nothing else, reads UNKNOWN for ever there.
"""

import logging
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

log = logging.getLogger(__name__)

TIMEOUT_S = 30.0
FATE_TIMEOUT_S = 10.0
"""Who asks for the fate of a job may have as little as KillWait (30 s by default) to act on it."""
TRIES = 5


Fate = Literal["runs", "preempted", "requeued", "out of time", "ends", "unknown"]
"""What is to become of a job: it goes on; its nodes are wanted; they were taken and the job starts again; it ends, and
why; or the scheduler does not say."""


class SchedulerUnreachable(RuntimeError):
    """The scheduler is not there, or did not answer in time."""


@dataclass(frozen=True)
class State:
    """What the scheduler says about a job."""

    name: str
    """PENDING, RUNNING, COMPLETING, ..."""
    reason: str
    """Why it waits, or on which nodes it runs."""
    nodes: int
    elapsed: str


def ask(*command: str, timeout_s: float = TIMEOUT_S) -> str:
    """Output of a command of SLURM.

    Raises:
        Unreachable: it is not installed, did not answer in time, or refused.
    """
    if shutil.which(command[0]) is None:
        raise SchedulerUnreachable(f"{command[0]} is not installed here; run this where jobs are submitted")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise SchedulerUnreachable(f"{' '.join(command)} did not answer within {timeout_s:.0f} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise SchedulerUnreachable(f"{' '.join(command)}: {last}")
    return done.stdout


def states(*, timeout_s: float = TIMEOUT_S) -> dict[str, State]:
    """Our jobs that the scheduler still knows, by id; an element of an array is `22_0`."""
    lines = ask("squeue", "--me", "--noheader", "--array", "--format=%i|%T|%R|%D|%M", timeout_s=timeout_s).splitlines()
    found = {}
    for line in lines:
        job, name, reason, nodes, elapsed = line.split("|")
        found[job.strip()] = State(name, reason, int(nodes), elapsed)
    return found


def state_of(job: str) -> State | None:
    """A job that the scheduler still knows as waiting or running, or None."""
    return states().get(job)


def show_job(job: str, *, timeout_s: float = TIMEOUT_S) -> dict[str, str]:
    """What the scheduler remembers of a job: `JobState`, `Reason`, `ExcNodeList`, ..."""
    pairs = (
        word.partition("=") for word in ask("scontrol", "show", "job", "--oneliner", job, timeout_s=timeout_s).split()
    )
    return {name: value for name, _, value in pairs}


def fate_of(job: str, *, restart: int) -> Fate:
    """What is to become of a job.

    Args:
        job: its id.
        restart: how often it had been requeued when it started.

    Raises:
        Unreachable: the scheduler does not say.
    """
    shown = show_job(job, timeout_s=FATE_TIMEOUT_S)
    if shown.get("JobState") != "RUNNING":
        if int(shown.get("Restarts", 0)) > restart:
            return "requeued"
        return "out of time" if shown.get("Reason") == "TimeLimit" else "ends"
    return "runs" if shown.get("PreemptTime", "None") == "None" else "preempted"


def requeue(job: str, *, exclude: Sequence[str] = (), nodes: int = 1) -> bool:
    """Requeue a job, away from some nodes if enough others remain.

    Returns:
        Whether the scheduler took it.
    """
    for attempt in range(TRIES):
        try:
            ask("scontrol", "requeue", job)
            break
        except SchedulerUnreachable as error:
            log.warning("requeue, try %d of %d: %s", attempt + 1, TRIES, error)
            time.sleep(2**attempt)
    else:
        log.error("job %s could not be requeued; `vjepa runs requeue` starts it again", job)
        return False
    if exclude:
        try:
            _exclude(job, exclude, nodes)
        except SchedulerUnreachable as error:
            log.warning("nodes %s could not be excluded: %s", ",".join(exclude), error)
    return True


def _exclude(job: str, exclude: Sequence[str], nodes: int) -> None:
    shown = show_job(job)
    usable = ask(
        "sinfo", "--noheader", "--Node", "--format=%N", f"--partition={shown['Partition']}", "--states=idle,alloc,mix"
    )
    left = set(usable.split()) - set(exclude)
    if len(left) < nodes:
        log.warning("nodes %s failed too often, but without them %d of %d nodes are left; they are used again",
                    ",".join(exclude), len(left), nodes)  # fmt: skip
        return
    before = [] if shown.get("ExcNodeList") in (None, "(null)") else [shown["ExcNodeList"]]
    ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join([*before, *exclude])}")
    log.warning("nodes %s failed too often and are excluded from now on", ",".join(exclude))


def cancel(job: str) -> None:
    ask("scancel", job)


def send_signal(job: str, name: str) -> None:
    """Send a signal to every process of the steps of a job."""
    ask("scancel", f"--signal={name}", job)
