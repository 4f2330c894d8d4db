"""The run folder: a lock, and a record of every attempt.

runs/X/config.yaml        the settings, resolved
       environment.json   every attempt: time, host, versions, first step, changed settings
       choices.json       what was measured once to choose the decoder and the attention, if asked
       log.txt  metrics.jsonl  rejected.jsonl  checkpoints/  stacks/  wandb/
"""

import fcntl
import hashlib
import json
import logging
import os
import platform
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from vjepa.config import Run
from vjepa.distributed.world import World
from vjepa.version import __version__
from vjepa_data.settings import BadInput

log = logging.getLogger(__name__)

LIBRARIES = ("numpy", "decord", "webdataset", "xformers", "wandb")


@contextmanager
def occupy(folder: Path, world: World) -> Iterator[None]:
    """Create a run folder if needed, and lock it until the block or the process ends.

    Rank 0 holds a POSIX lock of the kernel, which ends with the process. Forked workers do not keep it, and other nodes
    see it.

    Raises:
        BadInput: on every rank, if another process holds the lock or the folder is not writable.
    """
    handle = world.first(lambda: _lock(folder))
    try:
        yield
    finally:
        if world.is_first and handle is not None:
            os.close(handle)


def _lock(folder: Path) -> int | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)  # less the umask
    except OSError as error:
        where = error.filename or folder
        raise BadInput(
            f"cannot write to run folder {folder} ({where}: {error.strerror}); give another with --out"
        ) from None
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        owner = os.pread(handle, 200, 0).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise BadInput(
            f"run folder {folder} is in use by another process ({owner}); wait for it, or give another with --out"
        ) from None
    except OSError as error:  # a file system without locks
        log.warning("%s cannot be locked (%s); make sure that no other process trains in it", folder, error.strerror)
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()} since {_now()}\n".encode(), 0)
    return handle


def write_settings(folder: Path, run: Run) -> None:
    """Write the resolved settings to the run folder atomically."""
    _replace(folder / "config.yaml", yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False))


def settings_hash(run: Run) -> str:
    """Return a short hash of all settings of a run."""
    return hashlib.blake2b(json.dumps(run.model_dump(mode="json"), sort_keys=True).encode(), digest_size=8).hexdigest()


def record_attempt(folder: Path, *, step: int, world: World, changes: Mapping[str, Any]) -> None:
    """Add this attempt to `environment.json`.

    Args:
        folder: folder of the run.
        step: updates made before this attempt.
        world: the ranks.
        changes: settings that differ from the checkpoint's: {name: [then, now]}.
    """
    file = folder / "environment.json"
    attempts = json.loads(file.read_text())["attempts"] if file.is_file() else []
    attempts.append(
        {
            "time": _now(),
            "step": step,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "world": world.size,
            "device": _device_name(world.device),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "versions": versions(),
            "code": code_version(),
            "changes": dict(changes),
            "environment": {name: os.environ[name] for name in sorted(os.environ) if _is_telling(name)},
        }
    )
    _replace(file, json.dumps({"attempts": attempts}, indent=1))


def versions() -> dict[str, str]:
    """Return our version and the versions of the libraries on which results depend."""
    found = {"vjepa": __version__, "torch": str(torch.__version__)}  # including the build, such as 2.11.0+cu130
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def code_version() -> dict[str, str]:
    """Return the git commit of the running code and whether files differ from it. Empty outside a clone."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return {"root": str(root)}
    commit = _git(root, "rev-parse", "HEAD")
    return {"root": str(root), "commit": commit, "dirty": str(bool(_git(root, "status", "--porcelain"))).lower()}


def _git(root: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", root, *words],
            env={name: value for name, value in os.environ.items() if not name.startswith("GIT_")},
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=20,
            check=False,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _is_telling(name: str) -> bool:
    secret = any(word in name for word in ("KEY", "TOKEN", "SECRET", "PASSWORD"))
    return name.startswith(("SLURM_JOB", "SLURM_RESTART", "NCCL_", "TORCH", "PYTORCH_", "OMP_", "CUDA_")) and not secret


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"


def _replace(file: Path, text: str) -> None:
    beside = file.with_name(f".{file.name}.part")
    beside.write_text(text)
    os.replace(beside, file)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
