"""A launched run of the real trainer with two ranks. Rank 1 is killed."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vjepa.config import Run
from vjepa_data.config_files import dump_settings
from vjepa_launch import history, job_control, status, submit
from vjepa_launch.request import Request, train_command
from vjepa_launch.settings import Cluster

MACHINE = Cluster(executor="local", tasks_per_node=2)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[[Run, str], submit.Launched]]:
    launched: list[submit.Launched] = []

    def start(run: Run, name: str) -> submit.Launched:
        folder = tmp_path / name
        request = Request(folder, MACHINE, train_command(folder), config=dump_settings(run), name=name)
        launched.append(submit.launch(request))
        return launched[-1]

    yield start
    for job in launched:
        if job_control.is_alive("local", job.job):
            job_control.cancel("local", job.job)


def losses(folder: Path) -> dict[int, float]:
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["step"]: row["loss/prediction"] for row in rows}


def rank_pid(folder: Path, rank: int) -> int:
    """Find the process of a rank by its environment."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"{folder}/config.yaml".encode() in command and f"RANK={rank}".encode() in environment:
            return int(process.name)
    raise AssertionError(f"rank {rank} has no process")


@pytest.mark.timeout(900)
def test_a_killed_rank_does_not_change_the_losses(
    launch: Callable[[Run, str], submit.Launched], tiny_run: Callable[..., Run]
) -> None:
    run = tiny_run(steps=150, checkpoint={"every_steps": 20}, track={"wandb": "off", "every_steps": 1})
    killed = launch(run, "killed")
    deadline = time.monotonic() + 200
    while max(losses(killed.run), default=0) < 30:
        assert time.monotonic() < deadline, killed.log.read_text()
        time.sleep(0.05)
    os.kill(rank_pid(killed.run, 1), signal.SIGKILL)
    log = "".join(status.read_log(killed.run, follow=True))
    events = history.read_events(killed.run)
    assert [event["outcome"] for event in events if event["event"] == "end"] == ["failed", "done"], log

    undisturbed = launch(run, "undisturbed")
    list(status.read_log(undisturbed.run, follow=True))
    assert losses(killed.run) == losses(undisturbed.run)
    assert max(losses(undisturbed.run)) == 150
