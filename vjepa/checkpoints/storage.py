"""Storage of checkpoints: a disk, or an object store through fsspec. Other code sees paths.

An object store has no rename, fsync or folders, but an object appears there atomically. Writing `state.json` last
therefore takes the role of the rename: a `step_*` without it is not a checkpoint.
"""

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from torch.distributed.checkpoint.filesystem import FileSystemReader

from vjepa.compat import store_reader
from vjepa_data.corpus import remote
from vjepa_data.settings import BadInput

T = TypeVar("T")
log = logging.getLogger(__name__)

FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Errors that are not retried."""


def to_path(text: str | Path) -> Path:
    """Return the path that a setting denotes.

    Args:
        text: a path, or a URL that fsspec supports (`s3://bucket/folder`).

    Returns:
        A path. A URL gives a path of universal_pathlib with the same methods as `pathlib.Path`.

    Raises:
        BadInput: the packages for this kind of URL are not installed.
    """
    if "://" not in str(text):
        return Path(text)
    try:
        from upath import UPath

        found = UPath(text, use_listings_cache=False)  # other processes write there too
        found.fs  # noqa: B018  where a missing package shows
    except (ImportError, ValueError) as error:
        raise BadInput(f"{text} cannot be used ({error}); pip install 'vjepa-pretrain[s3]', or give a folder") from None
    return cast(Path, found)


def is_remote(path: Path) -> bool:
    """Return whether a path is in an object store."""
    return "://" in str(path)


def with_retries(action: Callable[[], T], path: Path) -> T:
    """Run an action on a path, with retries while an object store is unreachable and without on a disk.

    Raises:
        FileNotFoundError, PermissionError: without a retry.
        StoreUnreachable: the store did not answer for five minutes.
    """
    if not is_remote(path):
        return action()
    return remote.with_retries(action, path, transient=(OSError, *remote.store_errors()), permanent=FINAL)


def children(folder: Path) -> list[Path]:
    """Return the entries of a folder, or none if it does not exist."""
    if not is_remote(folder):
        return list(folder.iterdir()) if folder.is_dir() else []
    store: Any = folder

    def look() -> list[Path]:
        try:
            found = store.fs.ls(store.path, detail=False)
        except FileNotFoundError:
            return []
        names = [one.rstrip("/").rpartition("/")[2] for one in found if one.strip("/") != store.path.strip("/")]
        return [folder / name for name in names]

    return with_retries(look, folder)


def open_reader(path: Path) -> FileSystemReader:
    """Return DCP's reader for a checkpoint."""
    if not is_remote(path):
        return FileSystemReader(path)
    return store_reader(path)


def staging_folder(path: Path, rank: int) -> Path:
    """Return the folder in which a rank writes the files of an incomplete checkpoint.

    On a disk it is a folder next to the checkpoint, for all ranks. For a store it is the rank's own folder on a local
    disk. Its name is the same in every attempt, so that leftovers of a killed attempt are removed.
    """
    if not is_remote(path):
        return path.with_name(f".{path.name}.part")
    home = hashlib.blake2b(str(path.parent).encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"vjepa-checkpoint-{home}-{rank:05d}"


def upload(file: Path, to: Path) -> None:
    """Upload a file to an object store atomically.

    Raises:
        PermissionError: the store denies writing.
        BadInput: the store did not answer for five minutes.
    """

    def put() -> None:
        with file.open("rb") as source, to.open("wb") as target:
            shutil.copyfileobj(source, target, 16 << 20)

    with_retries(put, to)


def remove(path: Path) -> None:
    """Delete a checkpoint, after invalidating it so that an interrupted deletion leaves nothing complete."""
    if is_remote(path):
        withdraw(path)
        with_retries(lambda: _remove_objects(path), path)
        return
    trash = path.with_name(f".{path.name}.trash")
    path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def withdraw(path: Path) -> None:
    """Invalidate a checkpoint in an object store by deleting its `state.json`."""
    with_retries(lambda: (path / "state.json").unlink(missing_ok=True), path)


def set_aside(path: Path, *, name: str) -> None:
    """Rename a checkpoint so that it is no longer found, without deleting it.

    Args:
        path: the checkpoint.
        name: prefix of the new name of its folder or, in a store, of its `state.json`.
    """
    if not is_remote(path):
        aside = path.with_name(f"{name}_{path.name}")
        shutil.rmtree(aside, ignore_errors=True)  # left by an earlier attempt at the same step
        path.rename(aside)
        return

    def rename() -> None:
        state = path / "state.json"
        (path / f"{name}_state.json").write_bytes(state.read_bytes())
        state.unlink()

    with_retries(rename, path)


def sweep(home: Path) -> None:
    """Remove the incomplete checkpoints of a killed attempt."""
    if is_remote(home):
        for path in children(home):
            if path.name.startswith("step_") and not any(one.name.endswith("state.json") for one in children(path)):
                log.info("removing %s, left unfinished by an earlier attempt", path)
                with_retries(lambda path=path: _remove_objects(path), path)
        return
    for pattern in (".step_*.part", ".step_*.trash"):
        for path in home.glob(pattern):
            log.info("removing %s, left unfinished by an earlier attempt", path)
            shutil.rmtree(path, ignore_errors=True)


def _remove_objects(path: Path) -> None:
    for file in children(path):
        file.unlink(missing_ok=True)
