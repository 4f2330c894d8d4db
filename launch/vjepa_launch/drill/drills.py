"""Rehearse what can happen to a run, and see what becomes of it: `vjepa drill --on CLUSTER`.

Each drill launches a small run of the stand-in trainer (steps, checkpoints and signals as `vjepa train` has them, but
no torch), does something to it, and then checks every step against a run that nothing disturbed.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from vjepa_launch import history, slurm
from vjepa_launch.drill.drill_run import DrillRun
from vjepa_launch.settings import BadInput, Cluster, Restart

STEP_S = 0.05


@dataclass(frozen=True)
class Drill:
    """One thing that can happen, and what must become of a run."""

    name: str
    fault: str
    """What happens, for the table."""
    expected: tuple[str, ...]
    """Outcomes of the attempts, in order."""
    steps: int = 60
    every: int = 20
    """Steps between checkpoints."""
    act: Callable[[DrillRun], None] | None = None
    """What is done from outside, once the run is launched."""
    inject: Mapping[str, Any] | None = None
    """What a rank does to itself."""
    finishes: bool = True
    """Whether all steps must be there in the end; otherwise all up to the last one that was recorded."""
    save_s: float = 0.0
    """Seconds that a checkpoint takes."""
    profile: Mapping[str, Any] = field(default_factory=dict)
    """What the profile of the cluster must say for it."""
    on: tuple[str, ...] = ("local", "slurm")
    """Executors where it can happen."""


@dataclass(frozen=True)
class Result:
    """What became of a run."""

    drill: Drill
    folder: Path
    seen: tuple[str, ...]
    lost: int
    """Steps that are missing or wrong."""
    replayed: int
    """Steps done again, exactly as before."""
    recovery_s: float | None
    """Seconds from the first end to the first step after it."""
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
    except BadInput:
        return
    raise AssertionError("a second job was let onto the folder")


def _change_code(run: DrillRun) -> None:
    with (run.folder / "code" / "vjepa_launch" / "drill" / "dummy_trainer.py").open("a") as file:
        file.write("# changed\n")
    run.ask_to_return()


def drills(cluster: Cluster) -> list[Drill]:
    """All drills for a cluster of at least two ranks."""
    last = cluster.nodes * cluster.ranks_per_node - 1
    # SLURM looks at its clock every 30 s, so that a limit of one minute gives notice after about half a minute.
    minute = {"hours": 1 / 60, "notice_s": 10}
    # SIGURG, which nobody hears, in place of USR2: the limit comes unannounced, as when it comes before a save is over.
    unannounced = {**minute, "sbatch": {**cluster.sbatch, "signal": "URG@10"}}
    known = [
        Drill("return", "told to save and come back (USR2)", ("stopped", "done"), every=1000,
              act=lambda run: _after_steps(run, 10, run.ask_to_return)),
        Drill("return-early", "the same before it listens", ("stopped", "done"), steps=120, every=1000,
              act=_return_early),
        Drill("return-twice", "the same, twice in a row", ("stopped", "done"), every=1000, act=_return_twice),
        Drill("kill-first", "kill -9 of rank 0", ("failed", "done"), inject={"rank": 0, "step": 30, "do": "kill"}),
        Drill("kill-last", f"kill -9 of rank {last}", ("failed", "done"),
              inject={"rank": last, "step": 30, "do": "kill"}),
        Drill("suspend", f"rank {last} is suspended (SIGSTOP)", ("failed", "done"),
              inject={"rank": last, "step": 30, "do": "suspend"}),
        Drill("hang", f"rank {last} waits for ever", ("failed", "done"), profile={"restart": Restart(stall_min=0.25)},
              inject={"rank": last, "step": 30, "do": "sleep"}),
        Drill("crash-loop", "fails at the same step each time", ("failed",) * 4, finishes=False,
              inject={"rank": last, "step": 30, "do": "1", "restarts": 99}),
        Drill("refuse", "refuses its input (exit code 2)", ("bad_input",), finishes=False,
              inject={"rank": last, "step": 30, "do": "2", "restarts": 99}),
        Drill("cancel", "cancelled by the user", ("cancelled",), steps=2000, every=1000, save_s=2, finishes=False,
              act=lambda run: _after_steps(run, 10, run.cancel)),
        Drill("stop", "cancelled after a checkpoint", ("stopped",), steps=2000, every=1000, finishes=False,
              act=lambda run: _after_steps(run, 10, partial(_stop_after_checkpoint, run))),
        Drill("two-jobs", "launched again while it runs", ("done",), steps=120,
              act=lambda run: _after_steps(run, 10, partial(_launch_again, run, cluster))),
        Drill("change-code", "frozen code was changed", ("stopped", "bad_input"), steps=2000, every=1000,
              finishes=False, act=lambda run: _after_steps(run, 10, partial(_change_code, run))),
        Drill("requeue", "started again by the scheduler (TERM)", ("stopped", "done"), steps=120, every=1000, save_s=2,
              on=("slurm",), act=lambda run: _after_steps(run, 10, partial(slurm.requeue, run.job))),
        Drill("time-limit", "its time is nearly over", ("stopped", "stopped"), steps=100_000, every=100_000,
              on=("slurm",), profile=minute, finishes=False, act=_stop_after_restart),
        Drill("no-notice", "its time is over, unannounced", ("stopped", "stopped"), steps=100_000, every=100_000,
              save_s=2, on=("slurm",), profile=unannounced, finishes=False, act=_stop_after_restart),
    ]  # fmt: skip
    return [drill for drill in known if cluster.executor in drill.on]


def with_two_ranks(cluster: Cluster) -> Cluster:
    """The profile, with a second rank on this machine if it has one: a stand-in needs no core or GPU of its own."""
    is_lone = cluster.executor == "local" and cluster.ranks_per_node == 1
    return cluster.model_copy(update={"tasks_per_node": 2}) if is_lone else cluster


def choose(cluster: Cluster, only: Sequence[str]) -> list[Drill]:
    """The drills of these names, or all.

    Raises:
        BadInput: a name is unknown, or the cluster has fewer than two ranks.
    """
    ranks = cluster.nodes * cluster.ranks_per_node
    if ranks < 2:
        raise BadInput(f"a drill needs two ranks, and this profile has {ranks}; set tasks_per_node: 2, or --nodes 2")
    known = {drill.name: drill for drill in drills(cluster)}
    for name in only:
        if name not in known:
            raise BadInput(f"{name} is not a drill; there are {', '.join(known)}")
    return [known[name] for name in only] if only else list(known.values())


def rehearse(drill: Drill, folder: Path, cluster: Cluster, *, timeout_s: float = 600.0) -> Result:
    """Launch a run, let the drill happen to it, wait for its end and look at every step."""
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
    seen = tuple(run.outcomes())
    lost = len(run.wrong_steps(steps)) if run.step() else steps
    # Whoever was stopped in good order has saved, so that nothing is left to be lost.
    if seen and seen[-1] in ("stopped", "cancelled") and history.newest_checkpoint(run.folder) != run.step():
        lost, note = lost + 1, "stopped without a checkpoint of the last step"
    passed = seen == drill.expected and not lost and not note
    return Result(drill, run.folder, seen, lost, run.replayed() if run.step() else 0, _recovery(run), passed, note)


def _recovery(run: DrillRun) -> float | None:
    ends, starts = run.events("end"), run.events("start")
    if len(starts) < 2 or not ends:
        return None
    later = [row["time"] for row in run.metrics() if row["time"] > starts[1]["time"]]
    return later[0] - ends[0]["time"] if later else None


def rehearse_all(chosen: Sequence[Drill], folder: Path, cluster: Cluster, *, at_once: int = 1) -> Iterator[Result]:
    """Results as they come, in the order asked for. Folders are named after the drills."""
    with ThreadPoolExecutor(at_once) as pool:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        jobs = [pool.submit(rehearse, drill, folder / stamp / drill.name, cluster) for drill in chosen]
        for job in jobs:
            yield job.result()


def table(results: Sequence[Result]) -> str:
    """Results as text."""
    rows = [("drill", "what happens", "expected", "seen", "lost", "replayed", "recovery", "")]
    for result in results:
        rows.append(
            (
                result.drill.name,
                result.drill.fault,
                " > ".join(result.drill.expected),
                " > ".join(result.seen) or "-",
                str(result.lost),
                str(result.replayed),
                "-" if result.recovery_s is None else f"{result.recovery_s:.1f} s",
                "ok" if result.passed else f"FAILED {result.note}".rstrip(),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
