"""What becomes of runs on a real SLURM: two nodes whose names do not resolve, two ranks each, no accounting.

The runs are started together at first, and each test looks at one of them: a requeued job waits for about ten seconds,
and waiting is better done at the same time.
"""

import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vjepa_launch import drill, status, sweep
from vjepa_launch.drill import Drill, Result
from vjepa_launch.rehearsal import Rehearsal
from vjepa_launch.settings import Cluster

PROFILE = Cluster(executor="slurm", nodes=2, tasks_per_node=2, cpus_per_task=1, hours=1, notice_s=30)
# The rest is rehearsed on one machine (tests/launch), where a restart takes no ten seconds; `vjepa drill` runs all.
DRILLS = ["return", "return-early", "kill-last", "suspend", "crash-loop", "cancel", "stop"]

# SLURM looks at its clock every 30 s, so that a limit of one minute gives notice after about half a minute.
ONE_MINUTE = PROFILE.model_copy(update={"hours": 1 / 60, "notice_s": 10})
TIME_LIMIT = Drill("time-limit", "its time is over", ("stopped", "done"), steps=900, every=10_000)

# SIGURG, which nobody hears, in place of USR2: the limit comes unannounced, as when it comes before a save is over.
UNANNOUNCED = ONE_MINUTE.model_copy(update={"sbatch": {"signal": "URG@10"}})
NO_NOTICE = Drill("no-notice", "its time is over, unannounced", ("stopped", "done"), steps=1900, every=10_000)

# The first request to requeue is refused.
BROKEN_SCONTROL = """#!/bin/sh
echo "$@" >> {count}
[ "$1" = requeue ] || exec {real} "$@"
calls=$(grep -c '^requeue' {count})
[ "$calls" = 1 ] && exit 1
exec {real} "$@"
"""
BROKEN = Drill("scontrol", "scontrol refuses once", ("stopped", "done"), every=1000,
               act=lambda run: run.wait_for(lambda: run.step() >= 10, 300) or run.ask_to_return())  # fmt: skip


@pytest.fixture(scope="module")
def results(slurm: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Any]]]:
    """What is under way, by name."""
    folder = tmp_path_factory.mktemp("drills")
    chosen = [(NO_NOTICE, UNANNOUNCED), (TIME_LIMIT, ONE_MINUTE), (BROKEN, with_broken_scontrol(folder))]
    chosen += [(one, PROFILE) for one in drill.choose(PROFILE, DRILLS)]
    with ThreadPoolExecutor(6) as pool:
        under_way: dict[str, Future[Any]] = {
            one.name: pool.submit(drill.rehearse, one, folder / one.name, on) for one, on in chosen
        }
        under_way["array"] = pool.submit(run_array, folder / "array")
        under_way["bad-node"] = pool.submit(run_on_a_bad_node, folder / "bad-node")
        yield under_way


@pytest.mark.parametrize("name", [*DRILLS, "scontrol"])
def test_nothing_is_lost(results: dict[str, Future[Result]], name: str) -> None:
    result = results[name].result()
    assert result.passed, drill.table([result])


BEST_EFFORT = pytest.mark.xfail(strict=False, reason="KillWait is all the time there is, which a busy machine exceeds")


@pytest.mark.parametrize("name", ["time-limit", pytest.param("no-notice", marks=BEST_EFFORT)])
def test_a_time_limit_loses_and_repeats_no_step(results: dict[str, Future[Result]], name: str) -> None:
    result = results[name].result()
    assert (result.lost, result.replayed) == (0, 0)
    assert set(result.seen[:-1]) == {"stopped"}, drill.table([result])
    assert result.seen[-1] == "done"


def test_a_node_on_which_a_run_failed_twice_is_left_out(results: dict[str, Future[Rehearsal]]) -> None:
    run = results["bad-node"].result()
    first, second, third = [event["nodes"] for event in run.events("start")]
    assert first == second != third, run.log()
    assert run.outcomes() == ["failed", "failed", "done"]
    assert run.wrong_steps(20) == []


def test_an_element_of_an_array_comes_back_alone(results: dict[str, Future[list[Path]]]) -> None:
    runs = results["array"].result()
    statuses, _ = status.read_all(runs)
    assert [(one.state, one.attempts) for one in statuses] == [("done", 1), ("done", 2), ("done", 1)]
    assert len({(one.job or "").partition("_")[0] for one in statuses}) == 1
    assert all("done" in "".join(status.read_log(run, rank=1)) for run in runs)


def test_names_that_do_not_resolve_are_replaced_by_addresses(results: dict[str, Future[Result]]) -> None:
    folder = results["return"].result().folder
    log = "".join(status.read_log(folder))
    assert "on n1, rank 0 at 127.0.0.1:" in log


def with_broken_scontrol(folder: Path) -> Cluster:
    shim = folder / "bin" / "scontrol"
    shim.parent.mkdir()
    real = subprocess.run(["which", "scontrol"], capture_output=True, text=True, check=True).stdout.strip()
    shim.write_text(BROKEN_SCONTROL.format(count=folder / "calls", real=real))
    shim.chmod(0o755)
    return PROFILE.model_copy(update={"setup": (f"export PATH={shim.parent}:$PATH",)})


def run_on_a_bad_node(folder: Path) -> Rehearsal:
    """Fails twice at the same step; one node is enough for it."""
    run = Rehearsal(folder, "--steps", "20")
    run.inject(rank=1, step=5, do="kill", restarts=2)
    run.launch(PROFILE.model_copy(update={"nodes": 1}))
    run.wait(300)
    return run


def run_array(folder: Path) -> list[Path]:
    """Three elements, of which the middle one is told to come back."""
    runs = [(f"{number:03d}", "name: tiny\nsteps: 200\n") for number in range(3)]
    cluster = PROFILE.model_copy(update={"nodes": 1})

    def command(run: Path) -> list[str]:
        return ["python", "-m", "vjepa_launch.stand_in", str(run), "--steps", "100", "--every", "1000"]

    launched = sweep.launch(folder, cluster, runs, command, name="array", at_once=3)
    middle = Rehearsal.of(launched[1].run)
    middle.wait_for(lambda: middle.step() >= 10, 300)
    status.requeue(middle.folder)
    for one in launched:
        Rehearsal.of(one.run).wait(300)
    return [one.run for one in launched]
