"""Read remote files, whole or by range: http(s) through the standard library, object stores through fsspec.

Temporary failures (a busy, slow or absent server) are retried for minutes, since substituting samples during an outage
would make the data order depend on the network. Permanent failures (no such file, no permission) raise `Gone` at once.
"""

import contextlib
import functools
import logging
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from tenacity import RetryCallState, RetryError, Retrying, retry_if_exception, wait_random_exponential

from vjepa_data.compat import read_store_range
from vjepa_data.corpus.http_client import TRANSIENT, Busy, Gone, HttpAnswer, open_http, public_url
from vjepa_data.errors import BadInput

T = TypeVar("T")
log = logging.getLogger(__name__)

SCHEMES = ("http", "https", "s3", "gs")
OUTAGE_LIMIT_S = 300.0  # outage of a store after which the run stops
LONGEST_ATTEMPT_S = 60.0  # a longer attempt counts as this much: the job was probably suspended meanwhile
SILENCE_S = 30.0  # time without a byte after which a connection is closed
SLOWEST_BYTES_S = 100_000  # slower answers are aborted
PIECE_BYTES = 1 << 20
BLOCK_BYTES = 16 << 20  # size of the blocks in which whole files are read


class StoreUnreachable(BadInput):
    """A store did not answer within the limit on outages, so the run stops."""


def is_remote(address: str) -> bool:
    """Say whether an address is a URL rather than a path.

    Raises:
        BadInput: it is a URL of an unsupported kind, such as `pipe:` or `file:`.
    """
    scheme, colon, rest = address.partition(":")
    if not colon or "/" in scheme or not scheme.isalnum():
        return False
    if scheme in SCHEMES and rest.startswith("//"):
        return True
    raise BadInput(f"cannot read shards from {address!r}; give a folder, or a URL of kind {', '.join(SCHEMES)}")


def read_range(url: str, start: int, size: int) -> bytes:
    """Read `size` bytes of a remote file from byte `start`, or fewer at the end of the file.

    Raises:
        Gone: it does not exist or may not be read.
        StoreUnreachable: all attempts failed for `OUTAGE_LIMIT_S` seconds.
    """
    read = _http_range if url.startswith("http") else _store_range
    return with_retries(lambda: read(url, start, size), public_url(url), transient=TRANSIENT)


def read_blocks(url: str) -> Iterator[bytes]:
    """Yield a remote file from start to end, over a single connection unless it breaks.

    Raises:
        Gone, StoreUnreachable: as for `read_range`.
    """
    if not url.startswith("http"):
        at = 0
        while block := read_range(url, at, BLOCK_BYTES):
            yield block
            at += len(block)
        return
    stream = _HttpStream(url)
    with contextlib.closing(stream):
        while block := with_retries(stream.next_block, public_url(url), transient=TRANSIENT):
            yield block


def with_retries(
    action: Callable[[], T],
    address: object,
    *,
    transient: tuple[type[Exception], ...],
    permanent: tuple[type[Exception], ...] = (),
) -> T:
    """Call a function until it succeeds, with growing random pauses.

    Args:
        action: the function.
        address: the store or file that it accesses, for messages.
        transient: errors after which it is called again.
        permanent: subclasses of them that are raised at once.

    Raises:
        StoreUnreachable: failed attempts and pauses sum to more than `OUTAGE_LIMIT_S`.
    """
    began_s = failed_s = 0.0

    def begin(state: RetryCallState) -> None:
        nonlocal began_s
        began_s = time.monotonic()

    def is_over(state: RetryCallState) -> bool:
        """tenacity's own limit would count the time during which a job is suspended."""
        nonlocal failed_s
        failed_s += min(time.monotonic() - began_s, LONGEST_ATTEMPT_S)
        return failed_s + state.idle_for > OUTAGE_LIMIT_S

    def log_retry(state: RetryCallState) -> None:
        error = state.outcome and state.outcome.exception()
        level = logging.WARNING if state.attempt_number % 10 == 4 else logging.DEBUG
        log.log(level, "%s: attempt %d failed (%s); retrying", address, state.attempt_number, error)

    retrying = Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, transient) and not isinstance(error, permanent)),
        before=begin,
        stop=is_over,
        wait=wait_random_exponential(multiplier=0.2, max=15.0),  # random, so that workers do not return all at once
        before_sleep=log_retry,
    )
    try:
        return retrying(action)
    except RetryError as error:
        last = error.last_attempt.exception()
        raise StoreUnreachable(
            f"{address} was unreachable for over {OUTAGE_LIMIT_S:.0f} s ({last}). "
            "Check the network or the store, then resume."
        ) from last


