"""The rule that decides what becomes of a run, as a function of its history."""

from pathlib import Path
from typing import Any

from vjepa_launch import history
from vjepa_launch.history import End
from vjepa_launch.settings import Restart

RULE = Restart(attempts=3, node_failures=2)
LAUNCH = {"event": "launch"}


def ended(outcome: str, *, progress: bool = False, node: str | None = None) -> dict[str, Any]:
    return {"event": "end", "outcome": outcome, "progress": progress, "node": node}


def decide(
    events: list[dict[str, Any]], outcome: history.Outcome, *, progress: bool = False, stop: bool = False
) -> bool:
    return history.decide(events, RULE, outcome=outcome, progress=progress, stop_asked=stop).requeue


def test_only_what_stopped_in_good_order_or_failed_with_hope_comes_back() -> None:
    assert decide([], "stopped")
    assert decide([], "failed")
    assert not decide([], "done")
    assert not decide([], "cancelled")
    assert not decide([], "bad_input")
    assert not decide([], "stopped", stop=True)
    assert not decide([], "failed", stop=True)


def test_the_third_failure_without_a_checkpoint_is_the_last() -> None:
    failed = ended("failed")
    assert decide([LAUNCH, failed], "failed")
    assert not decide([LAUNCH, failed, failed], "failed")
    assert decide([LAUNCH, failed, failed], "failed", progress=True)
    assert decide([LAUNCH, failed, failed, ended("failed", progress=True)], "failed")


def test_stopping_in_between_neither_counts_nor_clears() -> None:
    failed, stopped = ended("failed"), ended("stopped")
    assert decide([LAUNCH, stopped, stopped, stopped], "failed")
    assert not decide([LAUNCH, failed, stopped, failed], "failed")


def test_a_launch_by_hand_starts_the_count_anew() -> None:
    failed = ended("failed")
    assert decide([LAUNCH, failed, failed, failed, LAUNCH, failed], "failed")


def test_a_node_on_which_two_failures_began_is_excluded() -> None:
    events = [ended("failed", node="n2"), ended("failed", node="n1"), ended("stopped"), ended("failed", node="n2")]
    assert history.nodes_to_exclude(events[:3], RULE) == ()
    assert history.nodes_to_exclude(events, RULE) == ("n2",)


def test_the_first_to_die_is_to_blame_and_echoes_are_not(tmp_path: Path) -> None:
    for end in (
        End(0, "n1", 0, "stopped", "exit code 0", time=0.0),
        End(1, "n1", -6, "failed", "killed by SIGABRT", echo=True, time=1.0),
        End(2, "n2", 1, "failed", "exit code 1", time=2.0),
        End(3, "n2", -9, "failed", "killed by SIGKILL", time=3.0),
        End(4, "n3", -9, "failed", "killed by SIGKILL", time=4.0),
    ):
        history.write_end(tmp_path, "7.0", end)
    assert [end.rank for end in history.read_ends(tmp_path, "7.0")] == [3, 4, 2, 1, 0]


def test_a_history_cut_short_by_a_crash_is_still_read(tmp_path: Path) -> None:
    history.launch_folder(tmp_path).mkdir()
    history.append_event(tmp_path, {"event": "start"})
    with (history.launch_folder(tmp_path) / "attempts.jsonl").open("a") as file:
        file.write('{"event": "en')
    assert [event["event"] for event in history.read_events(tmp_path)] == ["start"]


def test_an_unfinished_checkpoint_does_not_count(tmp_path: Path) -> None:
    assert history.newest_checkpoint(tmp_path) is None
    for name in ("step_00000020", "step_00000100", ".step_00000200.7", "step_00000300.tmp", "latest"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert history.newest_checkpoint(tmp_path) == 100
