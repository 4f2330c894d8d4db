"""Launch a run: freeze its code, write its settings, and hand the job to submitit.

    RUN/config.yaml     resolved settings                RUN/code/      frozen code
    RUN/launch/         job.json, attempts.jsonl, code.json, code.diff, and submitit's files: JOB_submission.sh,
                        JOB_submitted.pkl, JOB_RANK_log.out

Launching into an existing run folder resumes the run with its own code and settings.
"""

import contextlib
import difflib
import fcntl
import io
import os
import shlex
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
import yaml
from submitit.core.utils import FailedJobError
from submitit.local.local import LocalJob

from vjepa_launch import compat, history, job_control, notes, slurm, snapshot
from vjepa_launch.atomic import atomic_write, read_json
from vjepa_launch.job import Job
from vjepa_launch.plain_path import plain_path
from vjepa_launch.process_info import code_environment, common_environment
from vjepa_launch.request import Request, batch_lines, interpreter, make_job, slurm_parameters
from vjepa_launch.settings import BadLaunch, Cluster

NO_LIMIT_MIN = 60 * 24 * 365 * 10


@dataclass(frozen=True)
class Launched:
    """A submitted job."""

    job: str
    run: Path
    log: Path
    """Output of rank 0."""
    resumes: int | None
    """Step of the checkpoint that it resumes from. None for a new run."""
    code: snapshot.CodeSnapshot
    note: str = ""
    """A remark for the user."""


def launch(request: Request) -> Launched:
    """Start or resume a run as a job. A rejected submission leaves no new run folder.

    Raises:
        BadLaunch: the run folder is in use by another job, has different settings, changed code or lost checkpoints, or
            the scheduler rejects the job.
    """
    run = request.run
    with locked(run) as is_new, removed_on_rejection([run] if is_new else []):
        _check_not_in_use(run)
        write_config(request)
        if request.makes_steps and not history.saves_elsewhere(request.config):
            history.check_checkpoints_exist(run)
        code_folder = run if request.refreeze else snapshot.code_owner(run)
        code, note = freeze_once(code_folder, request.refreeze)
        record_launch(request, code)
        (job,) = submit(run, [request])
        remarks = "\n  ".join(filter(None, [note, *notes.on_launch(request.cluster)]))
        return record_owner(request, job, code, remarks, logs=run)


def done_at(request: Request) -> int | None:
    """Return the last step of a run that has a checkpoint of it, or None if steps are left."""
    steps, newest = history.steps_in(request.config), history.newest_checkpoint(request.run)
    return newest if request.makes_steps and steps and newest is not None and newest >= steps else None


@contextlib.contextmanager
def removed_on_rejection(new: Sequence[Path]) -> Iterator[None]:
    """Remove new folders if the block raises BadLaunch."""
    try:
        yield
    except BadLaunch:
        for folder in new:
            link = plain_path(folder, create=False)
            if link != folder:
                link.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
        raise


def record_launch(request: Request, code: snapshot.CodeSnapshot) -> None:
    """Record a launch by hand. It resets the count of failures and withdraws a request to stop."""
    history.stop_path(request.run).unlink(missing_ok=True)
    event = {"event": "launch", "executor": request.cluster.executor, "code": code.digest}
    history.append_event(request.run, event)


def record_owner(request: Request, job: str, code: snapshot.CodeSnapshot, note: str, *, logs: Path) -> Launched:
    """Record the job that owns a run folder from now on, with everything that `launch_again` needs."""
    folder = history.launch_folder(logs)
    owner = {
        "job": job,
        "run": str(request.run),
        "uid": os.getuid(),
        "executor": request.cluster.executor,
        "name": request.name,
        "command": list(request.command),
        "cluster": request.cluster.model_dump(mode="json"),
        "makes_steps": request.makes_steps,
        "logs": str(folder),
    }
    history.write_owner(request.run, owner)
    resumes = history.newest_checkpoint(request.run)
    return Launched(job, request.run, history.rank_log(folder, job, 0), resumes, code, note)