class _HttpStream:
    """A file that is read from its start. After a failure, `next_block` connects again where it stopped."""

    def __init__(self, url: str) -> None:
        self._url, self._at, self._is_done = url, 0, False
        self._connection = contextlib.ExitStack()
        self._answer: HttpAnswer | None = None

    def close(self) -> None:
        self._connection.close()
        self._answer = None

    def next_block(self) -> bytes:
        """Return the next bytes, which are empty at the end.

        Raises:
            Gone: the file does not exist or may not be read.
            OSError, http.client.HTTPException, Busy: a failure that may pass.
        """
        if self._is_done:
            return b""
        deadline = time.monotonic() + SILENCE_S + (self._at + BLOCK_BYTES) / SLOWEST_BYTES_S
        try:
            answer = self._answer or self._connect(deadline)
            data = _take(answer.read, BLOCK_BYTES, deadline)
            end = self._at + len(data)
            if len(data) < BLOCK_BYTES and end < (answer.end or 0):
                raise Busy(f"received {end} of {answer.end} bytes")
        except BaseException:
            self.close()
            raise
        if end == answer.end:  # a server may give less than it was asked for
            self.close()
        self._is_done = not data or end == answer.total
        self._at = end
        return data

    def _connect(self, deadline: float) -> HttpAnswer:
        answer = self._connection.enter_context(open_http(self._url, timeout_s=SILENCE_S, start=self._at))
        _skip_to(self._at, answer, deadline)
        self._answer = answer
        return answer


def _http_range(url: str, start: int, size: int) -> bytes:
    deadline = time.monotonic() + SILENCE_S + size / SLOWEST_BYTES_S
    parts: list[bytes] = []
    at, end = start, start + size
    while at < end:
        with open_http(url, timeout_s=SILENCE_S, start=at, size=end - at) as answer:
            _skip_to(at, answer, deadline)
            data = _take(answer.read, end - at, deadline)
        given = end if answer.end is None else min(end, answer.end)
        if answer.end is not None and at + len(data) < given:
            raise Busy(f"received {len(data)} of {given - at} bytes")
        parts.append(data)
        at += len(data)
        if not data or answer.total is None or at >= answer.total:
            break
    return b"".join(parts)


def _skip_to(at: int, answer: HttpAnswer, deadline: float) -> None:
    """Read and drop the bytes that a server sends before the requested position."""
    if answer.start > at:
        raise Busy(f"received bytes from {answer.start} on instead of {at}")
    left = at - answer.start
    while left and (part := _take(answer.read, min(left, BLOCK_BYTES), deadline)):
        left -= len(part)


def _take(read: Callable[[int], bytes], size: int, deadline: float) -> bytes:
    parts, left = [], size
    while left and (part := read(min(left, PIECE_BYTES))):
        parts.append(part)
        left -= len(part)
        if time.monotonic() > deadline:
            raise Busy(f"slower than {SLOWEST_BYTES_S} bytes per second")
    return b"".join(parts)


@functools.cache
def object_store(scheme: str, *, of_version: bool = False) -> Any:
    """Return the fsspec file system of a scheme. Keys may hold `::`, which `fsspec.open` takes for a chain.

    Args:
        scheme: of a URL.
        of_version: whether the URLs name a version of an S3 object (`?versionId=`). By default s3fs reads the newest.
    """
    import fsspec

    settings: dict[str, Any] = {}
    if scheme == "s3":
        settings["version_aware"] = of_version
        settings["config_kwargs"] = {"connect_timeout": 10, "read_timeout": SILENCE_S, "retries": {"max_attempts": 1}}
    logging.getLogger("botocore").setLevel(logging.WARNING)  # it logs where it found the credentials
    try:
        return fsspec.filesystem(scheme, **settings)
    except ImportError as e:
        raise BadInput(f"{scheme}:// needs a missing package ({e}); pip install 'vjepa-pretrain[s3]'") from e


def store_of(url: str) -> Any:
    """Return the fsspec file system that opens a URL."""
    return object_store(url.partition(":")[0].lower(), of_version="?versionId=" in url)


def _store_range(url: str, start: int, size: int) -> bytes:
    from fsspec.exceptions import FSTimeoutError

    store = store_of(url)
    limit_s = SILENCE_S + size / SLOWEST_BYTES_S
    try:
        return read_store_range(store, url, start, start + size, timeout_s=limit_s)
    except (FileNotFoundError, PermissionError) as e:
        raise Gone(str(e) or type(e).__name__) from e
    except FSTimeoutError as e:
        raise Busy(f"slower than {SLOWEST_BYTES_S} bytes per second") from e
    except store_errors() as e:
        raise Busy(f"{type(e).__name__}: {e}") from e
    except OSError as e:
        if _is_past_the_end(e):
            return b""
        raise


def _is_past_the_end(error: OSError) -> bool:
    """Say whether a store rejected a range beyond the end of the file: s3fs tells by the cause, gcsfs by the code."""
    answer = getattr(error.__cause__, "response", {})
    return answer.get("Error", {}).get("Code") in ("InvalidRange", "416") or getattr(error, "code", None) == 416


@functools.cache
def store_errors() -> tuple[type[Exception], ...]:
    """List errors of object stores that are not an OSError."""
    found: list[type[Exception]] = [socket.timeout]
    with contextlib.suppress(ImportError):
        from botocore.exceptions import BotoCoreError, ClientError

        found += [BotoCoreError, ClientError]
    with contextlib.suppress(ImportError):
        from aiohttp import ClientError as HttpError

        found.append(HttpError)
    return tuple(found)
