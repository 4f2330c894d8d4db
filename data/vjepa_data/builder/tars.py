"""Find foreign tars below a folder or at a URL, and provide each as a local file."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import fsspec
from braceexpand import braceexpand

from vjepa_data.corpus.remote import Gone, is_remote, read_range, store_errors
from vjepa_data.settings import BadInput

BLOCK = 16 << 20


@dataclass(frozen=True)
class Tars:
    """Tars below one folder or URL."""

    root: str
    """Folder or URL that all paths are relative to."""
    files: tuple[str, ...]
    """Paths below `root`, in order of name."""


def find_tars(place: str) -> Tars:
    """List the tars below a folder, below a bucket's prefix (`s3://bucket/train/`), or named by a URL.

    A URL may name many tars by WebDataset's braces: `https://host/train-{0000..0099}.tar`.

    Raises:
        BadInput: there are no tars, or the place cannot be listed.
    """
    if not is_remote(place):
        folder = Path(place)
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.tar") if path.is_file())
        if not files:
            packed = sum(1 for path in folder.rglob("*") if path.name.endswith((".tar.gz", ".tgz")))
            hint = f" ({packed} are compressed, unpack them with gunzip)" if packed else ""
            raise BadInput(f"{folder}: no tars found{hint}; give a folder of WebDataset shards")
        return Tars(place, tuple(files))
    if place.endswith(".tar"):
        urls = _expand_braces(place)
    else:
        hint = f"name the tars, such as {place.rstrip('/')}/train-{{0000..0099}}.tar"
        urls = [url for url in list_prefix(place, hint=hint) if url.endswith(".tar")]
    if not urls:
        raise BadInput(f"{place}: no tars found; give a prefix of WebDataset shards")
    root = os.path.commonpath([url.rpartition("/")[0] for url in urls]).replace(":/", "://", 1)
    return Tars(root, tuple(sorted(url.removeprefix(f"{root}/") for url in urls)))


def _expand_braces(url: str) -> list[str]:
    try:
        return list(braceexpand(url))
    except ValueError as error:
        raise BadInput(f"{url}: invalid braces ({error}); write for example train-{{0000..0099}}.tar") from None


def list_prefix(url: str, *, hint: str) -> list[str]:
    """List the URLs of all files below a bucket's prefix, in order of name.

    Raises:
        BadInput: the prefix cannot be listed, which is always so for web servers. `hint` then says what to do.
    """
    scheme = url.partition("://")[0]
    if scheme in ("http", "https"):
        raise BadInput(f"{url}: web servers cannot be listed; {hint}")
    try:
        system, root = fsspec.url_to_fs(url)
        return [f"{scheme}://{path}" for path in sorted(system.find(root))]
    except (OSError, ImportError, ValueError, *store_errors()) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadInput(f"{url}: cannot be listed ({reason}); check the URL and the credentials") from None


@contextlib.contextmanager
def local_tar(root: str, file: str, *, scratch: Path) -> Iterator[Path | None]:
    """Provide a tar as a local file for the duration of the context, or None if it does not exist.

    A remote tar is copied to an unnamed file, so that a killed process leaves nothing behind. Other processes of this
    machine can open the copy by the returned path.

    Args:
        root, file: as in `Tars`.
        scratch: folder on a disk with room for the copy.
    """
    if not is_remote(root):
        path = Path(root) / file
        yield path if path.is_file() else None
        return
    with tempfile.TemporaryFile(dir=scratch) as copy:
        is_there = _download(f"{root}/{file}", copy)
        yield Path(f"/proc/{os.getpid()}/fd/{copy.fileno()}") if is_there else None


def _download(url: str, copy: BinaryIO) -> bool:
    at = 0
    try:
        while block := read_range(url, at, BLOCK):
            copy.write(block)
            at += len(block)
    except Gone:
        return False
    copy.flush()
    return True
