"""Find out whether jobs are alive, and signal or cancel them, on SLURM or on this machine."""

import fcntl
import os
import pwd
import signal
import struct
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from vjepa_launch import compat, slurm
from vjepa_launch.process_info import process_state
from vjepa_launch.settings import BadLaunch


def is_alive(executor: str, job: str, *, uid: int | None = None) -> bool:
    """Return whether a job is pending or running.

    Args:
        executor: `slurm` or `local`.
        job: its id.
        uid: id of the user who launched it, by default this user.

    Raises:
        BadLaunch: the scheduler does not answer, or does not show this user's jobs.
    """
    if job in alive_jobs(executor, [job], users=() if uid is None else (uid,)):
        return True
    if executor == "slurm" and uid not in (None, os.getuid()) and slurm.hides_jobs_of_others():
        raise BadLaunch(
            f"job {job} belongs to {user_name(uid)}, and this cluster hides the jobs of other users (PrivateData). Ask "
            f"{user_name(uid)} whether it has ended, then remove launch/job.json in the run folder."
        )
    return False


def is_owner_alive(owner: Mapping[str, Any]) -> bool:
    """Return whether the job that owns a run folder (job.json) is pending or running. See `is_alive`."""
    return not owner.get("is_copy") and is_alive(owner["executor"], owner["job"], uid=owner.get("uid"))


def user_name(uid: int | None) -> str:
    """Return the login name of a user, or the id if it has no name here."""
    try:
        return pwd.getpwuid(os.getuid() if uid is None else uid).pw_name
    except KeyError:
        return f"user {uid}"


def alive_jobs(executor: str, jobs: Iterable[str], *, users: Collection[int] = ()) -> set[str]:
    """Return the jobs in `jobs` that are pending or running, with a single query to the scheduler.

    Args:
        executor: `slurm` or `local`.
        jobs: ids.
        users: ids of the users who launched them, besides this user.

    Raises:
        BadLaunch: the scheduler does not answer.
    """
    if executor == "local":
        return {job for job in jobs if _controller_is_alive(int(job))}
    try:
        known = slurm.queued_jobs(users)
    except slurm.SchedulerUnreachable as error:
        raise BadLaunch(f"cannot tell which jobs have ended: {error}") from None
    return {job for job in jobs if job in known and known[job].is_alive}


def trainer_holds(run: Path) -> str:
    """Return the trainer of a run folder ("pid 12 on n1 since ...") on any machine, or "" without a trainer.

    The lock of the trainer is queried without taking it.
    """
    path = run / ".lock"
    try:
        with path.open() as file:
            query = struct.pack("hhqqi", fcntl.F_WRLCK, 0, 0, 0, 0)
            answer = fcntl.fcntl(file, fcntl.F_GETLK, query)
            owner = file.read(200).strip()
    except OSError:
        return ""
    return "" if struct.unpack("hhqqi", answer)[0] == fcntl.F_UNLCK else owner or "another process"


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
