"""Decide how a run continues after an attempt. Pure functions: no files, no processes, no clock.

    rank exit codes -> rank_outcome --+
                                      +-> attempt_outcome -> decide -> requeue or end
    srun's exit code, SLURM's state --+                           \\-> exit_code of the job

On a single machine there is no scheduler, so `rank_outcome` over all ranks is the outcome of the attempt.
"""

import signal
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vjepa_launch.settings import Restart

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75
"""Exit codes of a rank and of a job: finished, failed, rejected its input, saved and stopped (requeue to resume)."""

Outcome = Literal["done", "stopped", "cancelled", "failed", "bad_input"]

JobFate = Literal["running", "preempted", "requeued", "timed out", "ending", "unknown"]
"""The scheduler's plan for a job: it keeps running, its nodes are wanted, it is back in the queue, its time limit has
passed, it ends for another reason, or the scheduler did not answer."""


@dataclass(frozen=True)
class RankExit:
    """The end of the process of a rank."""

    rank: int
    code: int
    """Exit code. The negative signal number if a signal killed the process."""
    reason: str
    """The exit code in words."""
    killed_by_us: bool = False
    """The supervisor ended this rank because another rank had failed, so this rank is not to blame."""
    error: str = ""
    """The exception that the rank reported before it ended."""
    is_consequence: bool = False
    """The rank reported that it lost its connection to another rank."""


@dataclass(frozen=True)
class RankRecord:
    """The end of a rank of an attempt, as stored in the run folder."""

    exit: RankExit
    node: str
    outcome: Outcome
    time: float = 0.0
    """Unix seconds."""


@dataclass(frozen=True)
class Decision:
    """The decision about a run after an attempt."""

    requeue: bool
    why: str
    exclude: tuple[str, ...] = ()
    """Nodes that the requeued job must avoid."""


def killed_by_stop_signal(code: int, received: Collection[int]) -> bool:
    """Return whether a stop signal killed the rank.

    This happens before the rank has installed its handlers, or after it has removed them. Either way it was stopping.
    """
    return code in (-signal.SIGUSR2, -signal.SIGTERM) and -code in received


def rank_outcome(exits: Sequence[RankExit], received: Collection[int]) -> Outcome:
    """Return the common outcome of some ranks of a supervisor.

    Args:
        exits: how the ranks ended.
        received: stop signals that the supervisor received (`SIGUSR2`: save and requeue, `SIGTERM`: save and end).
    """
    told_to_end = signal.SIGTERM in received
    failures = [end for end in exits if is_failure(end.code, received)]
    if any(end.code == BAD_INPUT for end in failures):
        return "bad_input"
    if failures:
        return "cancelled" if told_to_end else "failed"
    if all(end.code == DONE for end in exits):
        return "done"
    return "cancelled" if told_to_end else "stopped"


def is_failure(code: int, received: Collection[int]) -> bool:
    """Return whether an exit code is neither success nor the answer to a stop signal."""
    return code not in (DONE, STOPPED) and not killed_by_stop_signal(code, received)


def most_to_blame_first(records: Iterable[RankRecord]) -> list[RankRecord]:
    """Sort ranks by blame: failed ranks first, ranks that the supervisor ended last among them.

    A death by signal, or an exception that is not a lost connection, ranks before an exit code without a reason,
    because that may be a consequence. NCCL aborts a rank whose peers do not answer, so an unexplained SIGABRT counts
    as a consequence as well. Ties go to the earlier end.
    """

    def is_own_failure(end: RankExit) -> bool:
        return bool(end.error) and not end.is_consequence

    def is_consequence(end: RankExit) -> bool:
        return end.is_consequence or end.reason == "killed by SIGABRT"

    return sorted(
        records,
        key=lambda record: (
            record.outcome not in ("failed", "bad_input"),
            record.exit.killed_by_us,
            is_consequence(record.exit),
            record.exit.code >= 0 and not is_own_failure(record.exit),
            record.time,
        ),
    )


_TAKEN: tuple[JobFate, ...] = ("preempted", "requeued", "timed out")
"""The scheduler, not a user, ended the attempt."""

