"""Many jobs of a kind as one array: the elements of a sweep, the tasks of a shard build.

FOLDER/code/  FOLDER/launch/     shared by all elements
FOLDER/003-.../                  an element: a run folder like any other; its code/ points to FOLDER/code
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vjepa_launch import history, job_control, submit
from vjepa_launch.request import Request
from vjepa_launch.settings import BadInput, Cluster

MOST_ELEMENTS = 1000
"""SLURM's MaxArraySize is 1001 by default."""


@dataclass(frozen=True)
class Element:
    """One job of an array."""

    name: str
    """Of its folder."""
    command: tuple[str, ...]
    """What each of its ranks executes."""
    config: str
    """Text of its resolved settings."""


@dataclass(frozen=True)
class Array:
    """What is to be launched, and where."""

    folder: Path
    """Absolute, on a disk that all nodes share; made if it is not there."""
    cluster: Cluster
    """Each element gets as many nodes as a single job would."""
    elements: Sequence[Element]
    name: str
    at_once: int
    """Elements that run at a time."""
    refreeze: bool = False
    """Freeze the present code, though the folder holds code already."""
    replace_settings: bool = False
    """Go on with these settings, though the folders of elements hold others."""
    makes_steps: bool = True
    """Whether elements are training runs, which hang when they make no steps."""

    def request(self, element: Element) -> Request:
        """An element by itself."""
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
    """Start the elements of an array, or those that are neither done nor alive.

    Raises:
        BadInput: all elements are done or alive; or as for a single run.
    """
    folder = array.folder
    with submit.locked(folder):
        requests = _those_open([array.request(element) for element in array.elements])
        if not requests:
            raise BadInput(
                f"all {len(array.elements)} elements of {folder} are done or alive; there is nothing to launch"
            )
        if array.cluster.executor == "local" and len(requests) > array.at_once:
            raise BadInput(
                f"on this machine all {len(requests)} elements would start at once, and at_once is {array.at_once}; "
                "use a SLURM profile, or a smaller array"
            )
        code, note = submit.freeze_once(folder, array.refreeze)
        for request in requests:
            history.launch_folder(request.run).mkdir(parents=True, exist_ok=True)
            submit.write_config(request)
            if not (request.run / "code").exists():
                (request.run / "code").symlink_to("../code")
            submit.begin(request, code)
        ids = submit.submit(folder, requests, at_once=array.at_once)
        return [
            submit.note_owner(request, job, code, note, logs=folder) for request, job in zip(requests, ids, strict=True)
        ]


def describe(array: Array) -> str:
    """What `launch` would do, as text: the array, and the settings of its first element in full. Touches nothing."""
    count = len(array.elements)
    first = array.request(array.elements[0])
    listed = "\n".join(f"#   {element.name}" for element in array.elements)
    return (
        f"# Array of {count} elements, {array.at_once} at a time, each with a folder under {array.folder}:\n{listed}\n"
        + submit.describe(first, home=array.folder, array=(count, array.at_once))
    )


def _those_open(requests: Sequence[Request]) -> list[Request]:
    """Requests whose jobs are neither done nor alive."""
    owners = {request.run: history.read_json(history.launch_folder(request.run) / "job.json") for request in requests}
    launched: dict[str, set[str]] = {}
    for owner in filter(None, owners.values()):
        launched.setdefault(owner["executor"], set()).add(owner["job"])
    alive = {(executor, job) for executor, ids in launched.items() for job in job_control.those_alive(executor, ids)}

    def is_open(run: Path) -> bool:
        owner = owners[run]
        if owner is None:
            return True
        ends = [event for event in history.read_events(run) if event["event"] == "end"]
        is_done = bool(ends) and ends[-1]["outcome"] == "done"
        return not is_done and (owner["executor"], owner["job"]) not in alive

    return [request for request in requests if is_open(request.run)]
