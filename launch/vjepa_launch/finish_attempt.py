"""Finish an attempt on SLURM: requeue the job, or record why it ends. The last command of every batch script.

    python -m vjepa_launch.finish_attempt RUN/launch CODE        CODE is the exit code of srun

All ends are handled here (time limit, preemption, cancellation, failure, stall), outside of any container and of the
processes that may have failed. When SLURM ends a job, the batch script still runs for KillWait seconds, which is
enough to ask for the reason.
"""

import logging
import sys
import time
from pathlib import Path

from submitit.core.utils import DelayedSubmission, JobPaths

from vjepa_launch import history, policy, slurm
from vjepa_launch.job import Job, log_to_stderr
from vjepa_launch.policy import JobFate
from vjepa_launch.process_info import ProcessInfo
from vjepa_launch.settings import Restart

log = logging.getLogger("vjepa_launch.finish_attempt")

WAIT_TO_BE_KILLED_S = 3600.0
"""The scheduler kills this script when the grace period ends (GraceTime or KillWait: seconds to minutes), and requeues
the job or not. This bound only matters if it never does."""


def finish_attempt(run: Path, srun_code: int, rule: Restart) -> int:
    """Record the end of an attempt and requeue the job if the policy says so.

    Args:
        run: the run folder.
        srun_code: exit code of srun.
        rule: how many failures are tolerated.

    Returns:
        The exit code of the job.
    """
    info = ProcessInfo.from_environment()
    fate = _ask_fate(info)
    outcome = policy.attempt_outcome(history.read_rank_records(run, info.attempt), srun_code, fate)
    if outcome == "stopped" and fate == "timed out":
        log.warning("the time limit was reached before the checkpoint was complete; increase notice_s")
    unexplained = f"no rank reported a reason; srun exited with {srun_code}" if outcome == "failed" else ""
    decision = history.record_end(run, info.attempt, outcome, rule, unexplained=unexplained)
    log.info("attempt %s: %s: %s", info.attempt, outcome, decision.why)
    if decision.requeue and fate != "requeued":
        slurm.requeue(info.job, exclude=decision.exclude, nodes=len(info.nodes))
    if fate == "requeued" and not decision.requeue:
        slurm.cancel(info.job)
    if outcome == "cancelled" and fate == "unknown":
        time.sleep(WAIT_TO_BE_KILLED_S)
    return policy.exit_code(outcome)


def _ask_fate(info: ProcessInfo) -> JobFate:
    try:
        return slurm.job_fate(info.job, restarts=info.restart)
    except slurm.SchedulerUnreachable as error:
        log.warning("the scheduler did not say why the job ends: %s", error)
        return "unknown"


def main() -> int:
    """Load the job that has run, and finish its attempt."""
    log_to_stderr()
    folder, srun_code = sys.argv[1:]
    job = DelayedSubmission.load(JobPaths(folder, ProcessInfo.from_environment().job).submitted_pickle).function
    assert isinstance(job, Job)
    return finish_attempt(Path(job.run), int(srun_code), job.restart)


if __name__ == "__main__":
    sys.exit(main())