def launch_again(run: Path) -> Launched:
    """Launch a run with the profile, command and settings of its last launch.

    Raises:
        BadLaunch: it was never launched, or it is in use.
    """
    owner = history.read_owner(run)
    if owner is None:
        raise BadLaunch(f"{run} was never launched; use `vjepa launch`")
    if not (run / "config.yaml").exists():
        raise BadLaunch(
            f"{run / 'config.yaml'} is missing; `vjepa launch CONFIG --on PROFILE --out {run}` writes it again"
        )
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


def describe(request: Request, *, folder: Path | None = None, array: tuple[int, int] | None = None) -> str:
    """Return the text of a dry run: the batch script, the environment, the settings and the files of the snapshot.

    Writes nothing, and works without SLURM.

    Args:
        request: the job, or the first element of an array.
        folder: the folder of the array, by default the run folder.
        array: number of elements, and how many run at a time.
    """
    run, cluster = request.run, request.cluster
    folder = folder or run
    plain = plain_path(folder, create=False)
    if (folder / "code").exists() and not request.refreeze:
        code, source = snapshot.verify(snapshot.code_owner(folder)), "already frozen in the run folder"
        files = snapshot.list_files({package: folder / "code" / package for package in snapshot.PACKAGES})
    else:
        code, files, _ = snapshot.describe()
        source = ", ".join(sorted({str(Path(package).parent) for package in code.source.values()}))
    job = make_job(request, code=plain / "code")
    environment = {**common_environment(run), **job.environment}
    environment |= code_environment(plain / "code", environment)
    kib = sum(path.stat().st_size for path in files.values()) / 1024
    parts = [
        f"# Run folder: {run}" + ("" if run.exists() else " (would be created)"),
        f"# Command of each of {cluster.nodes * cluster.ranks_per_node} ranks: {shlex.join(request.command)}",
        "",
        *batch_lines(plain, request, array),
        "# ---- environment of every rank (besides RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)",
        *(f"{key}={value}" for key, value in sorted(environment.items())),
        "",
        "# ---- settings, written to config.yaml",
        request.config.rstrip(),
        "",
        f"# ---- code: {code.files} files, {kib:,.0f} KiB, sha256 {code.digest[:12]}, {source}",
        f"# commit {code.commit[:12]}{' with uncommitted changes' if code.dirty else ''}"
        if code.commit
        else "# not from a git clone",
        *(f"{path.stat().st_size:>9,}  {name}" for name, path in files.items()),
        *(f"# {note}" for note in notes.on_launch(cluster)),
    ]
    return "\n".join(parts) + "\n"


def submit(folder: Path, requests: Sequence[Request], *, at_once: int = 1) -> list[str]:
    """Hand jobs to submitit, several as an array, and return their ids.

    Args:
        folder: the run folder, or the folder of the array. It receives submitit's files.
        requests: jobs with the same profile and name.
        at_once: jobs of an array that run at a time.
    """
    code = plain_path(snapshot.code_owner(folder), create=True) / "code"
    folder = plain_path(folder, create=True)
    jobs = [make_job(request, code=code) for request in requests]
    cluster = requests[0].cluster
    with _submission_lock:
        if cluster.executor == "slurm":
            return _submit_to_slurm(folder, requests[0], jobs, at_once)
        local = submitit.LocalExecutor(
            folder=history.launch_folder(folder), python=cluster.python and shlex.quote(cluster.python)
        )
        local.update_parameters(timeout_min=NO_LIMIT_MIN, tasks_per_node=1, gpus_per_node=cluster.gpus_per_node)
        local.update_parameters(stderr_to_stdout=True)
        with submitit.helpers.clean_env(), _environment(code_environment(code, os.environ)):
            started = [local.submit(job) for job in jobs]
        for job in started:
            assert isinstance(job, LocalJob)
            compat.reap_in_background(job)
        return [job.job_id for job in started]


