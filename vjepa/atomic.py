"""Write output files and folders atomically: under a temporary name first, then renamed.

`vjepa_data.atomic` writes the files of a corpus, which are in memory when they are written.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vjepa_data.errors import BadInput


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False, ours: str) -> Iterator[Path]:
    """Yield a temporary folder to fill. It is renamed to `path` when the block ends, and deleted if the block fails.

    Args:
        path: final path of the folder.
        overwrite: replace an existing folder, but only if it is empty or holds the file `ours`, so that a mistake
            (`--out ~`) deletes nothing.
        ours: name of a file that identifies folders of this kind. The block must write it.

    Raises:
        BadInput: `path` exists and may not be replaced.
    """
    path = path.absolute()
    check_free(path, overwrite=overwrite)
    if path.exists() and not (path.is_dir() and ((path / ours).is_file() or not any(path.iterdir()))):
        raise BadInput(f"{path} exists and holds no {ours}, so it is not replaced; give another path with --out")
    temporary = _temporary(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        assert (temporary / ours).is_file(), f"{ours} was not written"
        if path.exists():
            old = path.with_name(f".{path.name}.old-{os.getpid()}")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write a file to. It is renamed to `path` when the block ends.

    Raises:
        BadInput: `path` exists and may not be replaced, or is a folder.
    """
    path = path.absolute()
    check_free(path, overwrite=overwrite)
    if path.is_dir():
        raise BadInput(f"{path} is a folder; give the name of a file")
    temporary = _temporary(path)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_free(path: Path, *, overwrite: bool) -> None:
    """Check that a path may be written, before the work and not after it.

    Raises:
        BadInput: it exists and may not be overwritten.
    """
    if path.exists() and not overwrite:
        raise BadInput(f"{path} exists already; give another path with --out, or replace it with --overwrite")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.part-{os.getpid()}")
