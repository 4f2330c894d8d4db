"""A local object store for tests: HTTP, the part of the S3 protocol that s3fs uses, and faults on demand.

store.objects["bucket/a.mp4"] = data         http://127.0.0.1:PORT/bucket/a.mp4     s3://bucket/a.mp4
store.trouble = lambda asked: Trouble(status=503) if asked.time % 2 else None
"""

import gzip
import http.server
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

KEYS_PER_PAGE = 1000
NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
CODES = {403: "AccessDenied", 404: "NoSuchKey", 416: "InvalidRange", 503: "SlowDown"}
PIECE_BYTES = 1000


class Asked(NamedTuple):
    """A request, the argument of `ObjectStore.trouble`."""

    method: str
    key: str
    """Bucket and name of the object."""
    time: int
    """Number of the request for this key, from 1."""


@dataclass(frozen=True)
class Trouble:
    """Fault of an answer, by default none."""

    status: int | None = None
    """The answer is only this status."""
    location: str | None = None
    """Target of a redirect (status 302)."""
    knows_ranges: bool = True
    flipped_byte: int | None = None
    """Position of the byte to corrupt, if the data are long enough."""
    declared_bytes: int | None = None
    sent_bytes: int | None = None
    """Bytes after which the connection is closed, after `stall_s` seconds."""
    stall_s: float = 0.0
    bytes_per_s: float | None = None
    form: str = "plain"
    """Form of complete files, sent with status 200: "chunked", "chunked and cut", "gzip" or "without length"."""
    largest_range: int | None = None
    """Longest range in bytes. Longer ranges are shortened."""
    login: str | None = None
    """`Authorization` that a request must have."""


class Answer(NamedTuple):
    """A complete answer."""

    status: int
    data: bytes = b""
    headers: dict[str, str] = {}  # noqa: RUF012  never written to


