"""A stall leaves stacks and collectives of all ranks, and the late rank is named."""

import itertools
import json
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C import _distributed_c10d as c10d

from vjepa.compat import flight_records
from vjepa.config import Health, Run
from vjepa.distributed.world import World
from vjepa.monitoring import stall_watchdog
from vjepa.monitoring.stall_watchdog import StallWatchdog, name_the_late

MakeRun = Callable[..., Run]


def test_a_stall_is_dumped_once_with_stacks_and_collectives(world: World, tmp_path: Path) -> None:
    waiting = threading.Event()

    def hangs_here() -> None:
        waiting.wait()

    thread = threading.Thread(target=hangs_here)
    thread.start()
    with closing(StallWatchdog(Health(stall_s=0.2), tmp_path, world)) as dog:
        dog.beat("making step 8", step=7)
        file = tmp_path / "stacks" / "rank_00000.txt"
        deadline = time.monotonic() + 10
        while not file.with_suffix(".json").is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        text = file.read_text()
        assert text.count("while making step 8") == 1
        assert "hangs_here" in text
        assert {"time", "entries"} <= json.loads(file.with_suffix(".json").read_text()).keys()
        dog.beat("making step 9", step=8)
    waiting.set()
    thread.join()


def test_one_rank_of_many_reads_the_recorders(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the files read nor their size grow with the square of the world."""
    reads: list[int] = []
    monkeypatch.setattr(stall_watchdog, "name_the_late", lambda folder, size: reads.append(size) or "rank 3 is late")
    for number in range(200):
        world.sum(torch.ones(number % 7 + 1))
    for rank in range(16):
        with closing(StallWatchdog(Health(), tmp_path, replace(world, rank=rank, size=16))) as dog:
            dog._dump(60.0)
            dog._name_the_late(60.0)
    assert reads == [16]
    assert sum(file.stat().st_size for file in (tmp_path / "stacks").glob("*.json")) < 16 * 10_000


def test_the_first_step_may_take_ten_times_as_long(world: World, tmp_path: Path) -> None:
    with closing(StallWatchdog(Health(stall_s=0.2), tmp_path, world)):
        time.sleep(0.6)
    assert not (tmp_path / "stacks").exists()


def test_a_save_may_take_ten_times_as_long(world: World, tmp_path: Path) -> None:
    with closing(StallWatchdog(Health(stall_s=30), tmp_path, world)) as dog:
        waits_s = []
        for doing in ({"step": 7}, {"patience": 10.0}, {"step": 8}):
            dog.beat("working", **doing)  # pyright: ignore[reportArgumentType]
            waits_s.append(dog._watchdog.alarms[0].after_s)
    assert waits_s == [30, 300, 30]


def test_a_job_that_was_suspended_for_an_hour_is_not_ended_for_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, clock = threading.Event(), itertools.count()
    monkeypatch.setattr("os._exit", lambda code: ended.set())
    monkeypatch.setattr("time.monotonic", lambda: 4000.0 * next(clock))
    with closing(StallWatchdog(Health(stall_s=0.5, hang_s=3600), tmp_path, world)) as dog:
        dog.beat("making step 8", step=7)
        assert not ended.wait(0.4)
    assert not (tmp_path / "stacks").exists()


def test_a_hanging_run_ends_even_if_its_folder_is_not_writable(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stacks").write_text("in the way of a folder")
    ended = threading.Event()
    monkeypatch.setattr("os._exit", lambda code: ended.set())
    with closing(StallWatchdog(Health(stall_s=0.1, hang_s=0.2), tmp_path, world)) as dog:
        dog.beat("making step 8", step=7)
        assert ended.wait(10)


def test_collectives_of_nccl_and_gloo_are_counted_separately(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def entry(number: int) -> dict[str, Any]:
        group = {"process_group": ["0", "default_pg"], "profiling_name": "nccl:all_reduce", "input_sizes": [[7]]}
        return {**group, "collective_seq_id": number, "is_p2p": False}

    for rank, joined in enumerate((5, 4)):
        text = json.dumps({"entries": [entry(number) for number in range(1, joined + 1)]})
        # Only a build of torch with NCCL has this recorder.
        monkeypatch.setattr(c10d, "_dump_nccl_trace_json", text.encode, raising=False)
        world.sum(torch.ones(1))  # gloo's, in the same group, under the same number
        entries = flight_records()
        assert {one["profiling_name"].partition(":")[0] for one in entries} == {"nccl", "gloo"}
        (tmp_path / f"rank_{rank:05d}.json").write_text(json.dumps({"time": time.time(), "entries": entries[:joined]}))
    assert "rank 1 has not joined nccl:all_reduce (number 5 of group 0 default_pg nccl" in name_the_late(tmp_path, 2)


def recorder(folder: Path, rank: int, *numbers: int, at: float = 0.0) -> None:
    """A flight recorder whose rank has joined so many collectives of each of some groups."""
    entries: list[dict[str, Any]] = [
        {
            "process_group": [str(group), "shard"],
            "collective_seq_id": number,
            "profiling_name": "nccl:_all_gather_base",
            "input_sizes": [[7]],
            "is_p2p": False,
        }
        for group, count in enumerate(numbers)
        for number in range(1, count + 1)
    ]
    text = json.dumps({"time": at or time.time(), "entries": entries})
    (folder / f"rank_{rank:05d}.json").write_text(text)


def test_a_rank_that_joined_fewer_collectives_is_named(tmp_path: Path) -> None:
    for rank, joined in enumerate([(5, 9), (5, 8), (5, 9)]):
        recorder(tmp_path, rank, *joined)
    found = name_the_late(tmp_path, 3)
    assert (
        "rank 1 has not joined nccl:_all_gather_base (number 9 of group 1 shard nccl, [[7]]), in which rank 0" in found
    )
    recorder(tmp_path, 1, 5, 9)
    assert "all ranks joined the same" in name_the_late(tmp_path, 3)
    assert name_the_late(tmp_path, 4).startswith("rank 3 wrote no stack dump")
    recorder(tmp_path, 2, 5, 9, at=time.time() - 3600)
    assert name_the_late(tmp_path, 3).startswith("rank 2 wrote no stack dump")
