"""Keep copies of remote shards on a local disk, shared by all processes of a machine.

A copy is named by the sha256 of its contents, so two corpora never collide, and it appears only complete and verified.
Processes that need the same shard download it once: the first takes a lock, other processes meanwhile read the few
samples they need by range. The least recently used copies are removed to make room, except copies in use.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import queue
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from vjepa_data.atomic import atomic_file
from vjepa_data.corpus.http_client import Gone, public_url
from vjepa_data.corpus.remote import StoreUnreachable, read_blocks

log = logging.getLogger(__name__)


class Cache:
    """A folder of verified copies. Any number of processes may use the same folder at once."""

    def __init__(self, folder: str | Path, limit_gib: float) -> None:
        """Args:
        folder: folder of the copies, created if absent. It must be on a local disk (locks are `flock`).
        limit_gib: size above which the least recently used copies are removed.
        """
        self.folder, self.limit_bytes = Path(folder), int(limit_gib * 2**30)
        self._wanted: queue.Queue[tuple[str, int, str] | None] | None = None
        self._asked: set[str] = set()

    def __reduce__(self) -> tuple:
        return Cache, (str(self.folder), self.limit_bytes / 2**30)

    def path(self, sha256: str) -> Path:
        """Return the path of the copy with these contents, which need not exist."""
        return self.folder / sha256[:2] / f"{sha256}.tar"

    def open(self, sha256: str) -> int | None:
        """Open a copy. It is not evicted while the descriptor is open.

        Returns:
            A file descriptor that the caller must close, or None if there is no copy.
        """
        path = self.path(sha256)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_nlink == 0:  # evicted between the two lines above
            os.close(descriptor)
            return None
        os.utime(path)  # the time of last use, by which copies are evicted
        return descriptor

    def want(self, url: str, size: int, sha256: str) -> None:
        """Request a copy, which a background thread of this process downloads."""
        if sha256 in self._asked or self.path(sha256).exists():
            return
        if self._wanted is None:
            self._wanted = queue.Queue()
            worker = (
                Cache(*self.__reduce__()[1]),
                self._wanted,
                self._asked,
            )  # must not keep self alive
            threading.Thread(target=_fetch_wanted, args=worker, name="shard cache", daemon=True).start()
            weakref.finalize(self, self._wanted.put, None)
        self._asked.add(sha256)
        self._wanted.put((url, size, sha256))

    def fetch(self, url: str, size: int, sha256: str) -> bool:
        """Download a copy unless it exists. If another process is downloading it, wait.

        Returns:
            Whether there is a copy now. There is none if the file is missing or has other contents, or the disk is
            full.
        """
        with self._lock(sha256):
            if self.path(sha256).exists():
                return True
            self._make_room(size)
            try:
                return self._download(url, size, sha256)
            except Gone as e:
                log.warning("%s: %s", public_url(url), e)
            except OSError as e:
                if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                log.warning(
                    "%s is full, so %s is read sample by sample; free space or lower loader.cache_gib",
                    self.folder,
                    public_url(url),
                )
            return False

    def distrust(self, sha256: str) -> None:
        """Remove a damaged copy."""
        self.path(sha256).unlink(missing_ok=True)
        self._asked.discard(sha256)

    @contextlib.contextmanager
    def _lock(self, sha256: str) -> Iterator[None]:
        path = self.folder / "locks" / sha256
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as lock:  # the kernel releases it when the process ends
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _download(self, url: str, size: int, sha256: str) -> bool:
        path = self.path(sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        mismatch = ""
        for _ in range(3):
            try:
                with atomic_file(path, durable=False) as copy:
                    _copy(url, size, sha256, copy)
                return True
            except _Mismatch as error:
                mismatch = str(error)
        log.warning("%s does not match its manifest (%s)", public_url(url), mismatch)
        return False

    def _make_room(self, size: int) -> None:
        """Remove the least recently used copies until `size` more bytes fit the limit."""
        copies = []
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                facts = path.stat()
                copies.append((facts.st_mtime, facts.st_size, path))
        total = sum(bytes_ for _, bytes_, _ in copies)
        for _, bytes_, path in sorted(copies):
            if total + size <= self.limit_bytes:
                return
            if _remove_unused(path):
                total -= bytes_
        if total + size > self.limit_bytes:
            log.warning(
                "%s has %.1f GB of copies in use, above its limit; raise loader.cache_gib", self.folder, total / 1e9
            )


def _fetch_wanted(cache: Cache, wanted: "queue.Queue[tuple[str, int, str] | None]", asked: set[str]) -> None:
    while request := wanted.get():
        url, size, sha256 = request
        try:
            cache.fetch(url, size, sha256)
        except StoreUnreachable as e:  # reading a sample of this shard fails likewise and stops the run
            log.warning("%s", e)
        except OSError as e:  # a disk error; this thread has other shards to download
            log.warning("%s: no copy in %s: %s", public_url(url), cache.folder, e)
        asked.discard(sha256)


class _Mismatch(Exception):
    """The downloaded bytes differ from the manifest."""


def _copy(url: str, size: int, sha256: str, copy: BinaryIO) -> None:
    digest, at = hashlib.sha256(), 0
    for block in read_blocks(url):
        copy.write(block)
        digest.update(block)
        at += len(block)
        if at > size:
            break
    if at != size or digest.hexdigest() != sha256:
        raise _Mismatch(f"{at} of {size} bytes, sha256 {digest.hexdigest()[:16]} instead of {sha256[:16]}")


def _remove_unused(path: Path) -> bool:
    try:
        with path.open("rb") as copy:
            fcntl.flock(copy, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except (BlockingIOError, FileNotFoundError):
        return False
    return True
