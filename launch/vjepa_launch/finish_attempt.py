"""The last word of a batch script, when the processes of an attempt are over: requeue the job, or say why not.

    python -m vjepa_launch.finish_attempt RUN/launch CODE        CODE is what srun exited with

One place decides for all ends (time limit, preemption, cancellation, failure, hang), outside of any container and of
the processes that may have failed. The script lives on when SLURM ends a job, for KillWait seconds, so it can ask why.
"""

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from submitit.core.utils import DelayedSubmission, JobPaths

from vjepa_launch import history, slurm
from vjepa_launch.history import Outcome
from vjepa_launch.job import Job, exit_code, record_end, speak
from vjepa_launch.process_info import ProcessInfo
from vjepa_launch.settings import Restart

log = logging.getLogger("vjepa_launch.finish_attempt")

WAIT_TO_BE_KILLED_S = 3600.0
"""The scheduler kills this script when its grace is over (GraceTime or KillWait: seconds to minutes), and so decides.
This bound only matters should it never do so."""


def after(run: Path, code: int, rule: Restart) -> int:
    """Conclude an attempt.

    Args:
        run: the run folder.
        code: exit code of srun.
        rule: how patient to be with failures.

    Returns:
        The exit code of the job.
    """
    place = ProcessInfo.here()
    fate = ask_fate(place)
    outcome = classify_attempt(history.read_ends(run, place.attempt), code, fate)
    if outcome == "stopped" and fate == "out of time":
        log.warning("the time limit came before the save was over; set notice_s higher")
    unexplained = f"no rank said why; srun exited with {code}" if outcome == "failed" else ""
    decision = record_end(run, place.attempt, outcome, rule, unexplained=unexplained)
    log.info("attempt %s: %s: %s", place.attempt, outcome, decision.why)
    if decision.requeue and fate != "requeued":
        slurm.requeue(place.job, exclude=decision.exclude, nodes=len(place.nodes))
    if fate == "requeued" and not decision.requeue:
        slurm.cancel(place.job)
    if outcome == "cancelled" and fate == "unknown":
        time.sleep(WAIT_TO_BE_KILLED_S)
    return exit_code(outcome)


def ask_fate(place: ProcessInfo) -> slurm.Fate:
    """What the scheduler means to do with our job."""
    try:
        return slurm.fate_of(place.job, restart=place.restart)
    except slurm.SchedulerUnreachable as error:
        log.warning("cannot ask what is to become of the job: %s", error)
        return "unknown"


def classify_attempt(ends: Sequence[history.End], code: int, fate: slurm.Fate) -> Outcome:
    """One word for an attempt, from what its ranks said and what the scheduler says.

    Ranks that were told to end (TERM) cannot know whether by a user, a preemption, a time limit, or because another
    rank had failed. If the scheduler does not say either, the decision is left to it: a job that requeues itself could
    not be cancelled, and one that ends is not brought back after a preemption.

    Args:
        ends: how ranks ended, the one to blame first.
        code: exit code of srun.
        fate: what the scheduler means to do with the job.
    """
    if fate == "ends" and not (code == 0 and ends and ends[0].outcome == "done"):
        return "cancelled"
    if any(end.outcome == "bad_input" for end in ends):
        return "bad_input"  # whatever the others died of then
    outcome = ends[0].outcome if ends else "failed"
    if fate in ("preempted", "requeued", "out of time") and (not ends or outcome == "cancelled"):
        return "stopped"
    if code != 0 and outcome != "failed":
        return "failed"
    return "stopped" if outcome == "cancelled" and fate == "runs" else outcome


def main() -> int:
    """Read the job that ran, and conclude it."""
    speak()
    folder, code = sys.argv[1:]
    job = DelayedSubmission.load(JobPaths(folder, ProcessInfo.here().job).submitted_pickle).function
    assert isinstance(job, Job)
    return after(Path(job.run), int(code), job.restart)


if __name__ == "__main__":
    sys.exit(main())
