"""What the verbs that start jobs share: `--on CLUSTER`, and what is said of a job."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from vjepa.cli.verb import count

if TYPE_CHECKING:
    from vjepa_data.spec import Spec
    from vjepa_launch.array import Array
    from vjepa_launch.settings import Cluster
    from vjepa_launch.submit import Launched


def on_cluster(verb: argparse.ArgumentParser) -> None:
    """Where a verb starts its jobs."""
    verb.add_argument(
        "--on", required=True, metavar="CLUSTER", help="a profile: a YAML file, or a name in launch/clusters"
    )
    verb.add_argument("--nodes", type=count, metavar="N", help="machines, in place of the profile's number")


def profile(on: str, nodes: int | None = None) -> "Cluster":
    """The profile of `--on`: a file, or the name of one that ships with the project."""
    import vjepa_launch
    from vjepa_data.config_files import find_file, load_settings
    from vjepa_launch.request import with_nodes
    from vjepa_launch.settings import Cluster

    package = Path(vjepa_launch.__file__).parent
    shipped = sorted([*package.glob("clusters/*.yaml"), *package.parent.glob("clusters/*.yaml")])
    return with_nodes(load_settings(Cluster, find_file(on, shipped)).settings, nodes)


def say(job: "Launched") -> None:
    """Tell what became of a launch, and how to follow it."""
    start = f"goes on from step {job.resumes}" if job.resumes is not None else "starts"
    follow = f"vjepa runs logs {shlex.quote(str(job.run))} -f"
    print(f"job {job.job} {start}: {job.run}\n  {follow}" + (f"\n  {job.note}" if job.note else ""))


def launch_array(asked: "Array", *, dry_run: bool) -> None:
    """Start an array, or say what would be started."""
    from vjepa_launch import array

    if dry_run:
        print(array.describe(asked), end="")
        return
    for job in array.launch(asked):
        say(job)


def shard_on_cluster(args: argparse.Namespace, spec: "Spec") -> None:
    """Spread a shard build over an array of jobs, each of which does what the others leave."""
    from vjepa_data.config_files import dump_settings
    from vjepa_launch.array import Array, Element

    on = profile(args.on)
    tasks = args.tasks or on.nodes
    corpus = args.out.resolve()
    folder = corpus.with_name(f"{corpus.name}.jobs")
    sources = [str(Path(source).resolve()) if Path(source).exists() else source for source in args.sources]
    workers = ("--workers", str(on.cpus_per_task)) if on.cpus_per_task else ()
    elements = []
    for number in range(tasks):
        name = f"task-{number:05d}"
        command = ("python", "-m", "vjepa", "shard", *sources, "--out", str(corpus), "--task", f"{number}/{tasks}")
        own_spec = ("--spec", str(folder / name / "config.yaml"))
        elements.append(Element(name, (*command, *own_spec, *workers), dump_settings(spec)))
    one = on.model_copy(update={"nodes": 1, "tasks_per_node": 1, "gpus_per_node": 0})
    name = f"shard-{corpus.name}"
    launch_array(Array(folder, one, elements, name=name, at_once=tasks, makes_steps=False), dry_run=args.dry_run)
    if not args.dry_run:
        out, root = shlex.quote(str(args.out)), shlex.quote(str(folder))
        print(f"  vjepa shard --status --out {out}    vjepa runs list --root {root}")
