"""A job, on SLURM or on this machine: whether it lives, and orders to it."""

import os
import signal
from collections.abc import Iterable
from pathlib import Path

from vjepa_launch import slurm
from vjepa_launch.settings import BadInput


def is_alive(executor: str, job: str) -> bool:
    """Whether a job waits or runs.

    Raises:
        BadInput: the scheduler does not answer.
    """
    return job in those_alive(executor, [job])


def those_alive(executor: str, asked: Iterable[str]) -> set[str]:
    """Which of many jobs wait or run, with one question to the scheduler.

    Raises:
        BadInput: the scheduler does not answer.
    """
    if executor == "local":
        return {job for job in asked if _controller_is_alive(int(job))}
    try:
        return set(asked) & set(slurm.states())
    except slurm.SchedulerUnreachable as error:
        raise BadInput(f"cannot tell which jobs are over: {error}") from None


def _controller_is_alive(pid: int) -> bool:
    """Whether a process is one of submitit's controllers and runs; numbers of processes come round again."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    # While a process becomes another program it has no command line yet; when it is over and unmourned, no longer.
    return b"submitit.local._local" in command if command else state != "Z"


def _supervisor(pid: int) -> int | None:
    """The supervisor of a job on this machine, a child of submitit's controller, which passes on TERM but not USR2."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return None
    return int(children[0]) if children else None


def send_signal(executor: str, job: str, name: str) -> None:
    """Send USR2 to the ranks of a running job: save, and come back (or stay away, if RUN/launch/stop is there)."""
    if executor == "slurm":
        slurm.send_signal(job, name)
        return
    supervisor = _supervisor(int(job))
    if supervisor:
        os.kill(supervisor, getattr(signal, f"SIG{name}"))


def cancel(executor: str, job: str) -> None:
    """End a job; its ranks save first, in the time that the cluster grants them (KillWait)."""
    if executor == "slurm":
        slurm.cancel(job)
    elif _controller_is_alive(int(job)):
        os.kill(int(job), signal.SIGTERM)
