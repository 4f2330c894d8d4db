"""Provide a file by a local path, whether it lies on this machine, inside a tar or parquet, or behind a URL.

Anything but a plain local file is copied to memory while it is read, so that a killed process leaves nothing behind.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from vjepa_data.child_process import heartbeat
from vjepa_data.corpus.http_client import Busy, Gone, open_http, public_url
from vjepa_data.corpus.remote import store_errors, store_of
from vjepa_data.media.hdf5_frames import write_frames
from vjepa_data.media.video import Reason, Refused

SCHEMES = frozenset({"http", "https", "s3", "gs"})
"""Supported schemes of URLs. All other schemes are rejected, such as `file:`, `ftp:` and fsspec's chains."""

MAX_BYTES = 4 << 30
"""Largest file that is copied to memory. Worker processes have a limit of 8 GiB."""

ATTEMPTS = 5
"""Attempts of a download."""

STALL_S = 30.0
"""Seconds without a byte after which a connection is closed."""

BLOCK = 1 << 20


@dataclass(frozen=True)
class FileRef:
    """A file, given by a path or URL, or a part of it: a range of bytes (a member of a tar) or a cell of a parquet."""

    path: str
    offset: int = 0
    """First byte, or the row of a cell, counted from 0."""
    size: int | None = None
    """Bytes, or None for the entire file."""
    column: str | None = None
    """Column of a cell of a parquet file: binary, or a struct with a field `bytes`. Of an HDF5 file: a dataset of
    frames."""
    frames_hz: float | None = None
    """Rate of the frames of an HDF5 dataset."""

    @property
    def is_remote(self) -> bool:
        return "://" in self.path

    @property
    def is_whole(self) -> bool:
        return self.size is None and self.column is None

    def __repr__(self) -> str:  # without passwords and signatures, since tracebacks show it
        return f"FileRef({public_url(self.path)!r}, {self.offset}, {self.size}, {self.column!r})"


@contextlib.contextmanager
def open_local(file: FileRef) -> Iterator[Path]:
    """Provide a file by a local path for the duration of the context.

    Raises:
        Refused: the file is missing, too large to copy, or could not be downloaded in several attempts.
    """
    if not file.is_remote and file.is_whole:
        yield Path(file.path)
        return
    with os.fdopen(os.memfd_create("source"), "w+b") as copy:
        if file.is_remote:
            _download(file.path, copy)
        elif file.frames_hz is not None:
            write_frames(file.path, file.column or "", file.frames_hz, copy)
        elif file.column is not None:
            _extract_cell(file, file.column, copy)
        else:
            _extract(file, copy)
        copy.flush()
        yield Path(f"/proc/self/fd/{copy.fileno()}")


def _extract(member: FileRef, copy: BinaryIO) -> None:
    size = member.size or 0
    if size > MAX_BYTES:
        raise Refused(Reason.TOO_LARGE, f"{size} bytes, maximum: {MAX_BYTES}")
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


def _extract_cell(cell: FileRef, column: str, copy: BinaryIO) -> None:
    """Copy the bytes in a cell of a parquet file. Only the row group of that row is read, a row at a time."""
    value: Any = None
    try:
        with pq.ParquetFile(cell.path) as table:
            row, group = cell.offset, 0
            while row >= (rows := table.metadata.row_group(group).num_rows):
                row, group = row - rows, group + 1
            for batch in table.iter_batches(1, row_groups=[group], columns=[column], use_threads=False):
                if row == 0:
                    value = batch.column(0)[0].as_py()
                    break
                row -= 1
    except (OSError, pa.ArrowException) as error:
        raise Refused(Reason.MISSING, f"column {column!r}: {str(error).splitlines()[0]}") from None
    data = value.get("bytes") if isinstance(value, dict) else value
    if not data:
        raise Refused(Reason.EMPTY, f"column {column!r} holds no bytes in this row")
    copy.write(data)


def _download(url: str, copy: BinaryIO) -> None:
    """Download a URL, and repeat after transient errors with growing, random pauses."""
    scheme = url.partition(":")[0].lower()
    if scheme not in SCHEMES:
        raise Refused(Reason.UNREACHABLE, f"unsupported scheme {scheme!r}, supported: {', '.join(sorted(SCHEMES))}")
    retrying = Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.5),
        retry=retry_if_exception(_is_transient),
        reraise=True,
    )
    try:
        retrying(_download_http if scheme in ("http", "https") else _download_object, url, copy)
    except Gone as error:
        raise Refused(Reason.UNREACHABLE, str(error)) from None
    except FileNotFoundError:
        raise Refused(Reason.UNREACHABLE, "no such object") from None
    except PermissionError:
        raise Refused(Reason.UNREACHABLE, "access denied") from None
    except (ValueError, ImportError) as error:  # an invalid URL, or a missing package
        raise Refused(Reason.UNREACHABLE, _without_secrets(error, url)) from None
    except (OSError, HTTPException, Busy, *store_errors()) as error:
        cause = _without_secrets(getattr(error, "reason", None) or error, url)
        raise Refused(Reason.UNREACHABLE, f"{cause} ({ATTEMPTS} attempts)") from None


def _without_secrets(error: object, url: str) -> str:
    """Return the text of an error without the user, password and query of a URL."""
    text = str(error) or type(error).__name__
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        for secret in (parts.netloc.rpartition("@")[0], parts.password, parts.query, parts.fragment):
            text = text.replace(secret, "...") if secret else text
    return text


def _is_transient(error: BaseException) -> bool:
    is_final = isinstance(error, (FileNotFoundError, PermissionError, ValueError))
    return isinstance(error, (OSError, HTTPException, Busy, *store_errors())) and not is_final


def _download_object(url: str, copy: BinaryIO) -> None:
    with store_of(url).open(url, "rb") as file:
        _copy_stream(file.read, copy)


def _download_http(url: str, copy: BinaryIO) -> None:
    with open_http(url, timeout_s=STALL_S) as answer:
        if answer.total is not None and answer.total > MAX_BYTES:
            raise Refused(Reason.TOO_LARGE, f"{answer.total} bytes declared, maximum: {MAX_BYTES}")
        received = _copy_stream(answer.read, copy)
    if answer.total is not None and received != answer.total:
        raise OSError(f"received {received} of {answer.total} bytes")


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
