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
import yaml
from submitit.core.utils import FailedJobError
from submitit.slurm.slurm import _make_sbatch_string

from vjepa_launch import freeze, jobs, record
from vjepa_launch.job import Job
from vjepa_launch.place import common_environment, path_environment
from vjepa_launch.settings import BadInput, Cluster

NO_LIMIT_MIN = 60 * 24 * 365 * 10


SHIELD = (
    "# TERM is for the ranks. This script lives on to decide, and srun, which would kill the ranks at once, must not",
    "# hear it, as it would under ProctrackType=linuxproc; so it becomes nobody's child.",
    "trap : TERM",
    """srun() { { code=$( ( { command srun "$@" >&3; echo $?; } & ) ); } 3>&1; return "${code:-137}"; }""",
)
"""Lines of the batch script before the call of srun."""


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
    replace_settings: bool = False,
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
        replace_settings: go on with these settings, though the run folder holds others; the trainer has the last
            word on which may change.

    Raises:
        BadInput: the folder is in use by another job, or holds other settings or changed code; or the scheduler
            refuses the job.
    """
    run = run.resolve()
    cluster = with_nodes(cluster, nodes)
    with locked(run):
        _refuse_if_in_use(run)
        write_config(run, config, replace_settings)
        code, note = freeze_once(run if refreeze else freeze.home(run), refreeze)
        begin(run, cluster, code)
        (job,) = submit(run, cluster, [make_job(run, cluster, command, code=freeze.home(run) / "code")], name)
        note_owner(run, cluster, job, logs=run, name=name, command=command)
    return Launched(job, run, record.launch_folder(run) / f"{job}_0_log.out", record.newest_checkpoint(run), code, note)


def begin(run: Path, cluster: Cluster, code: freeze.Code) -> None:
    """Note a launch; it clears what was asked of earlier jobs, and starts the count of failures anew."""
    record.stop_path(run).unlink(missing_ok=True)
    record.append_event(run, {"event": "launch", "executor": cluster.executor, "code": code.digest})


def note_owner(run: Path, cluster: Cluster, job: str, *, logs: Path, name: str, command: Sequence[str]) -> None:
    """Write down whose a run folder is from now on, and all that a launch by `vjepa runs requeue` needs."""
    record.write_json(
        record.launch_folder(run) / "job.json",
        {
            "job": job,
            "executor": cluster.executor,
            "name": name,
            "command": list(command),
            "cluster": cluster.model_dump(mode="json"),
            "logs": str(record.launch_folder(logs)),
        },
    )


def launch_again(run: Path) -> Launched:
    """Launch a run as it was launched the last time: same profile, command and settings.

    Raises:
        BadInput: it was never launched, or it is in use.
    """
    owner = record.read_json(record.launch_folder(run) / "job.json")
    if owner is None:
        raise BadInput(f"{run} was not launched, so there is nothing to repeat; use `vjepa launch`")
    config = (run / "config.yaml").read_text()
    cluster = Cluster.model_validate(owner["cluster"])
    return launch(run, cluster, owner["command"], config=config, name=owner["name"])


def describe(
    run: Path,
    cluster: Cluster,
    command: Sequence[str],
    *,
    config: str,
    name: str,
    nodes: int | None = None,
    refreeze: bool = False,
    array: tuple[int, int] | None = None,
) -> str:
    """What `launch` would do, as text: the batch script, the environment, the settings and the files of the snapshot.

    Touches nothing, and works without SLURM. For a sweep, `run` is its folder, and `array` the number of elements and
    how many run at a time.
    """
    run = run.resolve()
    cluster = with_nodes(cluster, nodes)
    if (run / "code").exists() and not refreeze:
        code, source = freeze.verify(freeze.home(run)), "already frozen in the run folder"
        files = freeze.list_files({room: run / "code" / room for room in freeze.ROOMS})
    else:
        code, files, _ = freeze.describe()
        source = ", ".join(sorted({str(Path(folder).parent) for folder in code.source.values()}))
    job = make_job(run, cluster, command, code=run / "code")
    state = "the commit and changes of its own" if code.dirty else "the commit"
    environment = {**common_environment(run), **path_environment(run / "code", {}), **job.environment}
    kib = sum(path.stat().st_size for path in files.values()) / 1024
    listed = [f"{path.stat().st_size:>9,}  {name}" for name, path in files.items()]
    parts = [
        f"# Run folder: {run}" + ("" if run.exists() else " (would be made)"),
        f"# Command of each of {cluster.nodes * cluster.ranks_per_node} ranks: {shlex.join(command)}",
        "",
        *_batch_text(run, cluster, name, array),
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


def make_job(run: Path, cluster: Cluster, command: Sequence[str], *, code: Path) -> Job:
    """What each node will execute."""
    environment = dict(cluster.environment)
    if cluster.executor == "local" and cluster.gpus_per_node:
        environment.setdefault("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(cluster.gpus_per_node))))
    elif cluster.executor == "local" and "CUDA_VISIBLE_DEVICES" in os.environ:
        environment.setdefault("CUDA_VISIBLE_DEVICES", os.environ["CUDA_VISIBLE_DEVICES"])
    return Job(
        run=str(run),
        command=tuple(command),
        code=str(code),
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
        "setup": [*cluster.setup, *(f'export {key}="{value}"' for key, value in paths.items()), *SHIELD],
        # The last word on a job: requeue it, or say why not. It is not cut short by a requeue, which sends TERM.
        "teardown": ["code=$?", "trap '' TERM", f'{shlex.join(after)} "$code"', "exit $?"],
        "additional_parameters": {"requeue": True, **cluster.sbatch},
    }
    return {key: value for key, value in asked.items() if value is not None}


def _python(cluster: Cluster) -> str:
    """The interpreter as words of a shell. It starts deaf to USR2, which would kill it before it can listen."""
    deaf = 'trap \'\' USR2; exec "$0" "$@"'
    return shlex.join(["sh", "-c", deaf, cluster.python or sys.executable])


def _batch_text(run: Path, cluster: Cluster, name: str, array: tuple[int, int] | None) -> list[str]:
    if cluster.executor == "local":
        return [f"# ---- on this machine, in the background: one supervisor, {cluster.ranks_per_node} ranks", ""]
    folder = record.launch_folder(run)
    command = f"{_python(cluster)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    asked = _parameters(run, cluster, name)
    if array:
        asked |= {"map_count": array[0], "array_parallelism": array[1]}
    text = _make_sbatch_string(command=command, folder=folder, **asked)
    return ["# ---- batch script, submitted through submitit", *text.splitlines(), ""]


def submit(folder: Path, cluster: Cluster, tasks: Sequence[Job], name: str, at_once: int = 1) -> list[str]:
    """Hand jobs to submitit, several as one array; their ids.

    Args:
        folder: holds the frozen code, and gets submitit's files.
        cluster: where.
        tasks: the jobs.
        name: name of the job.
        at_once: jobs of an array that run at a time.
    """
    with _one_at_a_time:
        if cluster.executor == "slurm":
            return _submit_to_slurm(folder, cluster, tasks, name, at_once)
        local = submitit.LocalExecutor(
            folder=record.launch_folder(folder), python=cluster.python and shlex.quote(cluster.python)
        )
        local.update_parameters(timeout_min=NO_LIMIT_MIN, tasks_per_node=1, gpus_per_node=cluster.gpus_per_node)
        local.update_parameters(stderr_to_stdout=True)
        with submitit.helpers.clean_env(), _environment(path_environment(folder / "code", os.environ)):
            started = [local.submit(task) for task in tasks]
        _started.extend(started)
        return [job.job_id for job in started]


def _submit_to_slurm(folder: Path, cluster: Cluster, tasks: Sequence[Job], name: str, at_once: int) -> list[str]:
    # No rank or job of ours may leak into the new one; but where SLURM's configuration lies must stay known.
    kept = {key: os.environ[key] for key in ("SLURM_CONF",) if key in os.environ}
    try:
        # submitit's count of time-outs is of no use here: our own rule decides, and it knows about progress.
        executor = submitit.SlurmExecutor(
            folder=record.launch_folder(folder), max_num_timeout=10**6, python=_python(cluster)
        )
        executor.update_parameters(**_parameters(folder, cluster, name), array_parallelism=at_once)
        with submitit.helpers.clean_env(), _environment(kept):
            return [job.job_id for job in executor.submit_array(tasks)]
    except (RuntimeError, FailedJobError, FileNotFoundError) as error:
        raise BadInput(f"the job was not submitted: {' '.join(str(error).split())}") from None


_one_at_a_time = threading.Lock()
"""Variables of this process are what a job inherits, and they are set while one is submitted."""

_started: list[Any] = []
"""Jobs on this machine that this process started: kept, for they outlive it and need no farewell."""


def write_config(run: Path, config: str, replace_settings: bool = False) -> None:
    """Write the settings of a run, unless it has other ones."""
    path = run / "config.yaml"
    if path.exists() and not replace_settings:
        # The trainer writes the file too, in its own hand; what it says is compared, not how it is written.
        before, after = (yaml.safe_dump(yaml.safe_load(text)).splitlines() for text in (path.read_text(), config))
        changed = [line for line in difflib.unified_diff(before, after, n=0, lineterm="") if line[0] in "+-"][2:]
        if changed:
            shown = "; ".join(changed[:6]) + ("; ..." if len(changed) > 6 else "")
            raise BadInput(
                f"{path} holds other settings ({shown}); launch with the same ones, give another run folder, or go on "
                "with these by --replace-settings"
            )
        return
    path.write_text(config)


def freeze_once(folder: Path, refreeze: bool) -> tuple[freeze.Code, str]:
    """Freeze the code unless that was done, and say so when it is no longer the present one."""
    if refreeze or not (folder / "code").exists():
        return freeze.freeze(folder), ""
    code = freeze.verify(folder)
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
def locked(run: Path) -> Iterator[None]:
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
