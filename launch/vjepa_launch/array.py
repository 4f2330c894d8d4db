"""Launch many similar jobs as an array: the runs of a sweep, or the tasks of a shard build.

FOLDER/code/  FOLDER/launch/     shared by all elements
FOLDER/003-.../                  an element: an ordinary run folder, whose code/ links to FOLDER/code
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vjepa_launch import history, job_control, submit
from vjepa_launch.request import Request
from vjepa_launch.settings import BadLaunch, Cluster
from vjepa_launch.snapshot import CodeSnapshot

MAX_ELEMENTS = 1000
"""SLURM's MaxArraySize is 1001 by default."""


@dataclass(frozen=True)
class Element:
    """A job of an array."""

    name: str
    """Name of its run folder."""
    command: tuple[str, ...]
    """Command of each of its ranks."""
    config: str
    """Text of its resolved settings."""


@dataclass(frozen=True)
class Array:
    """An array of jobs to launch, and the cluster to launch it on."""

    folder: Path
    """Absolute, on a disk that all nodes share. Created if missing."""
    cluster: Cluster
    """Each element gets as many nodes as a single job would."""
    elements: Sequence[Element]
    name: str
    at_once: int
    """Elements that run at a time."""
    refreeze: bool = False
    """Freeze the current code, even if the folder has frozen code already."""
    replace_settings: bool = False
    """Use these settings, even if the folders of elements have other settings."""
    makes_steps: bool = True
    """True if the elements record steps, so that a long time without a step is a stall."""

    def request(self, element: Element) -> Request:
        """Return the request for a single element."""
        return Request(
            self.folder / element.name,
            self.cluster,
            element.command,
            config=element.config,
            name=self.name,
            replace_settings=self.replace_settings,
            makes_steps=self.makes_steps,
        )


def launch(array: Array) -> list[submit.Launched]:
    """Start the elements of an array that are neither done nor alive.

    Raises:
        BadLaunch: all elements are done or alive, or for the same reasons as for a single run.
    """
    folder = array.folder
    with submit.locked(folder) as is_new:
        requests = _unfinished([array.request(element) for element in array.elements])
        if not requests:
            raise BadLaunch(f"nothing to launch: all {len(array.elements)} elements of {folder} are done or alive")
        if array.cluster.executor == "local" and len(requests) > array.at_once:
            raise BadLaunch(
                f"on this machine all {len(requests)} elements would start at once, but at_once is {array.at_once}. "
                "Use a SLURM profile or a smaller array."
            )
        new = [folder] if is_new else [request.run for request in requests if not request.run.exists()]
        with submit.removed_on_rejection(new):
            code, note = submit.freeze_once(folder, array.refreeze)
            for request in requests:
                _prepare(request, code)
            ids = submit.submit(folder, requests, at_once=array.at_once)
        return [
            submit.record_owner(request, job, code, note, logs=folder)
            for request, job in zip(requests, ids, strict=True)
        ]


def _prepare(request: Request, code: CodeSnapshot) -> None:
    """Write the run folder of an element."""
    history.launch_folder(request.run).mkdir(parents=True, exist_ok=True)
    submit.write_config(request)
    if not (request.run / "code").exists():
        (request.run / "code").symlink_to("../code")
    submit.record_launch(request, code)


def describe(array: Array) -> str:
    """Return the text of a dry run: the elements, and the first of them in full. Writes nothing."""
    count = len(array.elements)
    first = array.request(array.elements[0])
    names = "\n".join(f"#   {element.name}" for element in array.elements)
    return (
        f"# Array of {count} elements, {array.at_once} at a time, each with a run folder in {array.folder}:\n{names}\n"
        + submit.describe(first, folder=array.folder, array=(count, array.at_once))
    )


def _unfinished(requests: Sequence[Request]) -> list[Request]:
    """Return the requests whose jobs are neither done nor alive."""
    owners = {request.run: history.read_owner(request.run) for request in requests}
    jobs: dict[str, set[str]] = {}
    for owner in filter(None, owners.values()):
        jobs.setdefault(owner["executor"], set()).add(owner["job"])
    users = {owner["uid"] for owner in owners.values() if owner and "uid" in owner}
    alive = {
        (executor, job) for executor, ids in jobs.items() for job in job_control.alive_jobs(executor, ids, users=users)
    }

    def is_unfinished(run: Path) -> bool:
        owner = owners[run]
        if owner is None:
            return True
        ends = history.read_events(run, "end")
        is_done = bool(ends) and ends[-1]["outcome"] == "done"
        return not is_done and (owner["executor"], owner["job"]) not in alive

    return [request for request in requests if is_unfinished(request.run)]
