"""The last word of a batch script, when the processes of an attempt are over: requeue the job, or say why not.

    python -m vjepa_launch.after RUN/launch CODE        CODE is what srun exited with

One place decides for all ends (time limit, preemption, failure, hang), outside of any container and of the processes
that may have failed. A signal that asked ranks to end (a cancellation, or a preemption without notice) leaves the
decision to the scheduler.
"""

import logging
import signal
import sys
import time
from pathlib import Path

from submitit.core.utils import DelayedSubmission, JobPaths

from vjepa_launch import record, scheduler
from vjepa_launch.job import Job, conclude, exit_code, speak
from vjepa_launch.place import Place
from vjepa_launch.record import STOPPED, Outcome
from vjepa_launch.settings import Restart

log = logging.getLogger("vjepa_launch.after")


def after(run: Path, code: int, rule: Restart) -> int:
    """Conclude an attempt.

    Args:
        run: the run folder.
        code: exit code of srun.
        rule: how patient to be with failures.

    Returns:
        The exit code of the job.
    """
    place = Place.here()
    events = record.read_events(run)
    if any(event["event"] == "end" and event["attempt"] == place.attempt for event in events):
        return STOPPED  # cancelled or preempted: the scheduler decides
    try:
        fate = scheduler.fate_of(place.job)
    except scheduler.Unreachable as error:
        log.warning("cannot ask whether the job is to go on, and take it that it is: %s", error)
        fate = "runs"
    if fate in ("ends", "out of time"):
        return STOPPED
    ends = record.read_ends(run, place.attempt)
    outcome: Outcome = ends[0].outcome if ends else "failed"
    if any(end.outcome == "bad_input" for end in ends):
        outcome = "bad_input"  # whatever the others died of then
    if outcome == "cancelled" and fate == "preempted":
        outcome = "stopped"  # before it had begun; nobody is left to wait for the scheduler
    if code != 0 and outcome not in ("failed", "bad_input"):
        outcome = "failed"
    unexplained = f"no rank said why; srun exited with {code}" if outcome == "failed" else ""
    decision = conclude(run, place.attempt, outcome, rule, unexplained=unexplained)
    log.info("attempt %s: %s: %s", place.attempt, outcome, decision.why)
    if decision.requeue and scheduler.requeue(place.job, exclude=decision.exclude, nodes=len(place.nodes)):
        time.sleep(120)  # the scheduler kills this script
    return exit_code(outcome)


def main() -> int:
    """Read the job that ran, and conclude it."""
    speak()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a requeue ends this script while it still has things to say
    folder, code = sys.argv[1:]
    job = DelayedSubmission.load(JobPaths(folder, Place.here().job).submitted_pickle).function
    assert isinstance(job, Job)
    return after(Path(job.run), int(code), job.restart)


if __name__ == "__main__":
    sys.exit(main())
