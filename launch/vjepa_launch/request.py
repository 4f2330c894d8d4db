"""Describe a job to launch, and translate it into the parameters of submitit and SLURM."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vjepa_launch import compat, history
from vjepa_launch.job import Job
from vjepa_launch.settings import BadLaunch, Cluster

UNLIMITED = 10**9


@dataclass(frozen=True)
class Request:
    """A job to launch, and the cluster to launch it on."""

    run: Path
    """Run folder: absolute, on a disk that all nodes share. Created if missing."""
    cluster: Cluster
    command: Sequence[str]
    """Command of each rank. `python` as its first word stands for the interpreter of the job."""
    config: str
    """Text of the resolved settings, for RUN/config.yaml."""
    name: str
    """Name of the job."""
    refreeze: bool = False
    """Freeze the current code, even if the run folder has frozen code already."""
    replace_settings: bool = False
    """Use these settings, even if the run folder has other settings. The trainer still checks which may change."""
    makes_steps: bool = True
    """True if the command records steps, so that a long time without a step is a stall."""

    def __post_init__(self) -> None:
        assert self.run.is_absolute(), self.run


def train_command(run: Path) -> list[str]:
    """Return the command of each rank of a training run."""
    return ["python", "-m", "vjepa", "train", str(run / "config.yaml"), "--out", str(run)]


def with_nodes(cluster: Cluster, nodes: int | None) -> Cluster:
    """Return the profile with another number of nodes (None: unchanged).

    Raises:
        BadLaunch: the cluster does not have so many nodes.
    """
    if nodes is None:
        return cluster
    if nodes < 1 or (cluster.executor == "local" and nodes > 1):
        allowed = "must be 1 on this machine" if cluster.executor == "local" else "must be at least 1"
        raise BadLaunch(f"--nodes {nodes}: {allowed}")
    return cluster.model_copy(update={"nodes": nodes})


def make_job(request: Request, *, code: Path) -> Job:
    """Return the job for submitit to pickle."""
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
        # A command without checkpoints shows no progress by which to judge an attempt that was stopped.
        restart=cluster.restart.model_copy(update={} if request.makes_steps else {"idle_attempts": UNLIMITED}),
        makes_steps=request.makes_steps,
        cores=cluster.cpus_per_task,
    )


def slurm_parameters(folder: Path, request: Request) -> dict[str, Any]:
    """Translate a request into the parameters of submitit's `SlurmExecutor`.

    Args:
        folder: the run folder, or the folder of the array.
        request: the job, or the first element of the array.
    """
    cluster = request.cluster
    # Without --export=ALL, `sbatch: {export: NONE}` would also keep MASTER_PORT and PYTHONPATH from the ranks.
    srun = ["--kill-on-bad-exit=1", "--export=ALL", *cluster.srun]
    is_pyxis = cluster.container_runtime == "pyxis"
    if cluster.container_image and is_pyxis:
        srun.append(f"--container-image={cluster.container_image}")
    if cluster.container_mounts and is_pyxis:
        srun.append(f"--container-mounts={','.join(cluster.container_mounts)}")
    code = shlex.quote(str(folder / "code"))
    # The same as `code_environment`. An empty entry after a trailing colon would mean the working folder.
    paths = [f'export PYTHONPATH={code}"${{PYTHONPATH:+:$PYTHONPATH}}"', "export PYTHONSAFEPATH=1"]
    # From 22.05 on srun does not read SLURM_CPUS_PER_TASK, and would bind each rank and its workers to one core.
    cores = '[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"'
    port = f"export MASTER_PORT=$({shlex.join([sys.executable, '-m', 'vjepa_launch.port'])})"
    shield = Path(__file__).with_name("srun_shield.sh").read_text().splitlines()
    finish = [sys.executable, "-m", "vjepa_launch.finish_attempt", str(history.launch_folder(folder))]
    parameters = {
        "job_name": request.name,
        "time": limit_min(cluster),
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
        "setup": [*cluster.setup, *paths, cores, port, *shield],
        # A requeue sends TERM, which must not interrupt `finish_attempt`.
        "teardown": ["code=$?", "trap '' TERM", f'{shlex.join(finish)} "$code"', "exit $?"],
        "additional_parameters": {"requeue": True, **cluster.sbatch},
    }
    # Clusters that check accounting keys would refuse submitit's own, "submitit".
    return {key: value for key, value in parameters.items() if value is not None} | {"wckey": None}


def limit_min(cluster: Cluster) -> int:
    """Return the time limit of a job in minutes, SLURM's unit."""
    return max(1, round(cluster.hours * 60))


def interpreter(cluster: Cluster) -> str:
    """Return the interpreter as shell words. It starts with USR2 ignored, which would kill it during its imports."""
    ignore_usr2 = 'trap \'\' USR2; exec "$0" "$@"'
    return shlex.join(["sh", "-c", ignore_usr2, *_apptainer(cluster), cluster.python or sys.executable])


def _apptainer(cluster: Cluster) -> list[str]:
    """Return the words that run a command in the image of a profile for apptainer."""
    if cluster.container_image is None or cluster.container_runtime != "apptainer":
        return []
    mounts = ["--bind", ",".join(cluster.container_mounts)] if cluster.container_mounts else []
    return ["apptainer", "exec", *(["--nv"] if cluster.gpus_per_node else []), *mounts, cluster.container_image]


def batch_lines(folder: Path, request: Request, array: tuple[int, int] | None) -> list[str]:
    """Return the lines of the batch script, for a dry run.

    Args:
        folder: the run folder, or the folder of the array.
        request: the job, or the first element of the array.
        array: number of elements, and how many run at a time.
    """
    cluster = request.cluster
    if cluster.executor == "local":
        return [f"# ---- on this machine, in the background: one supervisor, {cluster.ranks_per_node} ranks", ""]
    launch = history.launch_folder(folder)
    command = f"{interpreter(cluster)} -u -m {compat.RANK_MODULE} {shlex.quote(str(launch))}"
    parameters = slurm_parameters(folder, request)
    if array:
        parameters |= {"map_count": array[0], "array_parallelism": array[1]}
    text = compat.batch_script(command=command, folder=launch, parameters=parameters)
    return ["# ---- batch script, submitted through submitit", *text.splitlines(), ""]
