"""Preemption, lost nodes, and submissions on a real SLURM."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vjepa_launch import status, submit
from vjepa_launch.drill import drills
from vjepa_launch.drill.drill_run import DrillRun
from vjepa_launch.settings import BadLaunch, Cluster

pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.timeout(900)]

PROFILE = Cluster(executor="slurm", nodes=2, tasks_per_node=2, cpus_per_task=1, hours=1, notice_s=30)
INTRUDER = ["sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap"]


@pytest.fixture
def make_drill_run(slurm: Any, tmp_path: Path) -> Iterator[Callable[..., DrillRun]]:
    created: list[DrillRun] = []

    def make(*options: str) -> DrillRun:
        created.append(DrillRun(tmp_path / f"run{len(created)}", *options))
        return created[-1]

    yield make
    for run in created:
        if run.job and run.is_alive():
            subprocess.run(["scancel", "--signal=KILL", "--full", run.job], check=False)
            subprocess.run(["scancel", run.job], check=False)
            run.wait()


def run_command(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def preempt(run: DrillRun) -> None:
    """Start a short job of higher priority that takes the nodes."""
    run.wait_for(lambda: run.step() >= 10, 120)
    run_command(*INTRUDER, "sleep 2")


@pytest.mark.parametrize("with_signal", [True, False])
def test_preemption_neither_loses_nor_repeats_a_step(
    slurm: Any, make_drill_run: Callable[..., DrillRun], with_signal: bool
) -> None:
    """Ranks receive USR2 with `preempt_send_user_signal`, and TERM without it, as at a cancellation."""
    slurm.up(preempt_signal=with_signal)
    run_command("scontrol", "reconfigure")
    run = make_drill_run("--steps", "100", "--step-s", "0.05", "--every", "1000")
    run.launch(PROFILE)
    preempt(run)
    assert run.wait(180)["outcome"] == "done", run.log()
    assert run.outcomes() == ["stopped", "done"]
    assert run.wrong_steps(100) == []
    assert run.replayed() == 0


def test_ranks_save_when_every_process_receives_term(linuxproc_slurm: Any, tmp_path: Path) -> None:
    """Without the srun shield, srun would receive it too and kill the ranks while they save."""
    (cancel,) = drills.choose(PROFILE, ["cancel"])
    result = drills.rehearse(cancel, tmp_path / "cancel", PROFILE)
    assert result.passed, drills.table([result])


def test_a_run_on_a_lost_node_resumes_on_another_node(slurm: Any, make_drill_run: Callable[..., DrillRun]) -> None:
    run = make_drill_run("--steps", "200", "--step-s", "0.05", "--every", "10")
    run.launch(PROFILE.model_copy(update={"nodes": 1}))
    run.wait_for(lambda: run.step() >= 15, 120)
    (node,) = run.events("start")[0]["nodes"]
    lost = [slurm.mini.node_pid(slurm.folder, node), *processes_of(run.job)]
    try:
        for pid in lost:
            os.kill(pid, signal.SIGKILL)
        run.wait_for(lambda: len(run.events("start")) == 2, 120)
    finally:
        slurm.mini.start_node(slurm.folder, node)
    assert run.wait(120)["outcome"] == "done"
    assert run.events("start")[1]["nodes"] != [node]
    assert run.wrong_steps(200) == []


def processes_of(job: str) -> list[int]:
    """Return all processes of a job on its node, SLURM's step daemons first."""
    daemons, ranks = [], []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if command.startswith(f"slurmstepd: [{job}."):
            daemons.append(int(process.name))
        elif f"SLURM_JOB_ID={job}".encode() in environment:
            ranks.append(int(process.name))
    return daemons + ranks


def test_the_dry_run_shows_the_submitted_batch_script(slurm: Any, make_drill_run: Callable[..., DrillRun]) -> None:
    run = make_drill_run("--steps", "20")
    cluster = PROFILE.model_copy(update={"sbatch": {"begin": "now+1hour"}, "environment": {"A": "b c"}})
    described = submit.describe(run.request(cluster))
    run.launch(cluster)
    submitted = (run.folder / "launch" / f"{run.job}_submission.sh").read_text()
    assert submitted.strip() in described
    (now,), _ = status.read_all([run.folder])
    assert (now.state, now.detail) == ("queued", "BeginTime")
    with pytest.raises(BadLaunch, match=f"in use by job {run.job}"):
        run.launch(cluster)
    assert status.cancel(run.folder) == f"job {run.job} is cancelled"
    run.wait()
    (now,), _ = status.read_all([run.folder])
    assert now.state == "cancelled"


def test_preferences_of_the_shell_do_not_hide_a_waiting_job(
    slurm: Any, make_drill_run: Callable[..., DrillRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second job would be launched onto its folder. `scancel` by hand leaves no record, and SLURM tells of it."""
    for name, value in (("SQUEUE_STATES", "RUNNING"), ("SQUEUE_FORMAT", "%u"), ("SBATCH_PARTITION", "nope")):
        monkeypatch.setenv(name, value)
    run = make_drill_run("--steps", "20")
    cluster = PROFILE.model_copy(update={"sbatch": {"begin": "now+1hour", "export": "NONE"}})
    run.launch(cluster)
    with pytest.raises(BadLaunch, match=f"in use by job {run.job}"):
        run.launch(cluster)
    run_command("scancel", run.job)
    run.wait_for(lambda: not run.is_alive())
    (now,), _ = status.read_all([run.folder])
    assert (now.state, now.detail) == ("cancelled", "while it waited in the queue")


def test_a_run_with_an_odd_name_and_no_inherited_environment_trains(slurm: Any, tmp_path: Path) -> None:
    run = DrillRun(tmp_path / "12:30 50% %j \\ 'ü'", "--steps", "20")
    run.launch(PROFILE.model_copy(update={"sbatch": {"export": "NONE"}}))
    assert run.wait(120)["outcome"] == "done", run.log()
    assert run.wrong_steps(20) == []
    assert "rank 0 done" in "".join(status.read_log(run.folder))


def test_a_rejected_submission_is_an_error_of_one_line(slurm: Any, make_drill_run: Callable[..., DrillRun]) -> None:
    run = make_drill_run("--steps", "20")
    with pytest.raises(BadLaunch, match=r"the job was not submitted: .*invalid partition specified: nope"):
        run.launch(PROFILE.model_copy(update={"partition": "nope"}))
    assert not run.folder.exists()