_Row = tuple[Collection[Outcome | None] | None, bool | None, Collection[JobFate] | None, Outcome]
_VERDICTS: tuple[_Row, ...] = (
    # reported by ranks    srun exited 0  fate of the job  outcome of the attempt
    (("done",),            True,          None,            "done"),  # even if a cancellation came too late
    (None,                 None,          ("ending",),     "cancelled"),
    (("bad_input",),       None,          None,            "bad_input"),  # the other ranks failed because of it
    (("cancelled", None),  None,          _TAKEN,          "stopped"),  # None: no rank had started
    (("failed", None),     None,          None,            "failed"),
    (None,                 False,         None,            "failed"),  # a rank died without a report
    (("cancelled",),       None,          ("running",),    "stopped"),  # a user sent TERM to the ranks
    (("cancelled",),       None,          None,            "cancelled"),
    (("stopped",),         None,          None,            "stopped"),
)  # fmt: skip
"""The first row that matches decides. None matches everything. The rows cover every combination (tested)."""


def attempt_outcome(records: Sequence[RankRecord], srun_code: int, fate: JobFate) -> Outcome:
    """Return the outcome of an attempt from the reports of its ranks and the scheduler's plan for the job.

    A rank that received TERM cannot know whether a user cancelled the job, the job was preempted, its time limit
    passed, or another rank failed. The scheduler knows. If it does not answer, the decision is left to it: a job that
    requeued itself at every TERM could not be cancelled, and a job that ended would not resume after a preemption.

    Args:
        records: how ranks ended, most to blame first.
        srun_code: exit code of srun.
        fate: plan of the scheduler for the job.
    """
    reported = records[0].outcome if records else None
    if any(record.outcome == "bad_input" for record in records):
        reported = "bad_input"
    return next(
        outcome
        for reports, srun_ok, fates, outcome in _VERDICTS
        if (reports is None or reported in reports)
        and (srun_ok is None or srun_ok == (srun_code == 0))
        and (fates is None or fate in fates)
    )


_FINAL: Mapping[Outcome, str] = {
    "done": "done",
    "bad_input": "rejected its input; see the log, fix it and launch again",
    "cancelled": "cancelled",
}
"""Outcomes after which a run is never requeued, and the explanation for the user."""


def decide(
    events: Sequence[Mapping[str, Any]], rule: Restart, *, outcome: Outcome, progress: bool, stop_asked: bool = False
) -> Decision:
    """Decide whether a run is requeued after an attempt.

    Args:
        events: the history of the run before the end of this attempt.
        rule: how many failures are tolerated.
        outcome: how the attempt ended.
        progress: whether the attempt left a newer checkpoint than it found.
        stop_asked: whether the user asked the run to stop after its next checkpoint.
    """
    if outcome in _FINAL:
        return Decision(False, _FINAL[outcome])
    if stop_asked:
        return Decision(False, "stopped after a checkpoint, as requested")
    if progress:
        return Decision(True, "saved and stopped" if outcome == "stopped" else "failed after a new checkpoint")
    failures, idle = 1 + _count_in_a_row(events, ("failed",)), 1 + _count_in_a_row(events, ("failed", "stopped"))
    if outcome == "failed" and failures >= rule.attempts:
        return Decision(
            False, f"failed {failures} times in a row without a new checkpoint; see the log, fix it and launch again"
        )
    if idle >= rule.idle_attempts:
        return Decision(
            False,
            f"{idle} attempts in a row left no new checkpoint: the run takes longer to start or to save than the time "
            "it gets; raise hours or change notice_s in the profile and launch again",
        )
    if outcome == "failed":
        return Decision(True, f"failed; attempt {failures} of {rule.attempts} without a new checkpoint")
    return Decision(True, f"stopped; attempt {idle} of {rule.idle_attempts} without a new checkpoint")


def _count_in_a_row(events: Sequence[Mapping[str, Any]], outcomes: Collection[Outcome]) -> int:
    """Count the latest attempts with these outcomes that left no new checkpoint. A launch by hand resets the count."""
    count = 0
    for event in reversed(events):
        if event["event"] == "launch" or (event["event"] == "end" and event["progress"]):
            break
        count += event["event"] == "end" and event["outcome"] in outcomes
    return count


def nodes_to_exclude(events: Sequence[Mapping[str, Any]], rule: Restart) -> tuple[str, ...]:
    """Return the nodes on which too many failures began, over all attempts of a run."""
    failures = Counter(event["node"] for event in events if event["event"] == "end" and event.get("node"))
    return tuple(sorted(node for node, count in failures.items() if count >= rule.node_failures))


def exit_code(outcome: Outcome) -> int:
    """Return the exit code of a job for the outcome of its attempt."""
    return {"done": DONE, "bad_input": BAD_INPUT, "failed": FAILED}.get(outcome, STOPPED)
