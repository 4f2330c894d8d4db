"""Find foreign tars below a folder or at a URL, and provide each as a local file."""

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from braceexpand import braceexpand

from vjepa_data.corpus.http_client import Gone, public_url
from vjepa_data.corpus.remote import is_remote, object_store, read_blocks, store_errors
from vjepa_data.settings import BadInput

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tars:
    """Tars below a folder or URL."""

    root: str
    """Folder or URL that all paths are relative to."""
    files: tuple[str, ...]
    """Paths below `root`, in order of name."""
    rejects: tuple[tuple[str, str], ...] = ()
    """Paths that are not read, each with a detail: compressed tars, folders without permission, links to folders."""


def find_tars(place: str) -> Tars:
    """List the tars below a folder, below a bucket's prefix (`s3://bucket/train/`), or named by a URL.

    A URL may name many tars by WebDataset's braces: `https://host/train-{0000..0099}.tar`.

    Raises:
        BadInput: there are no tars, or the place cannot be listed.
    """
    if not is_remote(place):
        return _find_local_tars(Path(place))
    parts = urlsplit(place)
    if parts.username:
        raise BadInput(
            f"{public_url(place)}: an index is read by later runs, and would keep the password of this address. "
            "Put it into ~/.netrc and give the address without it."
        )
    if parts.query and place.startswith("http"):
        log.warning("%s: the query is left out, since an index keeps addresses for later runs", public_url(place))
        place = public_url(place)
    if place.endswith(".tar"):
        urls = _expand_braces(place)
    else:
        hint = f"name the tars, such as {place.rstrip('/')}/train-{{0000..0099}}.tar"
        urls = [url for url in list_prefix(place, hint=hint) if url.endswith(".tar")]
    if not urls:
        raise BadInput(f"{place}: no tars found; give a prefix of WebDataset shards")
    root = os.path.commonpath([url.rpartition("/")[0] for url in urls]).replace(":/", "://", 1)
    return Tars(root, tuple(sorted(url.removeprefix(f"{root}/") for url in urls)))


def _find_local_tars(folder: Path) -> Tars:
    files: list[str] = []
    rejects: list[tuple[str, str]] = []

    def on_error(error: OSError) -> None:
        place = Path(os.fsdecode(error.filename)).relative_to(folder).as_posix()
        rejects.append((place, f"a folder that cannot be read: {error.strerror}"))

    if folder.is_file():
        raise BadInput(f"{folder} is a file; give the folder of the tars")
    for root, folders, names in os.walk(folder, onerror=on_error):
        here = Path(root).relative_to(folder)
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        rejects += [((here / name).as_posix(), "a link to a folder; index the folder itself") for name in links]
        for name in names:
            if name.endswith(".tar") and os.path.isfile(os.path.join(root, name)):
                files.append((here / name).as_posix())
            elif re.fullmatch(r".*\.(tar\.\w+|tgz|tbz2?|txz|tzst)", name):
                rejects.append(((here / name).as_posix(), "a compressed tar, of which no range can be read; unpack it"))
    if not files:
        found = f" ({len(rejects)} not read: {rejects[0][0]} is {rejects[0][1]})" if rejects else ""
        raise BadInput(f"{folder}: no tars found{found}; give a folder of WebDataset shards")
    return Tars(str(folder), tuple(sorted(files)), tuple(sorted(rejects)))


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
        raise BadInput(f"{public_url(url)}: web servers cannot be listed; {hint}")
    system = object_store(scheme)
    try:
        return [f"{scheme}://{path}" for path in sorted(system.find(url))]
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
    try:
        for block in read_blocks(url):
            copy.write(block)
    except Gone:
        return False
    copy.flush()
    return True
