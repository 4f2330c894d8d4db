"""An object store on this machine, for tests: as much of the S3 protocol as s3fs speaks, and troubles on demand."""

import http.server
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

KEYS_PER_PAGE = 1000
NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"


class ObjectStore(http.server.ThreadingHTTPServer):
    """Buckets in memory. `trouble(method, key)` gives an HTTP status to fail with, or None."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.requests: Counter[str] = Counter()
        self.trouble: Callable[[str, str], int | None] = lambda method, key: None
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that hang up."""

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ObjectStore  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_request(self) -> None:
        path, _, query = self.path.partition("?")
        key = urllib.parse.unquote(path).strip("/")
        asked = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        body = self._body()
        with self.server.lock:
            self.server.requests[self.command] += 1
            status = self.server.trouble(self.command, key)
        if status is not None:
            return self._fail(status)
        with self.server.lock:
            {"GET": self._get, "HEAD": self._get, "PUT": self._put, "POST": self._post, "DELETE": self._delete}[
                self.command
            ](key, asked, body)

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

    def _get(self, key: str, asked: dict[str, str], body: bytes) -> None:
        if "list-type" in asked:
            return self._list(key, asked)
        if key not in self.server.objects:
            return self._fail(404)
        data, status, headers = self.server.objects[key], 200, {}
        if span := self.headers.get("Range"):
            first, last = span.removeprefix("bytes=").split("-")
            end = min(int(last), len(data) - 1) if last else len(data) - 1
            headers["Content-Range"] = f"bytes {first}-{end}/{len(data)}"
            data, status = data[int(first) : end + 1], 206
        self._send(status, data, headers)

    def _list(self, bucket: str, asked: dict[str, str]) -> None:
        prefix, mark = asked.get("prefix", ""), asked.get("delimiter", "")
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
            one = ElementTree.SubElement(root, "Contents")
            for tag, text in (("Key", name), ("Size", str(size)), ("LastModified", "2026-11-03T10:00:00.000Z")):
                ElementTree.SubElement(one, tag).text = text
        for name in folders:
            ElementTree.SubElement(ElementTree.SubElement(root, "CommonPrefixes"), "Prefix").text = name
        self._send_xml(root)

    def _put(self, key: str, asked: dict[str, str], body: bytes) -> None:
        if source := self.headers.get("x-amz-copy-source"):
            body = self.server.objects[urllib.parse.unquote(source).strip("/")]
        if "uploadId" in asked:
            self.server.uploads[asked["uploadId"]][int(asked["partNumber"])] = body
        else:
            self.server.objects[key] = body
        self._send(200, b"", {"ETag": '"part"'})

    def _post(self, key: str, asked: dict[str, str], body: bytes) -> None:
        if "uploads" in asked:
            number = str(len(self.server.uploads))
            self.server.uploads[number] = {}
            root = ElementTree.Element("InitiateMultipartUploadResult", xmlns=NAMESPACE)
            ElementTree.SubElement(root, "UploadId").text = number
            return self._send_xml(root)
        if "delete" in asked:
            for one in ElementTree.fromstring(body).iter():
                if one.tag.endswith("Key"):
                    self.server.objects.pop(f"{key}/{one.text}", None)
            return self._send_xml(ElementTree.Element("DeleteResult", xmlns=NAMESPACE))
        parts = self.server.uploads.pop(asked["uploadId"])
        self.server.objects[key] = b"".join(parts[number] for number in sorted(parts))
        root = ElementTree.Element("CompleteMultipartUploadResult", xmlns=NAMESPACE)
        ElementTree.SubElement(root, "Key").text = key
        self._send_xml(root)

    def _delete(self, key: str, asked: dict[str, str], body: bytes) -> None:
        if "uploadId" in asked:
            self.server.uploads.pop(asked["uploadId"], None)
        else:
            self.server.objects.pop(key, None)
        self._send(204, b"", {})

    def _fail(self, status: int) -> None:
        codes = {403: "AccessDenied", 404: "NoSuchKey", 503: "SlowDown"}
        text = f"<Error><Code>{codes.get(status, 'InternalError')}</Code><Message>no</Message></Error>"
        self._send(status, text.encode(), {"Content-Type": "application/xml"})

    def _send_xml(self, root: ElementTree.Element) -> None:
        self._send(200, ElementTree.tostring(root), {"Content-Type": "application/xml"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"ETag": '"x"', "Last-Modified": "Tue, 03 Nov 2026 10:00:00 GMT", **headers}.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """An empty store that `s3://` means."""
    s3fs = pytest.importorskip("s3fs")
    made = ObjectStore()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    s3fs.S3FileSystem.clear_instance_cache()
    yield made
    made.close()
