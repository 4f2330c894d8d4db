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
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import submitit
import yaml
from submitit.core.utils import FailedJobError
from submitit.local.local import LocalJob

from vjepa_launch import history, job_control, snapshot
from vjepa_launch.job import Job
from vjepa_launch.process_info import common_environment, path_environment
from vjepa_launch.request import Request, batch_text, interpreter, make_job, parameters
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
    code: snapshot.Code
    note: str = ""
    """Something to tell the user."""


def launch(request: Request) -> Launched:
    """Start a run, or go on with it, as a job.

    Raises:
        BadInput: the folder is in use by another job, or holds other settings or changed code; or the scheduler
            refuses the job.
    """
    run = request.run
    with locked(run):
        _refuse_if_in_use(run)
        write_config(request)
        home = run if request.refreeze else snapshot.home(run)
        code, note = freeze_once(home, request.refreeze)
        begin(request, code)
        (job,) = submit(run, [request])
        return note_owner(request, job, code, note, logs=run)


def begin(request: Request, code: snapshot.Code) -> None:
    """Note a launch; it clears what was asked of earlier jobs, and starts the count of failures anew."""
    history.stop_path(request.run).unlink(missing_ok=True)
    event = {"event": "launch", "executor": request.cluster.executor, "code": code.digest}
    history.append_event(request.run, event)


def note_owner(request: Request, job: str, code: snapshot.Code, note: str, *, logs: Path) -> Launched:
    """Write down whose a run folder is from now on, and all that a launch by `vjepa runs requeue` needs."""
    folder = history.launch_folder(logs)
    owner = {
        "job": job,
        "executor": request.cluster.executor,
        "name": request.name,
        "command": list(request.command),
        "cluster": request.cluster.model_dump(mode="json"),
        "makes_steps": request.makes_steps,
        "logs": str(folder),
    }
    history.write_json(history.launch_folder(request.run) / "job.json", owner)
    resumes = history.newest_checkpoint(request.run)
    return Launched(job, request.run, folder / f"{job}_0_log.out", resumes, code, note)


def launch_again(run: Path) -> Launched:
    """Launch a run as it was launched the last time: same profile, command and settings.

    Raises:
        BadInput: it was never launched, or it is in use.
    """
    owner = history.read_json(history.launch_folder(run) / "job.json")
    if owner is None:
        raise BadInput(f"{run} was not launched, so there is nothing to repeat; use `vjepa launch`")
    return launch(
        Request(
            run.resolve(),
            Cluster.model_validate(owner["cluster"]),
            owner["command"],
            config=(run / "config.yaml").read_text(),
            name=owner["name"],
            makes_steps=owner["makes_steps"],
        )
    )


def describe(request: Request, *, home: Path | None = None, array: tuple[int, int] | None = None) -> str:
    """What `launch` would do, as text: the batch script, the environment, the settings and the files of the snapshot.

    Touches nothing, and works without SLURM.

    Args:
        request: of one job, or of the first element of an array.
        home: the folder of the array.
        array: number of elements, and how many run at a time.
    """
    run, cluster = request.run, request.cluster
    home = home or run
    if (home / "code").exists() and not request.refreeze:
        code, source = snapshot.verify(snapshot.home(home)), "already frozen in the run folder"
        files = snapshot.list_files({room: home / "code" / room for room in snapshot.ROOMS})
    else:
        code, files, _ = snapshot.describe()
        source = ", ".join(sorted({str(Path(folder).parent) for folder in code.source.values()}))
    job = make_job(request, code=home / "code")
    state = "the commit and changes of its own" if code.dirty else "the commit"
    environment = {**common_environment(run), **path_environment(home / "code", {}), **job.environment}
    kib = sum(path.stat().st_size for path in files.values()) / 1024
    listed = [f"{path.stat().st_size:>9,}  {name}" for name, path in files.items()]
    parts = [
        f"# Run folder: {run}" + ("" if run.exists() else " (would be made)"),
        f"# Command of each of {cluster.nodes * cluster.ranks_per_node} ranks: {shlex.join(request.command)}",
        "",
        *batch_text(home, request, array),
        "# ---- environment of every rank (beside RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)",
        *(f"{key}={value}" for key, value in sorted(environment.items())),
        "",
        "# ---- settings, written to config.yaml",
        request.config.rstrip(),
        "",
        f"# ---- code: {code.files} files, {kib:,.0f} KiB, sha256 {code.digest[:12]}, {source}",
        f"# {f'commit {code.commit[:12]}: {state}' if code.commit else 'not from a clone'}",
        *listed,
    ]
    return "\n".join(parts) + "\n"


