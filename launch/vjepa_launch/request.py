"""What is to be launched and where; and the same in words that submitit and SLURM understand."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import _make_sbatch_string

from vjepa_launch import history
from vjepa_launch.job import Job
from vjepa_launch.settings import BadInput, Cluster


@dataclass(frozen=True)
class Request:
    """What is to be launched, and where."""

    run: Path
    """Run folder, absolute, on a disk that all nodes share; made if it is not there."""
    cluster: Cluster
    command: Sequence[str]
    """What each rank executes; `python` as the first word is the interpreter of the job."""
    config: str
    """Text of the resolved settings, for RUN/config.yaml."""
    name: str
    """Name of the job."""
    refreeze: bool = False
    """Freeze the present code, though the run folder holds code already."""
    replace_settings: bool = False
    """Go on with these settings, though the run folder holds others; the trainer has the last word on which may
    change."""
    makes_steps: bool = True
    """Whether it is a training run, which hangs when it makes no steps."""

    def __post_init__(self) -> None:
        assert self.run.is_absolute(), self.run


def train_command(run: Path) -> list[str]:
    """The command of every rank of a training run."""
    return ["python", "-m", "vjepa", "train", str(run / "config.yaml"), "--out", str(run)]


def with_nodes(cluster: Cluster, nodes: int | None) -> Cluster:
    """The profile with another number of nodes, checked like the profile itself."""
    if nodes is None:
        return cluster
    if nodes < 1 or (cluster.executor == "local" and nodes > 1):
        raise BadInput(f"--nodes {nodes}: this cluster takes {'1' if cluster.executor == 'local' else 'at least 1'}")
    return cluster.model_copy(update={"nodes": nodes})


def make_job(request: Request, *, code: Path) -> Job:
    """What each node will execute."""
    cluster = request.cluster
    environment = dict(cluster.environment)
    if cluster.executor == "local" and cluster.gpus_per_node:
        environment.setdefault("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(cluster.gpus_per_node))))
    elif cluster.executor == "local" and "CUDA_VISIBLE_DEVICES" in os.environ:
        environment.setdefault("CUDA_VISIBLE_DEVICES", os.environ["CUDA_VISIBLE_DEVICES"])
    return Job(
        run=str(request.run),
        command=tuple(request.command),
        code=str(code),
        ranks=cluster.ranks_per_node,
        environment=environment,
        restart=cluster.restart,
        makes_steps=request.makes_steps,
    )


SHIELD = (
    "# TERM is for the ranks. This script lives on to decide, and srun, which would kill the ranks at once, must not",
    "# hear it, as it would under ProctrackType=linuxproc; so it becomes nobody's child.",
    "trap : TERM",
    """srun() { { code=$( ( { command srun "$@" >&3; echo $?; } & ) ); } 3>&1; return "${code:-137}"; }""",
)
"""Lines of the batch script before the call of srun."""


def parameters(home: Path, request: Request) -> dict[str, Any]:
    """A profile in submitit's words."""
    cluster = request.cluster
    srun = ["--kill-on-bad-exit=1", *cluster.srun]
    if cluster.container_image:
        srun.append(f"--container-image={cluster.container_image}")
    if cluster.container_mounts:
        srun.append(f"--container-mounts={','.join(cluster.container_mounts)}")
    code = shlex.quote(str(home / "code"))
    # As `path_environment`. Nothing after the last colon would be the working folder.
    paths = [f'export PYTHONPATH={code}"${{PYTHONPATH:+:$PYTHONPATH}}"', "export PYTHONSAFEPATH=1"]
    port = f"export MASTER_PORT=$({shlex.join([sys.executable, '-m', 'vjepa_launch.port'])})"
    after = [sys.executable, "-m", "vjepa_launch.finish_attempt", str(history.launch_folder(home))]
    asked = {
        "job_name": request.name,
        "time": max(1, round(cluster.hours * 60)),
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.ranks_per_node,
        "cpus_per_task": cluster.cpus_per_task,
        "gpus_per_node": cluster.gpus_per_node or None,
        "mem": None if cluster.memory_gib is None else f"{cluster.memory_gib}GB" if cluster.memory_gib else "0",
        "signal_delay_s": cluster.notice_s,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": ",".join(cluster.exclude) or None,
        "stderr_to_stdout": True,
        "srun_args": srun,
        "setup": [*cluster.setup, *paths, port, *SHIELD],
        # The last word on a job: requeue it, or say why not. It is not cut short by a requeue, which sends TERM.
        "teardown": ["code=$?", "trap '' TERM", f'{shlex.join(after)} "$code"', "exit $?"],
        "additional_parameters": {"requeue": True, **cluster.sbatch},
    }
    return {key: value for key, value in asked.items() if value is not None}


def interpreter(cluster: Cluster) -> str:
    """The interpreter as words of a shell. It starts deaf to USR2, which would kill it before it can listen."""
    deaf = 'trap \'\' USR2; exec "$0" "$@"'
    return shlex.join(["sh", "-c", deaf, cluster.python or sys.executable])


def batch_text(home: Path, request: Request, array: tuple[int, int] | None) -> list[str]:
    cluster = request.cluster
    if cluster.executor == "local":
        return [f"# ---- on this machine, in the background: one supervisor, {cluster.ranks_per_node} ranks", ""]
    folder = history.launch_folder(home)
    command = f"{interpreter(cluster)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    asked = parameters(home, request)
    if array:
        asked |= {"map_count": array[0], "array_parallelism": array[1]}
    text = _make_sbatch_string(command=command, folder=folder, **asked)
    return ["# ---- batch script, submitted through submitit", *text.splitlines(), ""]
