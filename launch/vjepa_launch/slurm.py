"""Commands of SLURM, each with a time limit and in a clean environment.

A busy or absent slurmctld must not hang a run. Preferences in the user's shell must not change an answer:
`SQUEUE_STATES=RUNNING` hides pending jobs, so that a second job would be launched into their folders.

Only squeue, scontrol, sinfo and scancel are used. sacct needs a database that many clusters do not keep. submitit asks
only sacct, and reports UNKNOWN on such a cluster.
"""

import logging
import os
import shutil
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from vjepa_launch.policy import JobFate

log = logging.getLogger(__name__)

TIMEOUT_S = 30.0
FATE_TIMEOUT_S = 10.0
"""A batch script that asks for the fate of its job may have only KillWait (30 s by default) left to act on it."""
REQUEUE_TRIES = 5

ADDRESS = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
"""Variables that tell the commands where the cluster is and how to sign in. All other options are preferences."""

PREFERENCES = ("SLURM_", "SQUEUE_", "SCONTROL_", "SCANCEL_", "SINFO_", "SBATCH_", "SRUN_", "SALLOC_", "SACCT_")

ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
         "REVOKED", "TIMEOUT")  # fmt: skip
"""States of a job that has ended, which SLURM remembers for MinJobAge (300 s by default)."""


class SchedulerUnreachable(RuntimeError):
    """The scheduler is not installed, did not answer in time, or refused a command."""


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue shows it."""

    state: str
    """PENDING, RUNNING, COMPLETING, ..."""
    reason: str
    """Why it is pending, or the nodes it runs on."""

    @property
    def is_alive(self) -> bool:
        """Return whether the job is pending or running."""
        return self.state not in ENDED


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the variables that change the behaviour or output of SLURM's commands."""
    return {name: value for name, value in environment.items() if name in ADDRESS or not name.startswith(PREFERENCES)}


def run_command(*command: str, timeout_s: float = TIMEOUT_S) -> str:
    """Run a command of SLURM and return its output.

    Raises:
        SchedulerUnreachable: it is not installed, did not answer in time, or failed.
    """
    if shutil.which(command[0]) is None:
        raise SchedulerUnreachable(f"{command[0]} is not installed here; run this where jobs are submitted")
    try:
        done = subprocess.run(
            command,
            env=clean_environment(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SchedulerUnreachable(f"{' '.join(command)} did not answer within {timeout_s:.0f} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise SchedulerUnreachable(f"{' '.join(command)}: {last}")
    return done.stdout


def queued_jobs(users: Collection[int] = (), *, timeout_s: float = TIMEOUT_S) -> dict[str, QueuedJob]:
    """Return jobs that are pending or running, or have ended a moment ago, by id.

    An element of an array has an id like `22_0`.

    Args:
        users: ids of the users whose jobs to return, besides this user's.
        timeout_s: seconds to wait for the scheduler.
    """
    of = ",".join(map(str, sorted({os.getuid(), *users})))
    command = ["squeue", "--noheader", "--array", "--all", "--states=all", f"--user={of}", "--format=%i|%T|%R"]
    fields = (line.split("|", 2) for line in run_command(*command, timeout_s=timeout_s).splitlines())
    return {job.strip(): QueuedJob(state, reason) for job, state, reason in fields}


def hides_jobs_of_others() -> bool:
    """Return whether this cluster shows users their own jobs only (PrivateData)."""
    lines = run_command("scontrol", "show", "config").splitlines()
    private = next((line.partition("=")[2] for line in lines if line.startswith("PrivateData")), "")
    return any(word.strip() in ("jobs", "all") for word in private.split(","))


def show_job(job: str, *, timeout_s: float = TIMEOUT_S) -> dict[str, str]:
    """Return the fields of `scontrol show job`: `JobState`, `Reason`, `ExcNodeList`, ..."""
    output = run_command("scontrol", "show", "job", "--oneliner", job, timeout_s=timeout_s)
    return {name: value for name, _, value in (word.partition("=") for word in output.split())}


def job_fate(job: str, *, restarts: int) -> JobFate:
    """Return the scheduler's plan for a job.

    Args:
        job: its id.
        restarts: how often it had been requeued when it started.

    Raises:
        SchedulerUnreachable: the scheduler did not answer.
    """
    fields = show_job(job, timeout_s=FATE_TIMEOUT_S)
    if fields.get("JobState") != "RUNNING":
        if int(fields.get("Restarts", 0)) > restarts:
            return "requeued"
        return "timed out" if fields.get("Reason") == "TimeLimit" else "ending"
    return "running" if fields.get("PreemptTime", "None") == "None" else "preempted"


def requeue(job: str, *, exclude: Sequence[str] = (), nodes: int = 1) -> bool:
    """Requeue a job and exclude some nodes, if enough other nodes remain.

    Returns:
        Whether the scheduler accepted it.
    """
    for attempt in range(REQUEUE_TRIES):
        try:
            run_command("scontrol", "requeue", job)
            break
        except SchedulerUnreachable as error:
            log.warning("requeue, try %d of %d: %s", attempt + 1, REQUEUE_TRIES, error)
            time.sleep(2**attempt)
    else:
        log.error("job %s could not be requeued; start it again with `vjepa runs requeue`", job)
        return False
    if exclude:
        try:
            _exclude(job, exclude, nodes)
        except SchedulerUnreachable as error:
            log.warning("nodes %s could not be excluded: %s", ",".join(exclude), error)
    return True


def _exclude(job: str, exclude: Sequence[str], nodes: int) -> None:
    fields = show_job(job)
    usable = run_command(
        "sinfo", "--noheader", "--Node", "--format=%N", f"--partition={fields['Partition']}", "--states=idle,alloc,mix"
    )
    remaining = set(usable.split()) - set(exclude)
    if len(remaining) < nodes:
        log.warning("nodes %s failed too often, but without them only %d of the %d nodes needed remain; keeping them",
                    ",".join(exclude), len(remaining), nodes)  # fmt: skip
        return
    before = [] if fields.get("ExcNodeList") in (None, "(null)") else [fields["ExcNodeList"]]
    run_command("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join([*before, *exclude])}")
    log.warning("nodes %s failed too often and are excluded from now on", ",".join(exclude))


def cancel(job: str) -> None:
    """Cancel a job."""
    run_command("scancel", job)


def send_signal(job: str, name: str) -> None:
    """Send a signal to the tasks of a running job."""
    run_command("scancel", f"--signal={name}", job)
