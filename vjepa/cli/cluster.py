"""Start jobs on a cluster: parts that several verbs share."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from vjepa.cli.app import Count

if TYPE_CHECKING:
    from vjepa_data.spec import Spec
    from vjepa_launch.array import Array
    from vjepa_launch.settings import Cluster
    from vjepa_launch.submit import Launched

On = Annotated[str, Parameter(help="Cluster profile: a YAML file, or a name in launch/clusters.")]
Nodes = Annotated[Count, Parameter(help="Nodes, in place of the profile's number.")]


def load_profile(on: str, nodes: int | None = None) -> "Cluster":
    """Load the cluster profile of `--on`: a file, or the name of a profile that ships with the project."""
    import vjepa_launch
    from vjepa_data.config_files import find_file, load_settings
    from vjepa_launch.request import with_nodes
    from vjepa_launch.settings import Cluster

    package = Path(vjepa_launch.__file__).parent
    shipped = sorted([*package.glob("clusters/*.yaml"), *package.parent.glob("clusters/*.yaml")])
    return with_nodes(load_settings(Cluster, find_file(on, shipped)).settings, nodes)


def print_launched(job: "Launched") -> None:
    """Print the job, its run folder and the command that follows its log."""
    start = f"resumes from step {job.resumes}" if job.resumes is not None else "starts"
    follow = f"vjepa runs logs {shlex.quote(str(job.run))} -f"
    print(f"job {job.job} {start}: {job.run}\n  {follow}" + (f"\n  {job.note}" if job.note else ""))


def launch_array(array: "Array", *, dry_run: bool) -> None:
    """Launch an array of jobs, or print it without launching."""
    from vjepa_launch.array import describe, launch

    if dry_run:
        print(describe(array), end="")
        return
    for job in launch(array):
        print_launched(job)


def shard_on_cluster(
    sources: Sequence[str], out: Path, *, spec: "Spec", on: str, tasks: int | None, dry_run: bool
) -> None:
    """Distribute a shard build over an array of jobs. Each job builds shards that no other job has built."""
    from vjepa_data.config_files import dump_settings
    from vjepa_launch.array import Array, Element

    profile = load_profile(on)
    tasks = tasks or profile.nodes
    corpus = out.resolve()
    folder = corpus.with_name(f"{corpus.name}.jobs")
    inputs = [str(Path(source).resolve()) if Path(source).exists() else source for source in sources]
    workers = ("--workers", str(profile.cpus_per_task)) if profile.cpus_per_task else ()
    elements = []
    for number in range(tasks):
        name = f"task-{number:05d}"
        command = ("python", "-m", "vjepa", "shard", *inputs, "--out", str(corpus), "--task", f"{number}/{tasks}")
        own_spec = ("--spec", str(folder / name / "config.yaml"))
        elements.append(Element(name, (*command, *own_spec, *workers), dump_settings(spec)))
    one_node = profile.model_copy(update={"nodes": 1, "tasks_per_node": 1, "gpus_per_node": 0})
    array = Array(folder, one_node, elements, name=f"shard-{corpus.name}", at_once=tasks, makes_steps=False)
    launch_array(array, dry_run=dry_run)
    if not dry_run:
        print(f"  vjepa shard --status --out {shlex.quote(str(out))}", end="    ")
        print(f"vjepa runs list --root {shlex.quote(str(folder))}")
