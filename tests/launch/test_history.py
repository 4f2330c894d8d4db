"""The history of a run on disk."""

import os
from pathlib import Path

import pytest

from vjepa.distributed import failure
from vjepa_launch import history
from vjepa_launch.policy import RankExit, RankRecord


def test_rank_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    stopped = RankRecord(RankExit(0, 75, "exit code 75"), "n1", "stopped", time=1.0)
    failed = RankRecord(RankExit(3, -9, "killed by SIGKILL", killed_by_us=True), "n2", "failed", time=2.0)
    for record in (stopped, failed):
        history.write_rank_record(tmp_path, "7.0", record)
    assert history.read_rank_records(tmp_path, "7.0") == [failed, stopped]
    assert history.read_rank_records(tmp_path, "7.1") == []


def test_the_record_of_a_rank_has_its_exception_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = history.error_path(tmp_path, "7.0", 3)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error))
    failure.tell_launcher("OutOfMemoryError: 80 GiB\nand more")
    failure.tell_launcher("RuntimeError: later")
    os.utime(error, (5.0, 5.0))
    record = history.rank_record(RankExit(3, 1, "exit code 1"), "n2", "failed", error)
    assert (record.time, record.exit.reason) == (5.0, "exit code 1: OutOfMemoryError: 80 GiB")
    assert not record.exit.is_consequence
    assert history.rank_record(RankExit(3, 75, "exit code 75"), "n2", "stopped", error).exit.error == ""


def test_a_history_cut_short_by_a_crash_is_readable(tmp_path: Path) -> None:
    history.launch_folder(tmp_path).mkdir()
    history.append_event(tmp_path, {"event": "start"})
    with (history.launch_folder(tmp_path) / "attempts.jsonl").open("a") as file:
        file.write('{"event": "en')
    assert [event["event"] for event in history.read_events(tmp_path)] == ["start"]


def test_an_incomplete_checkpoint_does_not_count(tmp_path: Path) -> None:
    assert history.newest_checkpoint(tmp_path) is None
    for name in ("step_00000020", "step_00000100", ".step_00000200.7", "step_00000300.tmp", "latest"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert history.newest_checkpoint(tmp_path) == 100
