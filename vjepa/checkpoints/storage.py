"""Where checkpoints lie: on a disk, or in an object store that fsspec speaks to. Both are paths to all other code.

An object store knows neither rename nor fsync nor folders, but an object appears there at once and whole. So what the
rename is on a disk, writing `state.json` last is in a store: a `step_*` without it is no checkpoint.
"""

import hashlib
import logging
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from torch.distributed.checkpoint.filesystem import FileSystemReader

from vjepa_data.corpus.remote import LONGEST_ATTEMPT_S, StoreUnreachable, store_errors
from vjepa_data.settings import BadInput

T = TypeVar("T")
log = logging.getLogger(__name__)

PATIENCE_S = 300.0
"""How long a store may be out of reach."""

FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Failures that no patience mends."""


def to_path(text: str | Path) -> Path:
    """The path that a setting means.

    Args:
        text: a path, or a URL that fsspec knows (`s3://bucket/folder`).

    Returns:
        A path. Of a URL one of universal_pathlib, which has the methods of `pathlib.Path` that we use.

    Raises:
        BadInput: the packages for this kind of URL are not installed.
    """
    if "://" not in str(text):
        return Path(text)
    try:
        from upath import UPath

        found = UPath(text, use_listings_cache=False)  # others write there too
        found.fs  # noqa: B018  where a missing package shows
    except (ImportError, ValueError) as error:
        raise BadInput(f"{text} cannot be used ({error}); pip install 'vjepa-pretrain[s3]', or give a folder") from None
    return cast(Path, found)


def is_remote(path: Path) -> bool:
    """Whether a path is in an object store."""
    return "://" in str(path)


def with_retries(action: Callable[[], T], path: Path) -> T:
    """Do something with a path, again and again while its store is out of reach; on a disk, once.

    Raises:
        FileNotFoundError, PermissionError: at once.
        Unreachable: the store did not answer for five minutes.
    """
    if not is_remote(path):
        return action()
    waited_s, pause_s = 0.0, 0.2
    while True:
        began_s = time.monotonic()
        try:
            return action()
        except FINAL:
            raise
        except (OSError, *store_errors()) as error:
            waited_s += min(time.monotonic() - began_s, LONGEST_ATTEMPT_S)
            if waited_s > PATIENCE_S:
                raise StoreUnreachable(
                    f"{path} cannot be reached for {waited_s:.0f} s ({error}); see to the network or the store, "
                    f"then resume"
                ) from error
            log.warning("%s: %s: %s; trying again", path, type(error).__name__, error)
        time.sleep(random.uniform(0.5, 1.0) * pause_s)  # lest all ranks come back in the same moment
        waited_s += pause_s
        pause_s = min(15.0, 2 * pause_s)


def children(folder: Path) -> list[Path]:
    """What is in a folder; nothing if it is not there."""
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
    """What DCP reads a checkpoint with."""
    if not is_remote(path):
        return FileSystemReader(path)
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    return FsspecReader(str(path), use_listings_cache=False)


def staging_folder(path: Path, rank: int) -> Path:
    """Where a rank writes its files of a checkpoint before it is one.

    On a disk that is a folder beside it, for all ranks; before a store, one of the rank's own on a disk of its node,
    with the same name in every attempt, so that what a killed one left there does not stay.
    """
    if not is_remote(path):
        return path.with_name(f".{path.name}.part")
    home = hashlib.blake2b(str(path.parent).encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"vjepa-checkpoint-{home}-{rank:05d}"


def upload(file: Path, to: Path) -> None:
    """Bring one file into an object store, whole or not at all.

    Raises:
        PermissionError: we may not write there.
        Unreachable: the store did not answer for five minutes.
    """

    def put() -> None:
        with file.open("rb") as source, to.open("wb") as target:
            shutil.copyfileobj(source, target, 16 << 20)

    with_retries(put, to)


def remove(path: Path) -> None:
    """Delete a checkpoint. It ceases to be one first: a deletion cut short leaves nothing under a good name."""
    if is_remote(path):
        withdraw(path)
        with_retries(lambda: _remove_objects(path), path)
        return
    trash = path.with_name(f".{path.name}.trash")
    path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def withdraw(path: Path) -> None:
    """Take from a `step_*` of an object store what makes it a checkpoint."""
    with_retries(lambda: (path / "state.json").unlink(missing_ok=True), path)


def set_aside(path: Path, *, name: str) -> None:
    """Let something be a checkpoint no longer, without losing it.

    Args:
        path: the checkpoint.
        name: what it is from now on, put before the name of its folder or, in a store, of its `state.json`.
    """
    if not is_remote(path):
        aside = path.with_name(f"{name}_{path.name}")
        shutil.rmtree(aside, ignore_errors=True)  # the same step of an earlier attempt
        path.rename(aside)
        return

    def rename() -> None:
        state = path / "state.json"
        (path / f"{name}_state.json").write_bytes(state.read_bytes())
        state.unlink()

    with_retries(rename, path)


def sweep(home: Path) -> None:
    """Remove what an attempt that was killed left half done."""
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
