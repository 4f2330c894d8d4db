"""A run folder to a job: freeze the code, write down what is asked, hand it to submitit.

    RUN/config.yaml     resolved settings                RUN/code/      frozen code
    RUN/launch/         job.json, attempts.jsonl, code.json, code.diff, and submitit's files: JOB_submission.sh,
                        JOB_submitted.pkl, JOB_RANK_log.out

Launching onto a folder that exists resumes it, with its own code and settings.
"""

import contextlib
import difflib
import fcntl
import os
import shlex
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError
from submitit.slurm.slurm import _make_sbatch_string

from vjepa_launch import freeze, jobs, record
from vjepa_launch.job import Job
from vjepa_launch.place import common_environment, path_environment
from vjepa_launch.settings import BadInput, Cluster

NO_LIMIT_MIN = 60 * 24 * 365 * 10


@dataclass(frozen=True)
class Launched:
    """A job that was submitted."""

    job: str
    run: Path
    log: Path
    """Output of rank 0."""
    resumes: int | None
    """Step of the checkpoint it will go on from."""
    code: freeze.Code
    note: str = ""
    """Something to tell the user."""


def train_command(run: Path) -> list[str]:
    """The command of every rank of a training run."""
    return ["python", "-m", "vjepa", "train", str(run / "config.yaml"), "--out", str(run)]


def launch(
    run: Path,
    cluster: Cluster,
    command: Sequence[str],
    *,
    config: str,
    name: str,
    nodes: int | None = None,
    refreeze: bool = False,
) -> Launched:
    """Start a run, or go on with it, as a job.

    Args:
        run: the run folder, on a disk that all nodes share; made if it is not there.
        cluster: where.
        command: what each rank executes; `python` as the first word is the interpreter of the job.
        config: text of the resolved settings, for RUN/config.yaml.
        name: name of the job.
        nodes: nodes, in place of the profile's number.
        refreeze: freeze the present code, though the run folder holds code already.

    Raises:
        BadInput: the folder is in use by another job, or holds other settings or changed code; or the scheduler
            refuses the job.
    """
    run = run.resolve()
    cluster = with_nodes(cluster, nodes)
    with _locked(run):
        _refuse_if_in_use(run)
        _write_config(run, config)
        code, note = _freeze_once(run, refreeze)
        record.stop_path(run).unlink(missing_ok=True)
        record.append_event(run, {"event": "launch", "executor": cluster.executor, "code": code.digest})
        job = _submit(run, cluster, _job(run, cluster, command), name)
        record.write_json(
            record.launch_folder(run) / "job.json",
            {
                "job": job,
                "executor": cluster.executor,
                "name": name,
                "command": list(command),
                "cluster": cluster.model_dump(mode="json"),
                "logs": str(record.launch_folder(run)),
            },
        )
    log = record.launch_folder(run) / f"{job}_0_log.out"
    return Launched(job, run, log, record.newest_checkpoint(run), code, note)


def describe(
    run: Path,
    cluster: Cluster,
    command: Sequence[str],
    *,
    config: str,
    name: str,
    nodes: int | None = None,
    refreeze: bool = False,
) -> str:
    """What `launch` would do, as text: the batch script, the environment, the settings and the files of the snapshot.

    Touches nothing, and works without SLURM.
    """
    run = run.resolve()
    cluster = with_nodes(cluster, nodes)
    if (run / "code").exists() and not refreeze:
        code, source = freeze.verify(run), "already frozen in the run folder"
        files = freeze.list_files({room: run / "code" / room for room in freeze.ROOMS})
    else:
        code, files, _ = freeze.describe()
        source = ", ".join(sorted({str(Path(folder).parent) for folder in code.source.values()}))
    job = _job(run, cluster, command)
    state = "the commit and changes of its own" if code.dirty else "the commit"
    environment = {**common_environment(run), **path_environment(run / "code", {}), **job.environment}
    kib = sum(path.stat().st_size for path in files.values()) / 1024
    listed = [f"{path.stat().st_size:>9,}  {name}" for name, path in files.items()]
    parts = [
        f"# Run folder: {run}" + ("" if run.exists() else " (would be made)"),
        f"# Command of each of {cluster.nodes * cluster.ranks_per_node} ranks: {shlex.join(command)}",
        "",
        *_batch_text(run, cluster, name),
        "# ---- environment of every rank (beside RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)",
        *(f"{key}={value}" for key, value in sorted(environment.items())),
        "",
        "# ---- settings, written to config.yaml",
        config.rstrip(),
        "",
        f"# ---- code: {code.files} files, {kib:,.0f} KiB, sha256 {code.digest[:12]}, {source}",
        f"# {f'commit {code.commit[:12]}: {state}' if code.commit else 'not from a clone'}",
        *listed,
    ]
    return "\n".join(parts) + "\n"


def with_nodes(cluster: Cluster, nodes: int | None) -> Cluster:
    """The profile with another number of nodes, checked like the profile itself."""
    if nodes is None:
        return cluster
    if nodes < 1 or (cluster.executor == "local" and nodes > 1):
        raise BadInput(f"--nodes {nodes}: this cluster takes {'1' if cluster.executor == 'local' else 'at least 1'}")
    return cluster.model_copy(update={"nodes": nodes})