def submit(home: Path, requests: Sequence[Request], *, at_once: int = 1) -> list[str]:
    """Hand jobs of one kind to submitit, several as one array; their ids.

    Args:
        home: the run folder, or that of the array; gets submitit's files.
        requests: all with the same profile and name.
        at_once: jobs of an array that run at a time.
    """
    tasks = [make_job(request, code=snapshot.home(home) / "code") for request in requests]
    cluster = requests[0].cluster
    with _one_at_a_time:
        if cluster.executor == "slurm":
            return _submit_to_slurm(home, requests[0], tasks, at_once)
        local = submitit.LocalExecutor(
            folder=history.launch_folder(home), python=cluster.python and shlex.quote(cluster.python)
        )
        local.update_parameters(timeout_min=NO_LIMIT_MIN, tasks_per_node=1, gpus_per_node=cluster.gpus_per_node)
        local.update_parameters(stderr_to_stdout=True)
        with submitit.helpers.clean_env(), _environment(path_environment(home / "code", os.environ)):
            started = [local.submit(task) for task in tasks]
        for job in started:  # they outlive us, or end before: somebody must hear of it
            assert isinstance(job, LocalJob)
            assert job._process is not None
            threading.Thread(target=job._process.wait, daemon=True).start()
        return [job.job_id for job in started]


def _submit_to_slurm(home: Path, request: Request, tasks: Sequence[Job], at_once: int) -> list[str]:
    # No rank or job of ours may leak into the new one; but where SLURM's configuration lies must stay known.
    kept = {key: os.environ[key] for key in ("SLURM_CONF",) if key in os.environ}
    try:
        # submitit's count of time-outs is of no use here: our own rule decides, and it knows about progress.
        executor = submitit.SlurmExecutor(
            folder=history.launch_folder(home), max_num_timeout=10**6, python=interpreter(request.cluster)
        )
        executor.update_parameters(**parameters(home, request), array_parallelism=at_once)
        with submitit.helpers.clean_env(), _environment(kept):
            return [job.job_id for job in executor.submit_array(tasks)]
    except (RuntimeError, FailedJobError, FileNotFoundError) as error:
        raise BadInput(f"the job was not submitted: {' '.join(str(error).split())}") from None


_one_at_a_time = threading.Lock()
"""Variables of this process are what a job inherits, and they are set while one is submitted."""


def write_config(request: Request) -> None:
    """Write the settings of a run, unless it has other ones."""
    path = request.run / "config.yaml"
    if path.exists() and not request.replace_settings:
        # The trainer writes the file too, in its own hand; what it says is compared, not how it is written.
        before, after = (
            yaml.safe_dump(yaml.safe_load(text)).splitlines() for text in (path.read_text(), request.config)
        )
        changed = [line for line in difflib.unified_diff(before, after, n=0, lineterm="") if line[0] in "+-"][2:]
        if changed:
            shown = "; ".join(changed[:6]) + ("; ..." if len(changed) > 6 else "")
            raise BadInput(
                f"{path} holds other settings ({shown}); launch with the same ones, give another run folder, or go on "
                "with these by --replace-settings"
            )
        return
    path.write_text(request.config)


def freeze_once(folder: Path, refreeze: bool) -> tuple[snapshot.Code, str]:
    """Freeze the code unless that was done, and say so when it is no longer the present one."""
    if refreeze or not (folder / "code").exists():
        return snapshot.freeze(folder), ""
    code = snapshot.verify(folder)
    live, _, _ = snapshot.describe()
    if live.digest == code.digest:
        return code, ""
    return code, "the run goes on with its frozen code, which is not the present one; --refreeze takes the present one"


def _refuse_if_in_use(run: Path) -> None:
    owner = history.read_json(history.launch_folder(run) / "job.json")
    if owner is None:
        return
    if job_control.is_alive(owner["executor"], owner["job"]):
        raise BadInput(
            f"{run} is in use by job {owner['job']}; wait for it, or `vjepa runs cancel {shlex.quote(str(run))}`"
        )


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Only one launch at a time onto a run folder."""
    history.launch_folder(run).mkdir(parents=True, exist_ok=True)
    with (history.launch_folder(run) / "lock").open("w") as file:
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
