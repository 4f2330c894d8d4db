"""Disturb small runs in every way that happens on a cluster, and check the result: `vjepa drill --on CLUSTER`.

Each drill launches a small run of the dummy trainer (steps, checkpoints and signals as in `vjepa train`, but no torch),
disturbs it, and compares every step with an undisturbed run.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from vjepa_launch import history, slurm, tables
from vjepa_launch.drill.drill_run import DrillRun
from vjepa_launch.settings import BadLaunch, Cluster, Restart

STEP_S = 0.05


@dataclass(frozen=True)
class Drill:
    """A disturbance, and the outcomes it must lead to."""

    name: str
    fault: str
    """Description of the disturbance, for the table."""
    expected: tuple[str, ...]
    """Outcomes of the attempts, in order."""
    steps: int = 60
    every: int = 20
    """Steps between checkpoints."""
    act: Callable[[DrillRun], None] | None = None
    """Disturbance from outside, after the launch."""
    inject: Mapping[str, Any] | None = None
    """Fault that a rank causes itself (`DrillRun.inject`)."""
    finishes: bool = True
    """True if all steps must be recorded. Otherwise the steps up to the last recorded step are checked."""
    save_s: float = 0.0
    """Duration of a checkpoint, seconds."""
    profile: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the cluster profile to override."""
    on: tuple[str, ...] = ("local", "slurm")
    """Executors on which it can happen."""


@dataclass(frozen=True)
class DrillResult:
    """The result of a drill."""

    drill: Drill
    folder: Path
    outcomes: tuple[str, ...]
    lost: int
    """Steps that are missing or wrong."""
    replayed: int
    """Steps that were repeated, with the same loss."""
    recovery_s: float | None
    """Seconds from the end of the first attempt to the first step after it."""
    passed: bool
    note: str


def _after_steps(run: DrillRun, steps: int, act: Callable[[], object]) -> None:
    run.wait_for(lambda: run.step() >= steps, timeout_s=300)
    act()


def _return_early(run: DrillRun) -> None:
    run.wait_for(lambda: run.events("start"), timeout_s=300)
    run.ask_to_return()


def _return_twice(run: DrillRun) -> None:
    _after_steps(run, 10, run.ask_to_return)
    run.ask_to_return()


def _stop_after_checkpoint(run: DrillRun) -> None:
    history.stop_path(run.folder).touch()
    run.ask_to_return()


def _stop_after_restart(run: DrillRun) -> None:
    run.wait_for(lambda: len(run.events("start")) == 2 and run.events("end"), timeout_s=600)
    _after_steps(run, run.events("end")[0]["checkpoint"] + 10, partial(_stop_after_checkpoint, run))


def _launch_again(run: DrillRun, cluster: Cluster) -> None:
    try:
        run.launch(cluster)
    except BadLaunch:
        return
    raise AssertionError("a second job was launched into the run folder")


def _change_code(run: DrillRun) -> None:
    with (run.folder / "code" / "vjepa_launch" / "drill" / "dummy_trainer.py").open("a") as file:
        file.write("# changed\n")
    run.ask_to_return()


def drills(cluster: Cluster) -> list[Drill]:
    """Return all drills for a cluster with at least two ranks."""
    last = cluster.nodes * cluster.ranks_per_node - 1
    # SLURM checks its clock every 30 s, so that a limit of a minute gives notice after about half a minute.
    minute = {"hours": 1 / 60, "notice_s": 10}
    # No process handles SIGURG. With it instead of USR2 the limit comes without notice, as it does during a long save.
    without_notice = {**minute, "sbatch": {**cluster.sbatch, "signal": "URG@10"}}
    known = [
        Drill("return", "asked to save and requeue (USR2)", ("stopped", "done"), every=1000,
              act=lambda run: _after_steps(run, 10, run.ask_to_return)),
        Drill("return-early", "the same before it has a handler", ("stopped", "done"), steps=120, every=1000,
              act=_return_early),
        Drill("return-twice", "the same, twice in a row", ("stopped", "done"), every=1000, act=_return_twice),
        Drill("kill-first", "kill -9 of rank 0", ("failed", "done"), inject={"rank": 0, "step": 30, "do": "kill"}),
        Drill("kill-last", f"kill -9 of rank {last}", ("failed", "done"),
              inject={"rank": last, "step": 30, "do": "kill"}),
        Drill("suspend", f"rank {last} is suspended (SIGSTOP)", ("failed", "done"),
              inject={"rank": last, "step": 30, "do": "suspend"}),
        Drill("hang", f"rank {last} stalls", ("failed", "done"), profile={"restart": Restart(stall_min=0.25)},
              inject={"rank": last, "step": 30, "do": "sleep"}),
        Drill("crash-loop", "fails at the same step each time", ("failed",) * 4, finishes=False,
              inject={"rank": last, "step": 30, "do": "1", "restarts": 99}),
        Drill("refuse", "rejects its input (exit code 2)", ("bad_input",), finishes=False,
              inject={"rank": last, "step": 30, "do": "2", "restarts": 99}),
        Drill("cancel", "cancelled by the user", ("cancelled",), steps=2000, every=1000, save_s=2, finishes=False,
              act=lambda run: _after_steps(run, 10, run.cancel)),
        Drill("stop", "cancelled after a checkpoint", ("stopped",), steps=2000, every=1000, finishes=False,
              act=lambda run: _after_steps(run, 10, partial(_stop_after_checkpoint, run))),
        Drill("two-jobs", "launched again while it runs", ("done",), steps=120,
              act=lambda run: _after_steps(run, 10, partial(_launch_again, run, cluster))),
        Drill("change-code", "frozen code is changed", ("stopped", "bad_input"), steps=2000, every=1000,
              finishes=False, act=lambda run: _after_steps(run, 10, partial(_change_code, run))),
        Drill("requeue", "requeued by the scheduler (TERM)", ("stopped", "done"), steps=120, every=1000, save_s=2,
              on=("slurm",), act=lambda run: _after_steps(run, 10, partial(slurm.requeue, run.job))),
        Drill("time-limit", "time limit, with notice", ("stopped", "stopped"), steps=100_000, every=100_000,
              on=("slurm",), profile=minute, finishes=False, act=_stop_after_restart),
        Drill("no-notice", "time limit, without notice", ("stopped", "stopped"), steps=100_000, every=100_000,
              save_s=2, on=("slurm",), profile=without_notice, finishes=False, act=_stop_after_restart),
    ]  # fmt: skip
    return [drill for drill in known if cluster.executor in drill.on]


