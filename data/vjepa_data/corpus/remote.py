"""Reading pieces of remote files: http(s) through the standard library, object stores through fsspec.

One primitive, a range of bytes. What may pass (a server that is busy, slow or gone for a moment) is tried again for
minutes, since replacing samples because a network was down would make the stream depend on the network; what will not
pass (no such file, no permission) is `Unreadable` at once.
"""

import contextlib
import functools
import http.client
import logging
import random
import socket
import time
import urllib.error
import urllib.request
from typing import Any

from vjepa_data.compat import read_store_range
from vjepa_data.errors import BadInput

log = logging.getLogger(__name__)

SCHEMES = ("http", "https", "s3", "gs")
PATIENCE_S = 300.0  # how long a store may be out of reach before the run stops
LONGEST_ATTEMPT_S = 60.0  # of one that took longer it is assumed that the job was suspended meanwhile
SILENCE_S = 30.0  # without a byte, a connection is given up
SLOWEST_BYTES_S = 100_000  # a slower answer is given up too
PIECE_BYTES = 1 << 20


class Gone(Exception):
    """There is no such file, or we may not read it: trying again would not help."""


class StoreUnreachable(BadInput):
    """The store did not answer for so long that the run must stop."""


def is_remote(place: str) -> bool:
    """Say whether a place is a URL rather than a path.

    Raises:
        BadInput: it is a URL of a kind that is not read, such as `pipe:` or `file:`.
    """
    scheme, colon, rest = place.partition(":")
    if not colon or "/" in scheme or not scheme.isalnum():
        return False
    if scheme in SCHEMES and rest.startswith("//"):
        return True
    raise BadInput(f"{place!r} is no place to read shards from; give a folder, or a URL of {', '.join(SCHEMES)}")


def read_range(url: str, start: int, size: int) -> bytes:
    """Read `size` bytes of a remote file from byte `start`; fewer where the file ends.

    Raises:
        Gone: it does not exist or may not be read.
        Unreachable: no good answer in five minutes of trying.
    """
    waited_s, attempt = 0.0, 0
    while True:
        began_s = time.monotonic()
        try:
            return _http_range(url, start, size) if url.startswith("http") else _store_range(url, start, size)
        except (OSError, http.client.HTTPException, _Busy) as e:
            waited_s += min(time.monotonic() - began_s, LONGEST_ATTEMPT_S)
            if waited_s > PATIENCE_S:
                raise StoreUnreachable(
                    f"{url} cannot be reached for {waited_s:.0f} s ({e}); see to the network or the store, then resume"
                ) from e
            log.log(logging.WARNING if attempt % 10 == 3 else logging.DEBUG, "%s: %s, trying again", url, e)
        # Jitter, lest all workers of a cluster come back in the same moment.
        pause_s = random.uniform(0.5, 1.0) * min(15.0, 0.1 * 2**attempt)
        time.sleep(pause_s)
        waited_s += pause_s
        attempt = min(attempt + 1, 20)


class _Busy(Exception):
    """A failure that may pass."""


def _http_range(url: str, start: int, size: int) -> bytes:
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-{start + size - 1}", "User-Agent": "vjepa"})
    deadline = time.monotonic() + SILENCE_S + size / SLOWEST_BYTES_S
    try:
        with urllib.request.urlopen(request, timeout=SILENCE_S) as answer:
            skip = start if answer.status == 200 else 0  # it sends the whole file, knowing no ranges
            data = _take(answer, skip + size, deadline)[skip:]
            whole = answer.headers.get("Content-Range", "").rpartition("/")[2] or answer.headers.get("Content-Length")
    except urllib.error.HTTPError as e:
        with contextlib.closing(e):
            if e.code == 416:  # the file ends before `start`
                return b""
            if e.code in (400, 401, 403, 404, 405, 410):
                raise Gone(f"HTTP {e.code} {e.reason}") from None
            raise _Busy(f"HTTP {e.code} {e.reason}") from None
    expected = size if not (whole or "").isdigit() else max(0, min(size, int(whole or 0) - start))
    if len(data) != expected:
        raise _Busy(f"{len(data)} of {expected} bytes came")
    return data


def _take(answer: Any, size: int, deadline: float) -> bytes:
    parts, left = [], size
    while left and (part := answer.read1(min(left, PIECE_BYTES))):
        parts.append(part)
        left -= len(part)
        if time.monotonic() > deadline:
            raise _Busy(f"slower than {SLOWEST_BYTES_S} bytes a second")
    return b"".join(parts)


@functools.cache
def _store(scheme: str) -> Any:
    import fsspec

    settings = {}
    if scheme == "s3":
        settings["config_kwargs"] = {"connect_timeout": 10, "read_timeout": SILENCE_S, "retries": {"max_attempts": 1}}
    try:
        return fsspec.filesystem(scheme, **settings)
    except ImportError as e:
        raise BadInput(
            f"{scheme}:// needs a package that is not installed ({e}); pip install 'vjepa-pretrain[s3]'"
        ) from e


def _store_range(url: str, start: int, size: int) -> bytes:
    from fsspec.exceptions import FSTimeoutError

    store = _store(url.partition(":")[0])
    limit_s = SILENCE_S + size / SLOWEST_BYTES_S
    try:
        return read_store_range(store, url, start, start + size, timeout_s=limit_s)
    except (FileNotFoundError, PermissionError) as e:
        raise Gone(str(e) or type(e).__name__) from e
    except FSTimeoutError as e:
        raise _Busy(f"slower than {SLOWEST_BYTES_S} bytes a second") from e
    except store_errors() as e:
        raise _Busy(f"{type(e).__name__}: {e}") from e
    except OSError as e:
        if _is_past_the_end(e):
            return b""
        raise


def _is_past_the_end(error: OSError) -> bool:
    """Whether a store says that the file ends before the range that was asked for: s3fs by its cause, gcsfs itself."""
    answer = getattr(error.__cause__, "response", {})
    return answer.get("Error", {}).get("Code") in ("InvalidRange", "416") or getattr(error, "code", None) == 416


@functools.cache
def store_errors() -> tuple[type[Exception], ...]:
    """List the failures of object stores that are no OSError."""
    found: list[type[Exception]] = [socket.timeout]
    with contextlib.suppress(ImportError):
        from botocore.exceptions import BotoCoreError, ClientError

        found += [BotoCoreError, ClientError]
    with contextlib.suppress(ImportError):
        from aiohttp import ClientError as HttpError

        found.append(HttpError)
    return tuple(found)
