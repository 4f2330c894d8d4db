"""What becomes of runs on a real SLURM: two nodes whose names do not resolve, two ranks each, no accounting.

The runs are started together at first, and each test looks at one of them: a requeued job waits for about ten seconds,
and waiting is better done at the same time.
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
from vjepa_launch.drill.drills import Result
from vjepa_launch.settings import Cluster, Restart

pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.timeout(900)]

PROFILE = Cluster(executor="slurm", nodes=2, tasks_per_node=2, cpus_per_task=1, hours=1, notice_s=30)
# The rest is rehearsed on one machine (tests/launch), where a restart takes no ten seconds; `vjepa drill` runs all.
DRILLS = ["no-notice", "time-limit", "return", "return-early", "kill-last", "suspend", "crash-loop", "cancel", "stop",
          "requeue"]  # fmt: skip

# What goes wrong with the first order or question of a kind that a job has for scontrol.
FAULTS = {"refusing": ("return", "requeue) exit 1"), "mute": ("kill-last", "show|requeue) exec sleep 3600"),
          "mute-cancel": ("cancel", "show) exec sleep 3600")}  # fmt: skip
SCONTROL = """#!/bin/sh
echo "$1" >> {folder}/asked
[ "$(grep -cx "$1" {folder}/asked)" = 1 ] && case "$1" in {fault};; esac
exec {real} "$@"
"""


@pytest.fixture(scope="module")
def results(slurm: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Any]]]:
    """What is under way, by name."""
    folder = tmp_path_factory.mktemp("drills")
    known = {one.name: one for one in drills.drills(PROFILE)}
    chosen = [(known[name], PROFILE) for name in DRILLS]
    chosen += [
        (replace(known[what], name=name), with_faulty_scontrol(folder / f"{name}-bin", fault))
        for name, (what, fault) in FAULTS.items()
    ]
    with ThreadPoolExecutor(len(chosen) + 3) as pool:
        under_way: dict[str, Future[Any]] = {
            one.name: pool.submit(drills.rehearse, one, folder / one.name, on) for one, on in chosen
        }
        under_way["array"] = pool.submit(run_array, folder / "array")
        under_way["intruder"] = pool.submit(run_of_two_jobs, folder / "intruder")
        under_way["bad-node"] = pool.submit(run_on_a_bad_node, folder / "bad-node")
        yield under_way


@pytest.mark.parametrize("name", [*DRILLS, *FAULTS])
def test_nothing_is_lost_and_nothing_is_repeated_without_need(results: dict[str, Future[Result]], name: str) -> None:
    result = results[name].result()
    assert result.passed, drills.table([result])
    assert result.replayed == 0 or "failed" in result.seen


def test_a_cancelled_job_is_cancelled_for_slurm_too(results: dict[str, Future[Result]]) -> None:
    shown = slurm.show_job(DrillRun.of(results["cancel"].result().folder).job)
    assert (shown["JobState"], shown["Restarts"]) == ("CANCELLED", "0")


def test_a_node_on_which_a_run_failed_twice_is_left_out(results: dict[str, Future[DrillRun]]) -> None:
    """Of two nodes, one has seen two of three failures, wherever SLURM put them."""
    run = results["bad-node"].result()
    *failed, last = [event["nodes"][0] for event in run.events("start")]
    assert run.outcomes() == ["failed", "failed", "failed", "done"], run.log()
    assert failed.count(last) == 1, run.log()
    assert run.wrong_steps(20) == []


def test_a_job_whose_folder_passed_to_another_refuses_to_start(results: dict[str, Future[DrillRun]]) -> None:
    run = results["intruder"].result()
    (end,) = [event for event in run.events("end") if event["outcome"] != "done"]
    assert (end["outcome"], end["requeue"]) == ("bad_input", False)
    assert f"belongs to job {run.job} now" in end["reason"]
    assert run.wrong_steps(20) == []


def test_an_element_of_an_array_comes_back_alone(results: dict[str, Future[list[Path]]]) -> None:
    runs = results["array"].result()
    statuses, _ = status.read_all(runs)
    assert [(one.state, one.attempts) for one in statuses] == [("done", 1), ("done", 2), ("done", 1)]
    assert len({(one.job or "").partition("_")[0] for one in statuses}) == 1
    assert all("done" in "".join(status.read_log(run, rank=1)) for run in runs)


def test_names_that_do_not_resolve_are_replaced_by_addresses(slurm: Any, results: dict[str, Future[Result]]) -> None:
    folder = results["return"].result().folder
    log = "".join(status.read_log(folder))
    assert f"on {slurm.nodes[0]}, rank 0 at 127.0.0.1:" in log


def with_faulty_scontrol(folder: Path, fault: str) -> Cluster:
    """The profile of jobs that find another scontrol first."""
    folder.mkdir()
    wrapper = folder / "scontrol"
    wrapper.write_text(SCONTROL.format(folder=folder, fault=fault, real=shutil.which("scontrol")))
    wrapper.chmod(0o755)
    return PROFILE.model_copy(update={"setup": (f"export PATH={folder}:$PATH",)})


def run_on_a_bad_node(folder: Path) -> DrillRun:
    """Fails three times at the same step; one node is enough for it."""
    run = DrillRun(folder, "--steps", "20")
    run.inject(rank=1, step=5, do="kill", restarts=3)
    run.launch(PROFILE.model_copy(update={"nodes": 1, "restart": Restart(attempts=4, node_failures=2)}))
    run.wait(300)
    return run


def run_of_two_jobs(folder: Path) -> DrillRun:
    """A job that waits, while its folder is given to another one by hand; then it starts."""
    run = DrillRun(folder, "--steps", "20")
    first = run.launch(PROFILE.model_copy(update={"sbatch": {"begin": "now+1hour"}}))
    (folder / "launch" / "job.json").unlink()
    run.launch(PROFILE)
    run.wait(300)
    slurm.ask("scontrol", "update", f"JobId={first.job}", "StartTime=now")
    run.wait_for(lambda: slurm.state_of(first.job) is None, 300, poll_s=0.5)
    return run


def run_array(folder: Path) -> list[Path]:
    """Three elements, of which the middle one is told to come back."""
    elements = []
    for name in ("000", "001", "002"):
        command = (
            "python",
            "-m",
            "vjepa_launch.drill.dummy_trainer",
            str(folder / name),
            "--steps",
            "100",
            "--every",
            "1000",
        )
        elements.append(Element(name, command, "name: tiny\nsteps: 200\n"))
    cluster = PROFILE.model_copy(update={"nodes": 1})
    launched = array.launch(Array(folder, cluster, elements, name="array", at_once=3))
    middle = DrillRun.of(launched[1].run)
    middle.wait_for(lambda: middle.step() >= 10, 300)
    status.requeue(middle.folder)
    for one in launched:
        DrillRun.of(one.run).wait(300)
    return [one.run for one in launched]
