"""Steps that do not come: what is written down, and who is named."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vjepa.config import Health, Run
from vjepa.parallel import World, join
from vjepa.watch.hang import name_the_late, watchdog

MakeRun = Callable[..., Run]


@pytest.fixture(scope="module")
def world(tiny_run: MakeRun) -> Iterator[World]:
    with join(tiny_run().parallel) as world:
        yield world


def test_a_stall_leaves_the_stacks_of_all_threads_and_the_last_collectives_once(world: World, tmp_path: Path) -> None:
    waiting = threading.Event()

    def hangs_here() -> None:
        waiting.wait()

    thread = threading.Thread(target=hangs_here)
    thread.start()
    with watchdog(Health(stall_s=0.2), tmp_path, world) as dog:
        dog.beat("making step 8", step=7)
        file = tmp_path / "stacks" / "rank_00000.txt"
        deadline = time.monotonic() + 10
        while not file.with_suffix(".json").is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        text = file.read_text()
        assert text.count("while making step 8") == 1
        assert "hangs_here" in text
        assert "pg_status" in json.loads(file.with_suffix(".json").read_text())
        dog.beat("making step 9", step=8)
    waiting.set()
    thread.join()


def test_the_first_step_may_take_ten_times_as_long(world: World, tmp_path: Path) -> None:
    with watchdog(Health(stall_s=0.2), tmp_path, world):
        time.sleep(0.6)
    assert not (tmp_path / "stacks").exists()


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


def test_who_has_joined_fewer_collectives_than_others_is_named(tmp_path: Path) -> None:
    for rank, joined in enumerate([(5, 9), (5, 8), (5, 9)]):
        recorder(tmp_path, rank, *joined)
    found = name_the_late(tmp_path, 3)
    assert "rank 1 has not joined nccl:_all_gather_base (number 9 of group 1 shard, [[7]]), in which rank 0" in found
    recorder(tmp_path, 1, 5, 9)
    assert "all ranks have joined the same" in name_the_late(tmp_path, 3)
    assert name_the_late(tmp_path, 4).startswith("rank 3 left no word")
    recorder(tmp_path, 2, 5, 9, at=time.time() - 3600)
    assert name_the_late(tmp_path, 3).startswith("rank 2 left no word")
