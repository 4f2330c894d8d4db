"""Open files behind http(s), whatever form a server gives its answer.

Servers differ: some answer in chunks without a length, some compress unasked, some ignore ranges or give smaller ones,
some redirect to another host. Passwords come from the URL or from `~/.netrc`, and are never sent to another host.
"""

import base64
import contextlib
import gzip
import http.client
import netrc
import re
import ssl
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

BUSY_STATUS = (408, 425, 429)
"""Client errors that pass. All errors from 500 on may pass as well."""


class Gone(Exception):
    """The file does not exist or may not be read. Retrying would not help."""


class Busy(Exception):
    """A temporary failure."""


TRANSIENT = (OSError, http.client.HTTPException, Busy)
"""Errors after which a request may be repeated."""


@dataclass(frozen=True)
class HttpAnswer:
    """An open answer. Positions are bytes of the file."""

    start: int
    """Position of the first byte, which is 0 if the server ignored the range."""
    end: int | None
    """Position after the last byte, or None if the server did not say."""
    total: int | None
    """Size of the file, or None if the server did not say."""
    read: Callable[[int], bytes]
    """Read up to a number of bytes. Empty bytes are the end. Raises an error of `TRANSIENT` if the answer was cut."""


def public_url(url: str) -> str:
    """Return a URL without user, password, query and fragment, for names, messages and tables.

    Queries often hold signatures or tokens. Keys of object stores may contain `?` and `#`, so they stay whole.
    """
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url
    if scheme.lower() in ("http", "https"):
        rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


@contextlib.contextmanager
def open_http(url: str, *, timeout_s: float, start: int = 0, size: int | None = None) -> Iterator[HttpAnswer]:
    """Open a URL for reading.

    Args:
        url: http or https, with or without `user:password@`.
        timeout_s: seconds without a byte after which the connection is closed.
        start, size: range of bytes to ask for. Servers may give more or less.

    Raises:
        Gone: the file does not exist, may not be read, or its encoding is unsupported.
        OSError, http.client.HTTPException, Busy: a failure that may pass.
    """
    request, opener = _request(url)
    if start or size is not None:
        request.add_header("Range", f"bytes={start}-{'' if size is None else start + size - 1}")
    try:
        answer = opener.open(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # the file ends before `start`
            yield HttpAnswer(start, start, None, lambda _: b"")
            return
        is_final = error.code < 500 and error.code not in BUSY_STATUS
        raise (Gone if is_final else Busy)(f"HTTP {error.code}") from None
    except http.client.InvalidURL as error:
        raise Gone(f"invalid URL ({str(error).splitlines()[0].partition('.')[0]})") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise Gone(f"{error.reason.verify_message}; check the clock and the certificates") from None
        raise
    with answer:
        yield _describe(answer)


def _request(url: str) -> tuple[urllib.request.Request, urllib.request.OpenerDirector]:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise Gone(str(error)) from None
    if not parts.hostname:
        raise Gone("the URL names no host")
    netloc = parts.netloc.rpartition("@")[2]
    plain = quote(urlunsplit(parts._replace(netloc=netloc)), safe=":/?&=%#+,;@!$'()*~[]")
    request = urllib.request.Request(plain, headers={"User-Agent": "vjepa-data"})
    login = (unquote(parts.username), unquote(parts.password or "")) if parts.username else _netrc_login(parts.hostname)
    redirects = _Redirects(parts.hostname, None)
    if login is not None:
        redirects.login = f"Basic {base64.b64encode(':'.join(login).encode()).decode()}"
        request.add_unredirected_header("Authorization", redirects.login)
    return request, urllib.request.build_opener(redirects)


def _netrc_login(host: str) -> tuple[str, str] | None:
    """Look up user and password of a host in `~/.netrc`, or in the file that NETRC names."""
    try:
        found = netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    return (found[0], found[2]) if found and found[2] else None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and sends the password again only to the same host."""

    def __init__(self, host: str, login: str | None) -> None:
        self.host, self.login = host, login

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and self.login and urlsplit(newurl).hostname == self.host:
            request.add_unredirected_header("Authorization", self.login)
        return request


def _describe(answer: http.client.HTTPResponse) -> HttpAnswer:
    encoding = (answer.headers.get("Content-Encoding") or "identity").lower()
    if encoding in ("gzip", "x-gzip") and answer.status == 200:
        return HttpAnswer(0, None, None, _gunzip(answer))
    if encoding not in ("identity", "aws-chunked", ""):
        raise Gone(f"the server sends Content-Encoding {encoding}, which is unsupported")
    if answer.status != 206:
        return HttpAnswer(0, answer.length, answer.length, answer.read1)
    given = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", (answer.headers.get("Content-Range") or "").strip())
    if given is None:
        raise Busy("HTTP 206 without the range that it holds")
    return HttpAnswer(int(given[1]), int(given[2]) + 1, None if given[3] == "*" else int(given[3]), answer.read1)


def _gunzip(answer: http.client.HTTPResponse) -> Callable[[int], bytes]:
    file = gzip.GzipFile(fileobj=answer)

    def read(size: int) -> bytes:
        try:
            return file.read1(size)
        except (EOFError, zlib.error) as error:
            raise Busy(f"the compressed answer is cut or damaged ({error})") from None

    return read