def _job(run: Path, cluster: Cluster, command: Sequence[str]) -> Job:
    environment = dict(cluster.environment)
    if cluster.executor == "local" and cluster.gpus_per_node:
        environment.setdefault("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(cluster.gpus_per_node))))
    elif cluster.executor == "local" and "CUDA_VISIBLE_DEVICES" in os.environ:
        environment.setdefault("CUDA_VISIBLE_DEVICES", os.environ["CUDA_VISIBLE_DEVICES"])
    return Job(
        run=str(run),
        command=tuple(command),
        code=str(run / "code"),
        ranks=cluster.ranks_per_node,
        environment=environment,
        restart=cluster.restart,
    )


def _parameters(run: Path, cluster: Cluster, name: str) -> dict[str, Any]:
    """A profile in submitit's words."""
    srun = ["--kill-on-bad-exit=1", *cluster.srun]
    if cluster.container_image:
        srun.append(f"--container-image={cluster.container_image}")
    if cluster.container_mounts:
        srun.append(f"--container-mounts={','.join(cluster.container_mounts)}")
    paths = path_environment(run / "code", {"PYTHONPATH": "$PYTHONPATH"})
    after = [sys.executable, "-m", "vjepa_launch.after", str(record.launch_folder(run))]
    asked = {
        "job_name": name,
        "time": int(cluster.hours * 60),
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
        "setup": [*cluster.setup, *(f'export {key}="{value}"' for key, value in paths.items())],
        # The last word on a job: requeue it, or say why not.
        "teardown": ["code=$?", f'{shlex.join(after)} "$code"', "exit $?"],
        "additional_parameters": {"requeue": True, **cluster.sbatch},
    }
    return {key: value for key, value in asked.items() if value is not None}


def _python(cluster: Cluster) -> str:
    """The interpreter as words of a shell. It starts deaf to USR2, which would kill it before it can listen."""
    deaf = 'trap \'\' USR2; exec "$0" "$@"'
    return shlex.join(["sh", "-c", deaf, cluster.python or sys.executable])


def _batch_text(run: Path, cluster: Cluster, name: str) -> list[str]:
    if cluster.executor == "local":
        return [f"# ---- on this machine, in the background: one supervisor, {cluster.ranks_per_node} ranks", ""]
    folder = record.launch_folder(run)
    command = f"{_python(cluster)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    text = _make_sbatch_string(command=command, folder=folder, **_parameters(run, cluster, name))
    return ["# ---- batch script, submitted through submitit", *text.splitlines(), ""]


def _submit(run: Path, cluster: Cluster, job: Job, name: str) -> str:
    """Hand a job to submitit; its id."""
    with _one_at_a_time:
        return _submit_alone(run, cluster, job, name)


_one_at_a_time = threading.Lock()
"""Variables of this process are what a job inherits, and they are set while one is submitted."""


def _submit_alone(run: Path, cluster: Cluster, job: Job, name: str) -> str:
    folder = record.launch_folder(run)
    if cluster.executor == "slurm":
        try:
            # Its count of time-outs is of no use here: our own rule decides, and it knows about progress.
            executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=10**6, python=_python(cluster))
            executor.update_parameters(**_parameters(run, cluster, name))
            # No rank or job of ours may leak into the new one; but where SLURM's configuration lies must stay known.
            kept = {key: os.environ[key] for key in ("SLURM_CONF",) if key in os.environ}
            with submitit.helpers.clean_env(), _environment(kept):
                return executor.submit(job).job_id
        except (RuntimeError, FailedJobError, FileNotFoundError) as error:
            raise BadInput(f"the job was not submitted: {' '.join(str(error).split())}") from None
    local = submitit.LocalExecutor(folder=folder, python=cluster.python and shlex.quote(cluster.python))
    local.update_parameters(timeout_min=NO_LIMIT_MIN, tasks_per_node=1, gpus_per_node=cluster.gpus_per_node)
    local.update_parameters(stderr_to_stdout=True)
    with submitit.helpers.clean_env(), _environment(path_environment(run / "code", os.environ)):
        started = local.submit(job)
    _started.append(started)
    return started.job_id


_started: list[Any] = []
"""Jobs on this machine that this process started: kept, for they outlive it and need no farewell."""


def _write_config(run: Path, config: str) -> None:
    path = run / "config.yaml"
    if path.exists() and path.read_text() != config:
        lines = difflib.unified_diff(path.read_text().splitlines(), config.splitlines(), n=0, lineterm="")
        changed = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
        shown = "; ".join(changed[:6]) + ("; ..." if len(changed) > 6 else "")
        raise BadInput(f"{path} holds other settings ({shown}); launch with the same ones, or give another run folder")
    path.write_text(config)


def _freeze_once(run: Path, refreeze: bool) -> tuple[freeze.Code, str]:
    if refreeze or not (run / "code").exists():
        return freeze.freeze(run), ""
    code = freeze.verify(run)
    live, _, _ = freeze.describe()
    if live.digest == code.digest:
        return code, ""
    return code, "the run goes on with its frozen code, which is not the present one; --refreeze takes the present one"


def _refuse_if_in_use(run: Path) -> None:
    owner = record.read_json(record.launch_folder(run) / "job.json")
    if owner is None:
        return
    if jobs.is_alive(owner["executor"], owner["job"]):
        raise BadInput(f"{run} is in use by job {owner['job']}; wait for it, or `vjepa runs cancel {run}`")


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Only one launch at a time onto a run folder."""
    record.launch_folder(run).mkdir(parents=True, exist_ok=True)
    with (record.launch_folder(run) / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{run} is being launched by another process at this moment; try again") from None
        yield


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables set for the children that are started meanwhile."""
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
