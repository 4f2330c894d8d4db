"""Provide a file by a local path, whether it lies on this machine, inside a tar, or behind a URL.

Anything but a plain local file is copied to memory while it is read, so that a killed process leaves nothing behind.
"""

import contextlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

import fsspec
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from vjepa_data.child_process import heartbeat
from vjepa_data.corpus.remote import store_errors
from vjepa_data.media.video import Reason, Refused

SCHEMES = frozenset({"http", "https", "s3", "gs"})
"""Supported schemes of URLs. All others are rejected, such as `file:`, `ftp:` and fsspec's chains."""

MAX_BYTES = 4 << 30
"""Largest file that is copied to memory. Worker processes have a limit of 8 GiB."""

ATTEMPTS = 5
"""Attempts of a download."""

STALL_S = 30.0
"""Seconds without a byte after which a connection is closed."""

BLOCK = 1 << 20


@dataclass(frozen=True)
class FileRef:
    """A file, given by a path or URL, or a range of bytes in it (a member of a tar)."""

    path: str
    offset: int = 0
    size: int | None = None
    """Bytes, or None for the entire file."""

    @property
    def is_remote(self) -> bool:
        return "://" in self.path


@contextlib.contextmanager
def open_local(file: FileRef) -> Iterator[Path]:
    """Provide a file by a local path for the duration of the context.

    Raises:
        Refused: the file is missing, too large to copy, or could not be downloaded in several attempts.
    """
    if not file.is_remote and file.size is None:
        yield Path(file.path)
        return
    with os.fdopen(os.memfd_create("source"), "w+b") as copy:
        if file.is_remote:
            _download(file.path, copy)
        else:
            _extract(file, copy)
        copy.flush()
        yield Path(f"/proc/self/fd/{copy.fileno()}")


def _extract(member: FileRef, copy: BinaryIO) -> None:
    size = member.size or 0
    if size > MAX_BYTES:
        raise Refused(Reason.TOO_LARGE, f"{size} bytes; maximum: {MAX_BYTES}")
    try:
        with Path(member.path).open("rb") as tar:
            tar.seek(member.offset)
            while size and (block := tar.read(min(size, BLOCK))):
                copy.write(block)
                size -= len(block)
    except OSError as error:
        raise Refused(Reason.MISSING, error.strerror or "cannot be read") from None
    if size:
        raise Refused(Reason.TRUNCATED, f"the tar ends {size} bytes early")


def _download(url: str, copy: BinaryIO) -> None:
    """Download a URL, and repeat after transient errors with growing, random pauses."""
    scheme = url.partition(":")[0].lower()
    if scheme not in SCHEMES:
        raise Refused(Reason.UNREACHABLE, f"unsupported scheme {scheme!r}; supported: {', '.join(sorted(SCHEMES))}")
    retrying = Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.5),
        retry=retry_if_exception(_is_transient),
        reraise=True,
    )
    try:
        retrying(_download_http if scheme in ("http", "https") else _download_object, url, copy)
    except FileNotFoundError:
        raise Refused(Reason.UNREACHABLE, "no such object") from None
    except PermissionError:
        raise Refused(Reason.UNREACHABLE, "access denied") from None
    except (ValueError, ImportError) as error:  # an invalid URL, or a missing package
        raise Refused(Reason.UNREACHABLE, str(error)) from None
    except (OSError, HTTPException, *store_errors()) as error:
        cause = str(getattr(error, "reason", None) or error) or type(error).__name__
        raise Refused(Reason.UNREACHABLE, f"{cause} ({ATTEMPTS} attempts)") from None


def _is_transient(error: BaseException) -> bool:
    is_final = isinstance(error, (FileNotFoundError, PermissionError, ValueError))
    return isinstance(error, (OSError, HTTPException, *store_errors())) and not is_final


def _download_object(url: str, copy: BinaryIO) -> None:
    with fsspec.open(url, "rb") as file:
        _copy_stream(file.read, copy)  # pyright: ignore[reportAttributeAccessIssue]


def _download_http(url: str, copy: BinaryIO) -> None:
    request = urllib.request.Request(quote(url, safe=":/?&=%#+,;@!$'()*~[]"), headers={"User-Agent": "vjepa-data"})
    try:
        with urllib.request.urlopen(request, timeout=STALL_S) as answer:
            length = answer.length  # None if it is missing or not a number
            if length is not None and length > MAX_BYTES:
                raise Refused(Reason.TOO_LARGE, f"{length} bytes declared; maximum: {MAX_BYTES}")
            received = _copy_stream(answer.read, copy)
            if length is not None and received != length:
                raise OSError(f"received {received} of {length} bytes")
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (408, 425, 429) or error.code >= 500:
            raise OSError(f"HTTP {error.code}") from None
        raise Refused(Reason.UNREACHABLE, f"HTTP {error.code}") from None


def _copy_stream(read: Callable[[int], bytes], copy: BinaryIO) -> int:
    """Replace the content of `copy` with a stream, and return the number of bytes."""
    copy.seek(0)
    copy.truncate()
    total = 0
    while block := read(BLOCK):
        total += len(block)
        if total > MAX_BYTES:
            raise Refused(Reason.TOO_LARGE, f"more than {MAX_BYTES} bytes")
        copy.write(block)
        heartbeat()
    return total
