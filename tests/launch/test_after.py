"""What an attempt was, from what its ranks said and what the scheduler says."""

import pytest

from vjepa_launch import finish_attempt
from vjepa_launch.history import End, Outcome
from vjepa_launch.slurm import Fate


def ends(*outcomes: Outcome) -> list[End]:
    return [End(rank, "n1", 0, outcome, "") for rank, outcome in enumerate(outcomes)]


@pytest.mark.parametrize(
    ("said", "code", "fate", "told"),
    [
        (ends("done"), 0, "runs", "done"),
        (ends("done"), 0, "ends", "done"),  # cancelled too late
        (ends("done"), 137, "runs", "failed"),  # a rank died without a word
        (ends("stopped"), 0, "runs", "stopped"),
        (ends("stopped"), 0, "unknown", "stopped"),  # USR2 has one meaning
        (ends("stopped"), 0, "ends", "cancelled"),
        (ends("cancelled"), 0, "ends", "cancelled"),
        (ends("cancelled"), 0, "unknown", "cancelled"),  # TERM has several
        (ends("cancelled"), 0, "preempted", "stopped"),
        (ends("cancelled"), 0, "requeued", "stopped"),
        (ends("cancelled"), 0, "out of time", "stopped"),
        (ends("cancelled"), 0, "runs", "stopped"),  # somebody sent it by hand
        (ends("cancelled"), 1, "runs", "failed"),
        (ends("failed", "cancelled"), 1, "runs", "failed"),
        (ends("failed", "cancelled"), 1, "preempted", "failed"),
        (ends("failed", "cancelled"), 1, "ends", "cancelled"),
        (ends("failed", "bad_input"), 1, "runs", "bad_input"),
        ([], 143, "preempted", "stopped"),  # before it had begun
        ([], 143, "ends", "cancelled"),
        ([], 1, "runs", "failed"),
        ([], 1, "unknown", "failed"),
    ],
)
def test_what_term_meant_is_for_the_scheduler_to_say(said: list[End], code: int, fate: Fate, told: Outcome) -> None:
    assert finish_attempt.classify_attempt(said, code, fate) == told
