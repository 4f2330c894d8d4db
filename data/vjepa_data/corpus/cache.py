"""Copies of remote shards on a local disk, shared by all processes of a machine.

A copy is named by the sha256 of what it holds, so two corpora never collide, and it appears only whole and verified.
Processes that want the same shard download it once: the first takes a lock, the others meanwhile read the few samples
they need by range. The oldest unused copies make room for new ones; one that any process has open stays.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import queue
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

from vjepa_data.corpus.remote import Gone, StoreUnreachable, read_range

log = logging.getLogger(__name__)

BLOCK_BYTES = 16 << 20


class Cache:
    """A folder of verified copies. Any number of processes may use the same folder at once."""

    def __init__(self, folder: str | Path, limit_gib: float) -> None:
        """Args:
        folder: where copies lie; made if absent. It must be on a local disk (locks are `flock`).
        limit_gib: size above which the oldest unused copies are removed.
        """
        self.folder, self.limit_bytes = Path(folder), int(limit_gib * 2**30)
        self._wanted: queue.Queue[tuple[str, int, str] | None] | None = None
        self._asked: set[str] = set()

    def __reduce__(self) -> tuple:
        return Cache, (str(self.folder), self.limit_bytes / 2**30)

    def path(self, sha256: str) -> Path:
        """Where the copy with this content lies, if there is one."""
        return self.folder / sha256[:2] / f"{sha256}.tar"

    def open(self, sha256: str) -> int | None:
        """Open a copy; as long as the descriptor is open it is not evicted.

        Returns:
            A file descriptor that the caller closes, or None where there is no copy.
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
        """Ask for a copy, to be made by a thread of this process while it does other things."""
        if sha256 in self._asked or self.path(sha256).exists():
            return
        if self._wanted is None:
            self._wanted = queue.Queue()
            worker = (Cache(*self.__reduce__()[1]), self._wanted, self._asked)  # it must not keep this object alive
            threading.Thread(target=_fetch_wanted, args=worker, name="shard cache", daemon=True).start()
            weakref.finalize(self, self._wanted.put, None)
        self._asked.add(sha256)
        self._wanted.put((url, size, sha256))

    def fetch(self, url: str, size: int, sha256: str) -> bool:
        """Make a copy, unless there is one; wait for whoever is making it.

        Returns:
            Whether there is a copy now. There is none if the file is gone, holds something else, or the disk is full.
        """
        with self._lock(sha256):
            if self.path(sha256).exists():
                return True
            self._make_room(size)
            try:
                return self._download(url, size, sha256)
            except Gone as e:
                log.warning("%s: %s", url, e)
            except OSError as e:
                if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                log.warning(
                    "%s is full: %s is read sample by sample; free some space or lower cache_gib", self.folder, url
                )
            return False

    def distrust(self, sha256: str) -> None:
        """Remove a copy that turned out to be damaged."""
        self.path(sha256).unlink(missing_ok=True)
        self._asked.discard(sha256)

    @contextlib.contextmanager
    def _lock(self, sha256: str) -> Iterator[None]:
        path = self.folder / "locks" / sha256
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as lock:  # given up by the kernel when the process dies
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _download(self, url: str, size: int, sha256: str) -> bool:
        path = self.path(sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        at = 0
        for _ in range(3):
            digest, at = hashlib.sha256(), 0
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".partial-", delete=False) as copy:
                try:
                    while at < size and (block := read_range(url, at, min(BLOCK_BYTES, size - at))):
                        copy.write(block)
                        digest.update(block)
                        at += len(block)
                    copy.flush()
                    if at == size and digest.hexdigest() == sha256:
                        os.rename(copy.name, path)
                        return True
                finally:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(copy.name)
        log.warning("%s holds something else than its manifest says (%d of %d bytes)", url, at, size)
        return False

    def _make_room(self, size: int) -> None:
        """Remove the copies that were not used for longest, until `size` more bytes fit the limit."""
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
                "%s holds %.1f GB in use, more than its limit; raise loader.cache_gib", self.folder, total / 1e9
            )


def _fetch_wanted(cache: Cache, wanted: "queue.Queue[tuple[str, int, str] | None]", asked: set[str]) -> None:
    while one := wanted.get():
        url, size, sha256 = one
        try:
            cache.fetch(url, size, sha256)
        except StoreUnreachable as e:  # whoever needs a sample of it finds that out too, and says so
            log.warning("%s", e)
        except OSError as e:  # of the disk; this thread has other shards to fetch
            log.warning("%s: no copy in %s: %s", url, cache.folder, e)
        asked.discard(sha256)


def _remove_unused(path: Path) -> bool:
    try:
        with path.open("rb") as copy:
            fcntl.flock(copy, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except (BlockingIOError, FileNotFoundError):
        return False
    return True
