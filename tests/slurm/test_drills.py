"""Drills on a real SLURM: two nodes whose names do not resolve, two ranks each, no accounting.

All runs start together, and each test checks a run, because a requeued job waits for about ten seconds.
"""

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vjepa_launch import array, slurm, status
from vjepa_launch.array import Array, Element
from vjepa_launch.drill import drills
from vjepa_launch.drill.drill_run import DrillRun
from vjepa_launch.drill.drills import DrillResult
from vjepa_launch.settings import Cluster, Restart

pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.timeout(900)]

PROFILE = Cluster(executor="slurm", nodes=2, tasks_per_node=2, cpus_per_task=1, hours=1, notice_s=30)
# tests/launch has the other drills, on one machine, where a restart is faster. `vjepa drill` runs all.
DRILLS = ["no-notice", "time-limit", "return", "return-early", "kill-last", "suspend", "crash-loop", "cancel", "stop",
          "requeue"]  # fmt: skip

# Name: the drill, and the fault of the first call of a subcommand of scontrol.
FAULTS = {"rejecting": ("return", "requeue) exit 1"), "hanging": ("kill-last", "show|requeue) exec sleep 3600"),
          "hanging-cancel": ("cancel", "show) exec sleep 3600")}  # fmt: skip
SCONTROL = """#!/bin/sh
echo "$1" >> {folder}/calls
[ "$(grep -cx "$1" {folder}/calls)" = 1 ] && case "$1" in {fault};; esac
exec {real} "$@"
"""


AT_ONCE = 8
"""Runs at the same time. All 18 at once delay each other, and tests on other workers, beyond their time limits."""


@pytest.fixture(scope="module")
def results(slurm: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Any]]]:
    """Start all runs, and yield their futures by name."""
    folder = tmp_path_factory.mktemp("drills")
    known = {drill.name: drill for drill in drills.drills(PROFILE)}
    chosen = [(known[name], PROFILE) for name in DRILLS]
    chosen += [
        (replace(known[base], name=name), with_faulty_scontrol(folder / f"{name}-bin", fault))
        for name, (base, fault) in FAULTS.items()
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures: dict[str, Future[Any]] = {
            drill.name: pool.submit(drills.rehearse, drill, folder / drill.name, profile) for drill, profile in chosen
        }
        futures["array"] = pool.submit(run_array, folder / "array")
        futures["two-jobs"] = pool.submit(run_of_two_jobs, folder / "two-jobs")
        futures["bad-node"] = pool.submit(run_on_a_bad_node, folder / "bad-node")
        yield futures


@pytest.mark.parametrize("name", [*DRILLS, *FAULTS])
def test_a_drill_loses_no_step(results: dict[str, Future[DrillResult]], name: str) -> None:
    """And only a failure repeats steps."""
    result = results[name].result()
    assert result.passed, drills.table([result])
    assert result.replayed == 0 or "failed" in result.outcomes


def test_a_cancelled_run_is_cancelled_in_slurm(results: dict[str, Future[DrillResult]]) -> None:
    shown = slurm.show_job(DrillRun.of(results["cancel"].result().folder).job)
    assert (shown["JobState"], shown["Restarts"]) == ("CANCELLED", "0")


def test_a_node_with_two_failures_is_excluded_on_slurm(results: dict[str, Future[DrillRun]]) -> None:
    """The three failures fall on two nodes, so that a node has two of them."""
    run = results["bad-node"].result()
    *failed, last = [event["nodes"][0] for event in run.events("start")]
    assert run.outcomes() == ["failed", "failed", "failed", "done"], run.log()
    assert failed.count(last) == 1, run.log()
    assert run.wrong_steps(20) == []


def test_a_job_that_no_longer_owns_its_folder_does_not_start(results: dict[str, Future[DrillRun]]) -> None:
    run = results["two-jobs"].result()
    (end,) = [event for event in run.events("end") if event["outcome"] != "done"]
    assert (end["outcome"], end["requeue"]) == ("bad_input", False)
    assert f"belongs to job {run.job} now" in end["reason"]
    assert run.wrong_steps(20) == []


def test_one_element_of_an_array_is_requeued_alone(results: dict[str, Future[list[Path]]]) -> None:
    runs = results["array"].result()
    statuses, _ = status.read_all(runs)
    assert [(run.state, run.attempts) for run in statuses] == [("done", 1), ("done", 2), ("done", 1)]
    assert len({(run.job or "").partition("_")[0] for run in statuses}) == 1
    assert all("done" in "".join(status.read_log(run, rank=1)) for run in runs)


def test_an_unresolvable_node_name_becomes_an_address(slurm: Any, results: dict[str, Future[DrillResult]]) -> None:
    folder = results["return"].result().folder
    log = "".join(status.read_log(folder))
    assert f"on {slurm.nodes[0]}, rank 0 at 127.0.0.1:" in log


def with_faulty_scontrol(folder: Path, fault: str) -> Cluster:
    """Return a profile whose jobs find a faulty scontrol first."""
    folder.mkdir()
    wrapper = folder / "scontrol"
    wrapper.write_text(SCONTROL.format(folder=folder, fault=fault, real=shutil.which("scontrol")))
    wrapper.chmod(0o755)
    return PROFILE.model_copy(update={"setup": (f"export PATH={folder}:$PATH",)})


def run_on_a_bad_node(folder: Path) -> DrillRun:
    """Run on a single node and fail three times at the same step."""
    run = DrillRun(folder, "--steps", "20")
    run.inject(rank=1, step=5, do="kill", restarts=3)
    run.launch(PROFILE.model_copy(update={"nodes": 1, "restart": Restart(attempts=4, node_failures=2)}))
    run.wait(300)
    return run


def run_of_two_jobs(folder: Path) -> DrillRun:
    """Queue a job, give its folder to a second job by hand, and then start the first."""
    run = DrillRun(folder, "--steps", "20")
    first = run.launch(PROFILE.model_copy(update={"sbatch": {"begin": "now+1hour"}}))
    (folder / "launch" / "job.json").unlink()
    run.launch(PROFILE)
    run.wait(300)
    slurm.run_command("scontrol", "update", f"JobId={first.job}", "StartTime=now")
    run.wait_for(lambda: not slurm.queued_jobs()[first.job].is_alive, 300, poll_s=0.5)
    return run


def run_array(folder: Path) -> list[Path]:
    """Run three elements, and ask the second to requeue."""
    elements = [
        Element(
            name,
            tuple(DrillRun(folder / name, "--steps", "100", "--every", "1000").command),
            "name: tiny\nsteps: 200\n",
        )
        for name in ("000", "001", "002")
    ]
    cluster = PROFILE.model_copy(update={"nodes": 1})
    launched = array.launch(Array(folder, cluster, elements, name="array", at_once=3))
    middle = DrillRun.of(launched[1].run)
    middle.wait_for(lambda: middle.step() >= 10, 300)
    status.requeue(middle.folder)
    for job in launched:
        DrillRun.of(job.run).wait(300)
    return [job.run for job in launched]