def _submit_to_slurm(folder: Path, request: Request, jobs: Sequence[Job], at_once: int) -> list[str]:
    # Variables of an enclosing job must not leak into the new one.
    kept = {key: os.environ[key] for key in slurm.ADDRESS if key in os.environ}
    preferences = [key for key in os.environ if key.startswith(slurm.PREFERENCES)]
    try:
        # Disable submitit's limit on time-outs, since `policy.decide` also considers progress.
        executor = submitit.SlurmExecutor(
            folder=history.launch_folder(folder), max_num_timeout=10**6, python=interpreter(request.cluster)
        )
        executor.update_parameters(**slurm_parameters(folder, request), array_parallelism=at_once)
        # sbatch's errors are in the exception; submitit prints them as well.
        with (
            submitit.helpers.clean_env(preferences),
            _environment(kept),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            return [job.job_id for job in executor.submit_array(jobs)]
    except (RuntimeError, FailedJobError, FileNotFoundError) as error:
        reason = "; ".join([" ".join(str(error).split()), *notes.on_ignored_variables()])
        raise BadLaunch(f"the job was not submitted: {reason}") from None


_submission_lock = threading.Lock()
"""Held during a submission, which changes the environment of this process so that the job inherits it."""


def write_config(request: Request) -> None:
    """Write the settings of a run.

    Raises:
        BadLaunch: the run has different settings, and the request does not replace them.
    """
    path = request.run / "config.yaml"
    if path.exists() and not request.replace_settings:
        # The trainer also writes this file, formatted differently, so compare values and not text.
        then, now = yaml.safe_load(path.read_text()), yaml.safe_load(request.config)
        before, after = (yaml.safe_dump(values).splitlines() for values in (_with_paths_of(then, now), now))
        changed = [line for line in difflib.unified_diff(before, after, n=0, lineterm="") if line[0] in "+-"][2:]
        if changed:
            shown = "; ".join(changed[:6]) + ("; ..." if len(changed) > 6 else "")
            raise BadLaunch(
                f"{path} has different settings ({shown}). Launch with the same settings, choose another run folder, "
                "or add --replace-settings."
            )
        return
    atomic_write(path, request.config)


def _with_paths_of(then: Any, now: Any) -> Any:
    """Return earlier settings with relative paths, which version 0.1 wrote, as the absolute paths of the same files."""
    if isinstance(then, dict) and isinstance(now, dict):
        return {name: _with_paths_of(value, now.get(name)) for name, value in then.items()}
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        return [_with_paths_of(*values) for values in zip(then, now, strict=True)]
    if isinstance(then, str) and isinstance(now, str) and os.path.abspath(then) == now:
        return now
    return then


def freeze_once(folder: Path, refreeze: bool) -> tuple[snapshot.CodeSnapshot, str]:
    """Freeze the code unless that was done before.

    Returns:
        The snapshot, and a note for the user if it differs from the current code.
    """
    if refreeze or not (folder / "code").exists():
        lost = read_json(history.launch_folder(folder) / "code.json") if not refreeze else None
        code = snapshot.freeze(folder)
        if lost and lost["digest"] != code.digest:
            return code, "the frozen code was missing; the run continues with the current code"
        return code, ""
    code = snapshot.verify(folder)
    current, _, _ = snapshot.describe()
    if current.digest == code.digest:
        return code, ""
    return code, "the run continues with its frozen code, which differs from the current code; --refreeze replaces it"


def _check_not_in_use(run: Path) -> None:
    owner = history.read_owner(run)
    if owner and job_control.is_owner_alive(owner):
        raise BadLaunch(
            f"{run} is in use by job {owner['job']}; wait for it, or `vjepa runs cancel {shlex.quote(str(run))}`"
        )
    holder = job_control.trainer_holds(run)
    if holder:
        raise BadLaunch(f"{run} is in use by a trainer ({holder}); wait for it, or stop it there")


@contextlib.contextmanager
def locked(run: Path) -> Iterator[bool]:
    """Hold the launch lock of a run folder, which is created if it is missing, and yield whether it was.

    Raises:
        BadLaunch: another process is launching into the folder, or it cannot be created.
    """
    is_new = True
    try:
        run.mkdir(parents=True)
    except FileExistsError:
        is_new = False
    except OSError as error:
        raise BadLaunch(f"cannot create run folder {run} ({error.strerror}); give another with --out") from None
    history.launch_folder(run).mkdir(exist_ok=True)
    with (history.launch_folder(run) / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadLaunch(f"{run} is being launched by another process right now; try again") from None
        try:
            yield is_new
        finally:
            # Closing the file is not enough: a child that another thread is just starting still has a copy of it.
            fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables within a block, for the processes that it starts."""
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
