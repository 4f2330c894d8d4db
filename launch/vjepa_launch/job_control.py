"""Find out whether jobs are alive, and signal or cancel them, on SLURM or on this machine."""

import os
import signal
from collections.abc import Iterable
from pathlib import Path

from vjepa_launch import compat, slurm
from vjepa_launch.process_info import process_state
from vjepa_launch.settings import BadLaunch


def is_alive(executor: str, job: str) -> bool:
    """Return whether a job is pending or running.

    Raises:
        BadLaunch: the scheduler does not answer.
    """
    return job in alive_jobs(executor, [job])


def alive_jobs(executor: str, jobs: Iterable[str]) -> set[str]:
    """Return the jobs in `jobs` that are pending or running, with a single query to the scheduler.

    Raises:
        BadLaunch: the scheduler does not answer.
    """
    if executor == "local":
        return {job for job in jobs if _controller_is_alive(int(job))}
    try:
        return set(jobs) & set(slurm.queued_jobs())
    except slurm.SchedulerUnreachable as error:
        raise BadLaunch(f"cannot tell which jobs have ended: {error}") from None


def _controller_is_alive(pid: int) -> bool:
    """Return whether a process is a controller of submitit and runs. Process ids are reused, so its command counts."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    # A process has no command line while it executes a new program. A zombie has no command line either.
    return compat.CONTROLLER_MODULE.encode() in command if command else process_state(pid) not in ("Z", "")


def _supervisor_pid(controller: int) -> int | None:
    """Return the supervisor of a local job: the child of submitit's controller, which passes on TERM but not USR2."""
    try:
        children = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    except OSError:
        return None
    return int(children[0]) if children else None


def send_signal(executor: str, job: str, name: str) -> None:
    """Send a signal, such as `USR2`, to the supervisors of a running job.

    On USR2 the ranks save and the job is requeued, or ends if RUN/launch/stop exists.
    """
    if executor == "slurm":
        slurm.send_signal(job, name)
        return
    supervisor = _supervisor_pid(int(job))
    if supervisor:
        os.kill(supervisor, getattr(signal, f"SIG{name}"))


def cancel(executor: str, job: str) -> None:
    """Cancel a job. Its ranks save first, within the grace period of the cluster (KillWait)."""
    if executor == "slurm":
        slurm.cancel(job)
    elif _controller_is_alive(int(job)):
        os.kill(int(job), signal.SIGTERM)
