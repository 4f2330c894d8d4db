"""The real trainer on a real SLURM: disturbed processes do not change the metrics."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vjepa.config import Run
from vjepa_data.config_files import dump_settings
from vjepa_launch import slurm, submit
from vjepa_launch.drill.drill_run import DrillRun
from vjepa_launch.request import Request, train_command
from vjepa_launch.settings import Cluster

pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.timeout(900)]

PROFILE = Cluster(executor="slurm", nodes=2, tasks_per_node=1, cpus_per_task=2, hours=1, notice_s=60)
STEPS = 300


def test_a_disturbed_run_is_bit_identical_to_an_undisturbed_run(
    linuxproc_slurm: Any, tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = tiny_run(
        steps=STEPS,
        checkpoint={"every_steps": 10_000},
        track={"wandb": "offline", "every_steps": 1},
        loader={"workers": 1, "start_method": "fork"},
    )
    undisturbed, disturbed = (launch(run, tmp_path / name) for name in ("undisturbed", "disturbed"))
    after_steps(disturbed, 10)
    disturbed.ask_to_return()
    after_steps(disturbed, 10, attempt=2)
    os.kill(loader_worker(disturbed.folder, rank=1), signal.SIGKILL)
    after_steps(disturbed, 30, attempt=2)
    assert slurm.requeue(disturbed.job)  # every process receives TERM, including loader workers
    assert disturbed.wait(600)["outcome"] == "done", disturbed.log()
    assert undisturbed.wait(600)["outcome"] == "done", undisturbed.log()

    assert disturbed.outcomes() == ["stopped", "stopped", "done"], disturbed.log()
    assert undisturbed.outcomes() == ["done"]
    # Each attempt resumes at the last step of the attempt before, so no step is lost or repeated.
    assert [end["checkpoint"] for end in disturbed.events("end")][:-1] == [
        start["checkpoint"] for start in disturbed.events("start")
    ][1:]
    assert step_metrics(disturbed) == step_metrics(undisturbed)
    assert [row["step"] for row in disturbed.metrics()] == list(range(1, STEPS + 1))
    assert "restarting all workers" in disturbed.log()
    recorded = list(disturbed.folder.glob("wandb/offline-run-*"))
    assert len(recorded) == 3
    assert {folder.name.split("-")[3] for folder in recorded} == {
        (disturbed.folder / "wandb" / "id").read_text().strip()
    }


def launch(run: Run, folder: Path) -> DrillRun:
    submit.launch(Request(folder, PROFILE, train_command(folder), config=dump_settings(run), name=folder.name))
    return DrillRun.of(folder)


def after_steps(run: DrillRun, steps: int, *, attempt: int = 1) -> None:
    """Wait until an attempt has made `steps` steps."""
    run.wait_for(lambda: len(run.events("start")) == attempt, 300)
    first = run.events("start")[-1]["checkpoint"] or 0
    run.wait_for(lambda: run.step() >= first + steps, 300)


def step_metrics(run: DrillRun) -> list[dict[str, float]]:
    """Return the recorded metrics of every step, without times and speeds."""
    return [
        {name: value for name, value in row.items() if name.startswith(("step", "loss/", "optim/", "masks/"))}
        for row in run.metrics()
    ]


def loader_worker(folder: Path, *, rank: int) -> int:
    """Find a loader worker of a rank: a fork, which has the same command."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            environment = (process / "environ").read_bytes().split(b"\0")
            children = (process / "task" / process.name / "children").read_text().split()
            if f"{folder}/config.yaml".encode() in command and f"RANK={rank}".encode() in environment:
                for child in children:
                    if Path(f"/proc/{child}/cmdline").read_bytes() == command and b"submitit" not in command:
                        return int(child)
        except OSError:
            continue
    raise AssertionError(f"rank {rank} has no loader worker")
