"""Where shards of others lie: below a folder, or behind addresses. Whoever reads one whole gets a local file."""

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
    """Tars below one place."""

    root: str
    """Folder or address that all paths begin from."""
    files: tuple[str, ...]
    """Paths below it, in order of name."""


def find_tars(place: str) -> Tars:
    """List the tars below a folder, below a prefix of a bucket (`s3://bucket/train/`), or named by an address.

    An address may name many, as WebDataset's do: `https://host/train-{0000..0099}.tar`.

    Raises:
        BadInput: there are none, or the place cannot be listed.
    """
    if not is_remote(place):
        folder = Path(place)
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.tar") if path.is_file())
        if not files:
            packed = sum(1 for path in folder.rglob("*") if path.name.endswith((".tar.gz", ".tgz")))
            hint = f" ({packed} are compressed; unpack them with gunzip)" if packed else ""
            raise BadInput(f"{folder}: no tars below it{hint}; give a folder of WebDataset shards")
        return Tars(place, tuple(files))
    urls = _named(place) if place.endswith(".tar") else _listed(place)
    root = os.path.commonpath([url.rpartition("/")[0] for url in urls]).replace(":/", "://", 1)
    return Tars(root, tuple(sorted(url.removeprefix(f"{root}/") for url in urls)))


def _named(url: str) -> list[str]:
    try:
        return list(braceexpand(url))
    except ValueError as error:
        raise BadInput(f"{url}: {error}; write for example train-{{0000..0099}}.tar") from None


def _listed(url: str) -> list[str]:
    scheme = url.partition("://")[0]
    if scheme in ("http", "https"):
        raise BadInput(f"{url}: a web server does not list its files; name them, as in {url}/train-{{0000..0099}}.tar")
    try:
        system, root = fsspec.url_to_fs(url)
        found = [f"{scheme}://{path}" for path in system.find(root) if path.endswith(".tar")]
    except (OSError, ImportError, ValueError, *store_errors()) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadInput(f"{url}: cannot be listed ({reason}); check the address and the keys") from None
    if not found:
        raise BadInput(f"{url}: no tars below it; give a prefix of WebDataset shards")
    return found


@contextlib.contextmanager
def local_tar(root: str, file: str, *, scratch: Path) -> Iterator[Path | None]:
    """Have a tar as a local file as long as the context lasts: itself, or a copy of a remote one.

    A copy has no name, so that a killed process leaves none; other processes of this machine can open it by the path
    that is given. None if there is no such tar.

    Args:
        root, file: as of `Tars`.
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
