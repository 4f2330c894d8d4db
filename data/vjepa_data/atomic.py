"""Files that are there as a whole or not at all, and the temporary ones from which they come.

A temporary file says whose it is; while it is young it is also a claim, which only saves others the work.
"""

import contextlib
import os
import socket
import time
from pathlib import Path


def write_whole(path: Path, data: bytes, *, lasts: bool = True) -> None:
    """Write a file so that it is there as a whole or not at all; if it `lasts`, even through a power cut."""
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            if lasts:
                os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    if lasts:
        sync_folder(path.parent)


def temporary_name(path: Path) -> Path:
    """A name beside a file for this process alone: `.NAME.host.pid.tmp`."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


LEASE_S = 120.0
"""Seconds without a write after which another builder's temporary file no longer keeps us from its shard."""


def is_claimed(path: Path) -> bool:
    """Whether another builder seems to be writing this file: its temporary file was touched a moment ago."""
    for other in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if other != temporary_name(path) and time.time() - other.stat().st_mtime < LEASE_S:
                return True
    return False


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of processes of this machine that are no more."""
    for path in folder.glob(".*.tmp"):
        owner, _, pid = path.name.removesuffix(".tmp").rpartition(".")
        # The name of a machine may hold dots of its own.
        if owner.endswith(f".{socket.gethostname()}") and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
