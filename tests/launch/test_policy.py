"""The policy after an attempt: outcome, requeue, and excluded nodes."""

import itertools
import signal
from typing import Any, get_args

import pytest

from vjepa_launch import policy
from vjepa_launch.policy import JobFate, Outcome, RankExit, RankRecord
from vjepa_launch.settings import Restart

RULE = Restart(attempts=3, node_failures=2)
LAUNCH = {"event": "launch"}


def records(*outcomes: Outcome) -> list[RankRecord]:
    return [RankRecord(RankExit(rank, 0, ""), "n1", outcome) for rank, outcome in enumerate(outcomes)]


@pytest.mark.parametrize(
    ("reported", "srun_code", "fate", "outcome"),
    [
        (records("done"), 0, "running", "done"),
        (records("done"), 0, "ending", "done"),  # cancelled too late
        (records("done"), 137, "running", "failed"),  # a rank died without a report
        (records("stopped"), 0, "running", "stopped"),
        (records("stopped"), 0, "unknown", "stopped"),  # USR2 has only one meaning
        (records("stopped"), 0, "ending", "cancelled"),
        (records("cancelled"), 0, "ending", "cancelled"),
        (records("cancelled"), 0, "unknown", "cancelled"),  # TERM has several meanings
        (records("cancelled"), 0, "preempted", "stopped"),
        (records("cancelled"), 0, "requeued", "stopped"),
        (records("cancelled"), 0, "timed out", "stopped"),
        (records("cancelled"), 0, "running", "stopped"),  # TERM was sent by hand
        (records("cancelled"), 1, "running", "failed"),
        (records("failed", "cancelled"), 1, "running", "failed"),
        (records("failed", "cancelled"), 1, "preempted", "failed"),
        (records("failed", "cancelled"), 1, "ending", "cancelled"),
        (records("failed", "bad_input"), 1, "running", "bad_input"),
        ([], 143, "preempted", "stopped"),  # before any rank had started
        ([], 143, "ending", "cancelled"),
        ([], 1, "running", "failed"),
        ([], 1, "unknown", "failed"),
    ],
)
def test_the_scheduler_says_what_term_meant(
    reported: list[RankRecord], srun_code: int, fate: JobFate, outcome: Outcome
) -> None:
    assert policy.attempt_outcome(reported, srun_code, fate) == outcome


def test_the_verdict_table_covers_every_combination() -> None:
    reports: list[list[RankRecord]] = [[], *(records(outcome) for outcome in get_args(Outcome))]
    for reported, srun_code, fate in itertools.product(reports, (0, 1), get_args(JobFate)):
        assert policy.attempt_outcome(reported, srun_code, fate) in get_args(Outcome)


@pytest.mark.parametrize(
    ("codes", "received", "outcome"),
    [
        ((0, 0), (), "done"),
        ((0, 1), (), "failed"),
        ((1, 2), (), "bad_input"),
        ((75, 75), (signal.SIGUSR2,), "stopped"),
        ((75, -signal.SIGUSR2), (signal.SIGUSR2,), "stopped"),  # killed before it had a handler
        ((75, -signal.SIGUSR2), (), "failed"),
        ((75, 75), (signal.SIGTERM,), "cancelled"),
        ((75, -signal.SIGTERM), (signal.SIGTERM,), "cancelled"),
        ((75, -signal.SIGKILL), (signal.SIGTERM,), "cancelled"),
        ((75, -signal.SIGKILL), (signal.SIGUSR2,), "failed"),
    ],
)
def test_exit_codes_and_stop_signals_give_the_outcome_of_ranks(
    codes: tuple[int, ...], received: tuple[int, ...], outcome: Outcome
) -> None:
    assert policy.rank_outcome([RankExit(rank, code, "") for rank, code in enumerate(codes)], received) == outcome


