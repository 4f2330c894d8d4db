"""Where a file may lie: on this machine, inside a tar, or behind an address. A reader gets a local path in each case.

What is not a plain local file is copied to memory for as long as it is read, so that a killed process leaves nothing.
"""

import contextlib
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

import fsspec

from vjepa_data.corpus.remote import store_errors
from vjepa_data.media.video import Reason, Refused

SCHEMES = frozenset({"http", "https", "s3", "gs"})
"""Addresses that may be opened. All others are refused: `file:`, `ftp:`, fsspec's chains and whatever comes next."""

MAX_BYTES = 4 << 30
"""Largest file that is copied to memory; children have a limit of 8 GiB."""

ATTEMPTS = 5
STALL_S = 30.0
"""Seconds without a byte after which a connection is given up."""

BLOCK = 1 << 20


@dataclass(frozen=True)
class FileRef:
    """A file: a local path or an address, or a run of bytes in it (a member of a tar)."""

    path: str
    offset: int = 0
    size: int | None = None
    """Bytes; None for all to the end."""

    @property
    def is_remote(self) -> bool:
        return "://" in self.path


@contextlib.contextmanager
def local(place: FileRef) -> Iterator[Path]:
    """Have a file under a local path as long as the context lasts.

    Raises:
        Refused: it is not there, is too large to copy, or its server did not give it in several attempts.
    """
    if not place.is_remote and place.size is None:
        yield Path(place.path)
        return
    with os.fdopen(os.memfd_create("source"), "w+b") as copy:
        if place.is_remote:
            _download(place.path, copy)
        else:
            _extract(place, copy)
        copy.flush()
        yield Path(f"/proc/self/fd/{copy.fileno()}")


def _extract(place: FileRef, copy: BinaryIO) -> None:
    size = place.size or 0
    if size > MAX_BYTES:
        raise Refused(Reason.TOO_LARGE, f"{size} bytes, at most {MAX_BYTES} are copied to memory")
    try:
        with Path(place.path).open("rb") as file:
            file.seek(place.offset)
            while size and (block := file.read(min(size, BLOCK))):
                copy.write(block)
                size -= len(block)
    except OSError as error:
        raise Refused(Reason.MISSING, error.strerror or "cannot be read") from None
    if size:
        raise Refused(Reason.TRUNCATED, f"the tar ends {size} bytes early")


def _download(url: str, copy: BinaryIO) -> None:
    """Copy what is behind an address; on trouble that may pass, try again with growing, random pauses."""
    scheme = url.partition(":")[0].lower()
    if scheme not in SCHEMES:
        raise Refused(Reason.UNREACHABLE, f"{scheme}: addresses are not opened, only {', '.join(sorted(SCHEMES))}")
    trouble = ""
    for attempt in range(ATTEMPTS):
        copy.seek(0)
        copy.truncate()
        try:
            if scheme in ("http", "https"):
                _http(url, copy)
            else:
                with fsspec.open(url, "rb") as file:
                    _pour(file.read, copy)  # pyright: ignore[reportAttributeAccessIssue]
            return
        except _Gone as error:
            raise Refused(Reason.UNREACHABLE, str(error)) from None
        except FileNotFoundError:
            raise Refused(Reason.UNREACHABLE, "no such object") from None
        except PermissionError:
            raise Refused(Reason.UNREACHABLE, "access denied") from None
        except (ValueError, ImportError) as error:  # what is no address, or needs a package that is not installed
            raise Refused(Reason.UNREACHABLE, str(error)) from None
        except (OSError, HTTPException, TimeoutError, *store_errors()) as error:
            trouble = str(getattr(error, "reason", None) or error) or type(error).__name__
            if attempt + 1 < ATTEMPTS:
                time.sleep(random.uniform(0.5, 1.0) * 2**attempt / 2)
    raise Refused(Reason.UNREACHABLE, f"{trouble} ({ATTEMPTS} attempts)")


class _Gone(Exception):
    """The server's answer will not change."""


def _http(url: str, copy: BinaryIO) -> None:
    request = urllib.request.Request(quote(url, safe=":/?&=%#+,;@!$'()*~[]"), headers={"User-Agent": "vjepa-data"})
    try:
        with urllib.request.urlopen(request, timeout=STALL_S) as answer:
            length = answer.length  # None where none is declared, or what is no number
            if length is not None and length > MAX_BYTES:
                raise Refused(Reason.TOO_LARGE, f"{length} bytes declared, at most {MAX_BYTES} are copied to memory")
            got = _pour(answer.read, copy)
            if length is not None and got != length:
                raise OSError(f"{got} of {length} bytes arrived")
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (408, 425, 429) or error.code >= 500:
            raise OSError(f"HTTP {error.code}") from None
        raise _Gone(f"HTTP {error.code}") from None


def _pour(read: Callable[[int], bytes], copy: BinaryIO) -> int:
    """Copy block by block and give the number of bytes."""
    total = 0
    while block := read(BLOCK):
        total += len(block)
        if total > MAX_BYTES:
            raise Refused(Reason.TOO_LARGE, f"more than {MAX_BYTES} bytes")
        copy.write(block)
    return total