def with_two_ranks(cluster: Cluster) -> Cluster:
    """Add a second rank to a profile with a single rank on this machine. Dummy trainers can share a core."""
    is_single = cluster.executor == "local" and cluster.ranks_per_node == 1
    return cluster.model_copy(update={"tasks_per_node": 2}) if is_single else cluster


def choose(cluster: Cluster, only: Sequence[str]) -> list[Drill]:
    """Return the drills with these names, or all drills.

    Raises:
        BadLaunch: a name is unknown, or the cluster has fewer than two ranks.
    """
    ranks = cluster.nodes * cluster.ranks_per_node
    if ranks < 2:
        raise BadLaunch(f"drills need two ranks, but this profile has {ranks}; set tasks_per_node: 2, or use --nodes 2")
    known = {drill.name: drill for drill in drills(cluster)}
    for name in only:
        if name not in known:
            raise BadLaunch(f"unknown drill '{name}'; choose from {', '.join(known)}")
    return [known[name] for name in only] if only else list(known.values())


def rehearse(drill: Drill, folder: Path, cluster: Cluster, *, timeout_s: float = 600.0) -> DrillResult:
    """Launch a run, disturb it, wait for its end, and check every step."""
    options = {"--steps": drill.steps, "--every": drill.every, "--step-s": STEP_S, "--save-s": drill.save_s}
    run = DrillRun(folder, *(str(word) for pair in options.items() for word in pair))
    cluster = cluster.model_copy(update={"restart": Restart(), **drill.profile})
    if drill.inject:
        run.inject(**drill.inject)
    run.launch(cluster)
    note = ""
    try:
        if drill.act:
            drill.act(run)
        run.wait(timeout_s)
    except (TimeoutError, AssertionError) as error:
        note = str(error).partition("\n")[0]
        run.cancel()
    steps = drill.steps if drill.finishes else run.step()
    outcomes = tuple(run.outcomes())
    lost = len(run.wrong_steps(steps)) if run.step() else steps
    # A run that saved and stopped must have a checkpoint of its last step.
    if outcomes and outcomes[-1] in ("stopped", "cancelled") and history.newest_checkpoint(run.folder) != run.step():
        lost, note = lost + 1, "stopped without a checkpoint of the last step"
    passed = outcomes == drill.expected and not lost and not note
    replayed = run.replayed() if run.step() else 0
    return DrillResult(drill, run.folder, outcomes, lost, replayed, _recovery_s(run), passed, note)


def _recovery_s(run: DrillRun) -> float | None:
    """Return the seconds from the end of the first attempt to the first step after it."""
    ends, starts = run.events("end"), run.events("start")
    if len(starts) < 2 or not ends:
        return None
    later = [row["time"] for row in run.metrics() if row["time"] > starts[1]["time"]]
    return later[0] - ends[0]["time"] if later else None


def rehearse_all(chosen: Sequence[Drill], folder: Path, cluster: Cluster, *, at_once: int = 1) -> Iterator[DrillResult]:
    """Yield the results of drills in order, each as soon as it is available. Run folders are named after the drills."""
    with ThreadPoolExecutor(at_once) as pool:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        jobs = [pool.submit(rehearse, drill, folder / stamp / drill.name, cluster) for drill in chosen]
        for job in jobs:
            yield job.result()


def table(results: Sequence[DrillResult]) -> str:
    """Return results as a text table."""
    rows = [
        (
            result.drill.name,
            result.drill.fault,
            " > ".join(result.drill.expected),
            " > ".join(result.outcomes) or "-",
            str(result.lost),
            str(result.replayed),
            "-" if result.recovery_s is None else f"{result.recovery_s:.1f} s",
            "ok" if result.passed else f"FAILED {result.note}".rstrip(),
        )
        for result in results
    ]
    header = ("drill", "disturbance", "expected", "outcomes", "lost", "replayed", "recovery", "")
    return tables.render(rows, header=header)
