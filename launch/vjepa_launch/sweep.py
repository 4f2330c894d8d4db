"""Many runs at once: a file of settings to vary, one job array, a run folder for each element.

SWEEP/code/  SWEEP/launch/          shared by all elements
SWEEP/000-optim.lr-0.0003-seed-0/   a run folder like any other; its code/ points to SWEEP/code
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from vjepa_launch import jobs, record, submit
from vjepa_launch.settings import BadInput, Cluster, Settings

MOST_ELEMENTS = 1000
"""SLURM's MaxArraySize is 1001 by default."""


class Sweep(Settings):
    """A file that says what to vary."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,60}$")
    """Name of the sweep; its folder is `runs/NAME` unless told otherwise."""

    config: str
    """The run file that all elements start from: a path, or the name of one that ships with the project."""

    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Setting to values; every combination is an element (`{optim.lr: [1e-4, 3e-4], seed: [0, 1]}`)."""

    elements: tuple[dict[str, Any], ...] = ()
    """In place of a grid, or beside it: elements one by one (`[{optim.lr: 1e-4, steps: 100}]`)."""

    at_once: int = Field(default=256, ge=1)
    """Elements that run at a time."""

    @model_validator(mode="after")
    def _not_empty(self) -> "Sweep":
        if not self.grid and not self.elements:
            raise ValueError("a sweep needs a grid or elements")
        count = len(combinations(self))
        if count > MOST_ELEMENTS:
            raise ValueError(f"{count} elements are more than the {MOST_ELEMENTS} of one array; make several sweeps")
        return self


@dataclass(frozen=True)
class Element:
    """One run of a sweep."""

    name: str
    overrides: tuple[str, ...]
    """`setting=value` with values in YAML, as on the command line."""


def combinations(sweep: Sweep) -> list[dict[str, Any]]:
    """What each element sets."""
    grid = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    return (grid if sweep.grid else []) + list(sweep.elements)


def expand(sweep: Sweep) -> list[Element]:
    """The elements of a sweep, named by their number and what they set."""
    elements = []
    for number, values in enumerate(combinations(sweep)):
        told = "-".join(f"{key}-{_plain(value)}" for key, value in values.items())
        name = f"{number:03d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', told)}"[:80]
        settings = {"name": f"{sweep.name}-{number:03d}", **values}
        elements.append(Element(name, tuple(f"{key}={_plain(value)}" for key, value in settings.items())))
    return elements


def _plain(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def launch(
    folder: Path,
    cluster: Cluster,
    runs: Sequence[tuple[str, str]],
    command: Callable[[Path], Sequence[str]],
    *,
    name: str,
    at_once: int,
    nodes: int | None = None,
    refreeze: bool = False,
) -> list[submit.Launched]:
    """Start the elements of a sweep, or those that are neither done nor alive, as one job array.

    Args:
        folder: of the sweep.
        cluster: where; each element gets as many nodes as a single run would.
        runs: name of the run folder, and text of the resolved settings, of each element.
        command: what each rank of a run executes, from its run folder.
        name: name of the job.
        at_once: elements that run at a time.
        nodes: nodes of each element, in place of the profile's number.
        refreeze: freeze the present code, though the sweep holds code already.

    Raises:
        BadInput: all elements are done or alive; or as for a single run.
    """
    folder = folder.resolve()
    cluster = submit.with_nodes(cluster, nodes)
    with submit.locked(folder):
        open_runs = [(folder / run, config) for run, config in runs if not _is_done_or_alive(folder / run)]
        if not open_runs:
            raise BadInput(f"all {len(runs)} elements of {folder} are done or alive; there is nothing to launch")
        if cluster.executor == "local" and len(open_runs) > at_once:
            raise BadInput(
                f"on this machine all {len(open_runs)} elements would start at once, and at_once is {at_once}; "
                "use a SLURM profile, or a smaller sweep"
            )
        code, note = submit.freeze_once(folder, refreeze)
        tasks = []
        for run, config in open_runs:
            record.launch_folder(run).mkdir(parents=True, exist_ok=True)
            submit.write_config(run, config)
            if not (run / "code").exists():
                (run / "code").symlink_to("../code")
            submit.begin(run, cluster, code)
            tasks.append(submit.make_job(run, cluster, command(run), code=folder / "code"))
        ids = submit.submit(folder, cluster, tasks, name, at_once)
        for (run, _), job in zip(open_runs, ids, strict=True):
            submit.note_owner(run, cluster, job, logs=folder, name=name, command=command(run))
    logs = record.launch_folder(folder)
    return [
        submit.Launched(job, run, logs / f"{job}_0_log.out", record.newest_checkpoint(run), code, note)
        for (run, _), job in zip(open_runs, ids, strict=True)
    ]


def describe(
    folder: Path,
    cluster: Cluster,
    runs: Sequence[tuple[str, str]],
    command: Callable[[Path], Sequence[str]],
    *,
    name: str,
    at_once: int,
    nodes: int | None = None,
) -> str:
    """What `launch` would do, as text: the array, and the settings of its first element in full. Touches nothing."""
    first, config = runs[0]
    text = submit.describe(
        folder, cluster, command(folder.resolve() / first), config=config, name=name, nodes=nodes,
        array=(len(runs), at_once),
    )  # fmt: skip
    listed = "\n".join(f"#   {run}" for run, _ in runs)
    return f"# Sweep of {len(runs)} elements, {at_once} at a time, each a run folder under {folder}:\n{listed}\n{text}"


def _is_done_or_alive(run: Path) -> bool:
    owner = record.read_json(record.launch_folder(run) / "job.json")
    if owner is None:
        return False
    ends = [event for event in record.read_events(run) if event["event"] == "end"]
    return bool(ends and ends[-1]["outcome"] == "done") or jobs.is_alive(owner["executor"], owner["job"])