def test_the_first_rank_to_die_is_to_blame() -> None:
    """A rank that the supervisor ended comes last among the failed ranks, and a signal before an exit code."""
    ends = [
        RankRecord(RankExit(0, 0, "exit code 0"), "n1", "stopped", time=0.0),
        RankRecord(RankExit(1, -6, "killed by SIGABRT", killed_by_us=True), "n1", "failed", time=1.0),
        RankRecord(RankExit(2, 1, "exit code 1"), "n2", "failed", time=2.0),
        RankRecord(RankExit(3, -9, "killed by SIGKILL"), "n2", "failed", time=3.0),
        RankRecord(RankExit(4, -9, "killed by SIGKILL"), "n3", "failed", time=4.0),
    ]
    assert [record.exit.rank for record in policy.most_to_blame_first(ends)] == [3, 4, 2, 1, 0]


def test_a_rank_that_reports_its_own_error_is_to_blame() -> None:
    """Its peers lose their connection to it, or NCCL aborts them, and may be recorded earlier."""
    lost, own = "RuntimeError: Connection closed by peer", "OutOfMemoryError: 80 GiB"
    ends = [
        RankRecord(RankExit(0, -6, "killed by SIGABRT"), "n1", "failed", time=1.0),
        RankRecord(RankExit(1, 1, "", error=lost, is_consequence=True), "n1", "failed", time=1.5),
        RankRecord(RankExit(2, 1, "", error=own), "n2", "failed", time=2.0),
        RankRecord(RankExit(3, -6, "suspended (SIGSTOP) for 10 s"), "n3", "failed", time=3.0),
        RankRecord(RankExit(4, 1, "exit code 1"), "n4", "failed", time=0.5),
    ]
    assert [record.exit.rank for record in policy.most_to_blame_first(ends)] == [2, 3, 4, 0, 1]


def end(outcome: str, *, progress: bool = False, node: str | None = None) -> dict[str, Any]:
    return {"event": "end", "outcome": outcome, "progress": progress, "node": node}


def is_requeued(
    events: list[dict[str, Any]], outcome: Outcome, *, progress: bool = False, stop_asked: bool = False
) -> bool:
    return policy.decide(events, RULE, outcome=outcome, progress=progress, stop_asked=stop_asked).requeue


def test_only_stopped_and_failed_runs_are_requeued() -> None:
    assert is_requeued([], "stopped")
    assert is_requeued([], "failed")
    assert not is_requeued([], "done")
    assert not is_requeued([], "cancelled")
    assert not is_requeued([], "bad_input")
    assert not is_requeued([], "stopped", stop_asked=True)
    assert not is_requeued([], "failed", stop_asked=True)


def test_the_third_failure_without_a_checkpoint_ends_the_run() -> None:
    failed = end("failed")
    assert is_requeued([LAUNCH, failed], "failed")
    assert not is_requeued([LAUNCH, failed, failed], "failed")
    assert is_requeued([LAUNCH, failed, failed], "failed", progress=True)
    assert is_requeued([LAUNCH, failed, failed, end("failed", progress=True)], "failed")


def test_a_stop_does_not_change_the_count_of_failures() -> None:
    failed, stopped = end("failed"), end("stopped")
    assert is_requeued([LAUNCH, stopped, stopped, stopped], "failed")
    assert not is_requeued([LAUNCH, failed, stopped, failed], "failed")


@pytest.mark.parametrize("outcome", ["stopped", "failed"])
def test_a_run_without_a_checkpoint_is_not_requeued_for_ever(outcome: Outcome) -> None:
    """Also if the scheduler ends every attempt, because the time limit is shorter than the start."""
    events, attempts = [LAUNCH], 0
    while is_requeued(events, outcome):
        events.append(end(outcome))
        attempts += 1
        assert attempts < 10
    decision = policy.decide(events, RULE, outcome=outcome, progress=False)
    assert "in a row" in decision.why
    assert is_requeued([LAUNCH, *events], outcome, progress=True)
    assert is_requeued([*events, LAUNCH], outcome)


def test_a_launch_by_hand_resets_the_count_of_failures() -> None:
    failed = end("failed")
    assert is_requeued([LAUNCH, failed, failed, failed, LAUNCH, failed], "failed")


def test_a_node_with_two_failures_is_excluded() -> None:
    events = [end("failed", node="n2"), end("failed", node="n1"), end("stopped"), end("failed", node="n2")]
    assert policy.nodes_to_exclude(events[:3], RULE) == ()
    assert policy.nodes_to_exclude(events, RULE) == ("n2",)
