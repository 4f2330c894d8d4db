"""Write files so that they are either complete or absent, through temporary files that are then renamed.

The name of a temporary file tells its process. While the file is young it also claims its target, which only saves
other builders duplicate work.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

LEASE_S = 120.0
"""Seconds without a write after which a temporary file no longer claims its target."""


def atomic_write(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file that is either complete or absent, whatever happens meanwhile.

    Args:
        path: the file, which may exist already.
        data: its contents.
        durable: wait for the disk, so that the file survives a power failure.
    """
    with atomic_file(path, durable=durable) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file for writing and rename it to `path` at the end, or remove it after an exception."""
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        with contextlib.suppress(OSError):  # renamed already, or the folder is gone: the first error matters
            temporary.unlink()
    if durable:
        sync_folder(path.parent)


def temporary_name(path: Path) -> Path:
    """Return a path in the same folder that only this process uses: `.NAME.host.pid.tmp`."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def is_claimed(path: Path) -> bool:
    """Say whether another builder seems to be writing this file: its temporary file was touched within `LEASE_S`."""
    for other in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if other != temporary_name(path) and time.time() - other.stat().st_mtime < LEASE_S:
                return True
    return False


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of processes of this machine that have ended."""
    for path in folder.glob(".*.tmp"):
        owner, _, pid = path.name.removesuffix(".tmp").rpartition(".")
        # A host name may contain dots.
        if owner.endswith(f".{socket.gethostname()}") and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            path.unlink(missing_ok=True)


def remove_own(folder: Path) -> None:
    """Remove the temporary files of this process, in case a signal came before anything else knew of them."""
    for path in folder.glob(f".*.{socket.gethostname()}.{os.getpid()}.tmp"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
