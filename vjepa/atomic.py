"""What we write for others appears whole or not at all: written beside its place, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vjepa_data.settings import BadInput


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False, ours: str) -> Iterator[Path]:
    """Give a folder to fill, which takes its place when the block ends and vanishes when the block fails.

    Args:
        path: where the folder will be.
        overwrite: replace a folder that is there; only one that holds the file `ours`, so that a slip of the
            tongue (`--out ~`) deletes nothing.
        ours: name of a file by which a folder of this kind is known, written by the block.

    Raises:
        BadInput: the place is taken.
    """
    path = path.absolute()
    check_free(path, overwrite=overwrite)
    if path.exists() and not (path.is_dir() and ((path / ours).is_file() or not any(path.iterdir()))):
        raise BadInput(f"{path} exists and holds no {ours}, so it is not replaced; give another place with --out")
    beside = _beside(path)
    beside.mkdir(parents=True)
    try:
        yield beside
        assert (beside / ours).is_file(), f"nothing called {ours} was written"
        if path.exists():
            old = path.with_name(f".{path.name}.old-{os.getpid()}")
            path.rename(old)
            beside.rename(path)
            shutil.rmtree(old)
        else:
            beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a path to write a file to, which is renamed to `path` when the block ends.

    Raises:
        BadInput: the place is taken.
    """
    path = path.absolute()
    check_free(path, overwrite=overwrite)
    if path.is_dir():
        raise BadInput(f"{path} is a folder; give the name of a file")
    beside = _beside(path)
    beside.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def check_free(path: Path, *, overwrite: bool) -> None:
    """Refuse a place that is taken: before the work, not after it.

    Raises:
        BadInput: something is there and may not be overwritten.
    """
    if path.exists() and not overwrite:
        raise BadInput(f"{path} exists already; give another place with --out, or --overwrite to replace it")


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.part-{os.getpid()}")