class ObjectStore(http.server.ThreadingHTTPServer):
    """Buckets in memory. `trouble` returns the fault of a request, if any."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.requests: list[Asked] = []
        self.bytes_sent = 0
        self.trouble: Callable[[Asked], Trouble | None] = lambda asked: None
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def take(self, folder: Path) -> None:
        """Store every file of a folder in a bucket of the folder's name."""
        for file in folder.rglob("*"):
            if file.is_file():
                self.objects[f"{folder.name}/{file.relative_to(folder)}"] = file.read_bytes()

    def flip(self, key: str, at: int) -> None:
        """Alter a byte of an object."""
        data = self.objects[key]
        at %= len(data)
        self.objects[key] = data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]

    def count(self, *, key: str | None = None, method: str | None = None) -> int:
        """Count requests, optionally of a key or a method."""
        return sum(key in (None, asked.key) and method in (None, asked.method) for asked in list(self.requests))

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that disconnect."""

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ObjectStore  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_request(self) -> None:
        path, _, query = self.path.partition("?")
        key = urllib.parse.unquote(path).strip("/")
        options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        body = self._body()
        with self.server.lock:
            asked = Asked(self.command, key, 1 + self.server.count(key=key))
            self.server.requests.append(asked)
            trouble = self.server.trouble(asked) or Trouble()
            if trouble.status is not None:
                answer = failure(trouble.status, trouble.location)
            elif trouble.login not in (None, self.headers.get("Authorization")):
                answer = failure(401)
            else:
                act = {"PUT": self._put, "POST": self._post, "DELETE": self._delete}.get(self.command, self._get)
                answer = act(key, options, body, trouble)
        self._send(answer, trouble)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request

    def _body(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding"), self.headers.get("Content-Encoding")) and (
            "aws-chunked" not in self.headers.get("Content-Encoding", "")
        ):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailing checksums
            pass
        return b"".join(parts)

    def _get(self, key: str, options: dict[str, str], body: bytes, trouble: Trouble) -> Answer:
        if "list-type" in options:
            return self._list(key, options)
        version = {"x-amz-version-id": options["versionId"]} if "versionId" in options else {}
        key += "".join(f"?versionId={name}" for name in version.values())
        if key not in self.server.objects:
            return failure(404)
        data = self.server.objects[key]
        span = self.headers.get("Range")
        if span is None or not trouble.knows_ranges or trouble.form != "plain":
            return Answer(200, data, version)
        first, last = span.removeprefix("bytes=").split("-")
        start, end = int(first), min(int(last or len(data)), len(data) - 1)
        end = end if trouble.largest_range is None else min(end, start + trouble.largest_range - 1)
        if start >= len(data):
            return failure(416)
        return Answer(206, data[start : end + 1], {"Content-Range": f"bytes {start}-{end}/{len(data)}"} | version)

    def _list(self, bucket: str, options: dict[str, str]) -> Answer:
        prefix, mark = options.get("prefix", ""), options.get("delimiter", "")
        found, folders = [], []
        for name in sorted(self.server.objects):
            inside = name.removeprefix(bucket + "/")
            if inside == name or not inside.startswith(prefix):
                continue
            rest = inside[len(prefix) :]
            if mark and mark in rest:
                folder = prefix + rest.partition(mark)[0] + mark
                if folder not in folders:
                    folders.append(folder)
            else:
                found.append((inside, len(self.server.objects[name])))
        root = ElementTree.Element("ListBucketResult", xmlns=NAMESPACE)
        for name, text in (("Name", bucket), ("Prefix", prefix), ("IsTruncated", "false"), ("MaxKeys", "1000")):
            ElementTree.SubElement(root, name).text = text
        for name, size in found[:KEYS_PER_PAGE]:
            entry = ElementTree.SubElement(root, "Contents")
            for tag, text in (("Key", name), ("Size", str(size)), ("LastModified", "2026-11-03T10:00:00.000Z")):
                ElementTree.SubElement(entry, tag).text = text
        for name in folders:
            ElementTree.SubElement(ElementTree.SubElement(root, "CommonPrefixes"), "Prefix").text = name
        return as_xml(root)

    def _put(self, key: str, options: dict[str, str], body: bytes, trouble: Trouble) -> Answer:
        if source := self.headers.get("x-amz-copy-source"):
            body = self.server.objects[urllib.parse.unquote(source).strip("/")]
        if "uploadId" in options:
            self.server.uploads[options["uploadId"]][int(options["partNumber"])] = body
        else:
            self.server.objects[key] = body
        return Answer(200, b"", {"ETag": '"part"'})

    def _post(self, key: str, options: dict[str, str], body: bytes, trouble: Trouble) -> Answer:
        if "uploads" in options:
            number = str(len(self.server.uploads))
            self.server.uploads[number] = {}
            root = ElementTree.Element("InitiateMultipartUploadResult", xmlns=NAMESPACE)
            ElementTree.SubElement(root, "UploadId").text = number
            return as_xml(root)
        if "delete" in options:
            for element in ElementTree.fromstring(body).iter():
                if element.tag.endswith("Key"):
                    self.server.objects.pop(f"{key}/{element.text}", None)
            return as_xml(ElementTree.Element("DeleteResult", xmlns=NAMESPACE))
        parts = self.server.uploads.pop(options["uploadId"])
        self.server.objects[key] = b"".join(parts[number] for number in sorted(parts))
        root = ElementTree.Element("CompleteMultipartUploadResult", xmlns=NAMESPACE)
        ElementTree.SubElement(root, "Key").text = key
        return as_xml(root)

    def _delete(self, key: str, options: dict[str, str], body: bytes, trouble: Trouble) -> Answer:
        if "uploadId" in options:
            self.server.uploads.pop(options["uploadId"], None)
        else:
            self.server.objects.pop(key, None)
        return Answer(204)

    def _send_whole(self, data: bytes, form: str) -> None:
        """Send a complete file without its length, in chunks, or compressed."""
        data = gzip.compress(data) if form == "gzip" else data
        self.send_response(200)
        if form == "gzip":
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(len(data)))
        elif form == "without length":
            self.send_header("Connection", "close")
        else:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if form.startswith("chunked"):
            pieces = [data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES)]
            data = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        self.close_connection = form != "chunked"
        self.wfile.write(data[: len(data) // 2] if form == "chunked and cut" else data)

    def _send(self, answer: Answer, trouble: Trouble) -> None:
        if trouble.form != "plain" and answer.status == 200:
            self._send_whole(answer.data, trouble.form)
            return
        data = answer.data
        if trouble.flipped_byte is not None and len(data) > trouble.flipped_byte:
            data = bytearray(data)
            data[trouble.flipped_byte] ^= 255
        self.send_response(answer.status)
        for name, value in {"ETag": '"x"', "Last-Modified": "Tue, 03 Nov 2026 10:00:00 GMT", **answer.headers}.items():
            self.send_header(name, value)
        if answer.status != 204:
            declared = len(data) if trouble.declared_bytes is None else trouble.declared_bytes
            self.send_header("Content-Length", str(declared))
            self.close_connection = declared != len(data)
        self.end_headers()
        if self.command == "HEAD":
            return
        if trouble.sent_bytes is not None and trouble.sent_bytes < len(data):
            data = data[: trouble.sent_bytes]
            self.close_connection = True
        for at in range(0, len(data), PIECE_BYTES if trouble.bytes_per_s else max(1, len(data))):
            piece = data[at : at + PIECE_BYTES] if trouble.bytes_per_s else data
            self.wfile.write(piece)
            time.sleep(len(piece) / trouble.bytes_per_s if trouble.bytes_per_s else 0)
        self.wfile.flush()
        self.server.bytes_sent += len(data)
        time.sleep(trouble.stall_s)


def failure(status: int, location: str | None = None) -> Answer:
    """Return an error or a redirect."""
    code = CODES.get(status, "InternalError")
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>"
    headers = {"Content-Type": "application/xml"} | ({"Location": location} if location else {})
    return Answer(status, text.encode(), headers)


def as_xml(root: ElementTree.Element) -> Answer:
    return Answer(200, ElementTree.tostring(root), {"Content-Type": "application/xml"})
