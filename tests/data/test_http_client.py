"""Files are the same whatever form a web server gives its answers, and secrets stay in the address."""

import base64
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from object_store import ObjectStore, Trouble

from vjepa_data.builder.index_foreign import index_shards
from vjepa_data.builder.ingest import ingest
from vjepa_data.corpus import remote, sample_table
from vjepa_data.corpus.http_client import Gone, public_url
from vjepa_data.corpus.merge import merge
from vjepa_data.corpus.remote import StoreUnreachable, read_blocks, read_range
from vjepa_data.media import fetch
from vjepa_data.media.fetch import FileRef, open_local
from vjepa_data.media.video import Refused
from vjepa_data.settings import BadInput
from vjepa_data.spec import Spec

DATA = bytes(range(256)) * 40
LOGIN = f"Basic {base64.b64encode(b'us er:p@ss').decode()}"


@pytest.fixture(autouse=True)
def served(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    store.objects["bucket/a b.mp4"] = DATA
    monkeypatch.setattr(remote, "OUTAGE_LIMIT_S", 0.5)
    monkeypatch.setattr(fetch, "ATTEMPTS", 1)
    return store


@pytest.mark.parametrize(
    "trouble",
    [
        Trouble(form="chunked"),
        Trouble(form="gzip"),
        Trouble(form="without length"),
        Trouble(knows_ranges=False),
        Trouble(largest_range=700),
    ],
    ids=["chunked", "gzip", "without length", "without ranges", "small ranges"],
)
def test_every_form_of_an_answer_gives_the_same_bytes(served: ObjectStore, trouble: Trouble) -> None:
    served.trouble = lambda asked: trouble
    url = f"{served.url}/bucket/a b.mp4"
    assert b"".join(read_blocks(url)) == DATA
    assert read_range(url, 100, 5000) == DATA[100:5100]
    assert read_range(url, 10_000, 5000) == DATA[10_000:]
    assert read_range(url, 20_000, 10) == b""
    with open_local(FileRef(url)) as path:
        assert path.read_bytes() == DATA


def test_an_answer_that_is_cut_is_not_a_file(served: ObjectStore) -> None:
    served.trouble = lambda asked: Trouble(form="chunked and cut")
    url = f"{served.url}/bucket/a b.mp4"
    with pytest.raises(StoreUnreachable, match="IncompleteRead"):
        b"".join(read_blocks(url))
    with pytest.raises(Refused, match="IncompleteRead"), open_local(FileRef(url)):
        pass


def test_a_broken_stream_continues_where_it_stopped(served: ObjectStore) -> None:
    served.trouble = lambda asked: Trouble(sent_bytes=9000) if asked.time == 1 else None
    assert b"".join(read_blocks(f"{served.url}/bucket/a b.mp4")) == DATA
    assert served.count() == 2


@pytest.mark.parametrize("url", ["http:///x", "http://[::1/x", "http://127.0.0.1:port/x"])
def test_an_invalid_url_fails_at_once(url: str) -> None:
    with pytest.raises(Gone):
        read_range(url, 0, 1)


def test_a_redirect_in_a_circle_fails_at_once(served: ObjectStore) -> None:
    served.trouble = lambda asked: Trouble(status=302, location=f"{served.url}/bucket/x")
    with pytest.raises(Gone, match="HTTP 302"):
        read_range(f"{served.url}/bucket/x", 0, 1)


@pytest.mark.parametrize("source", ["url", "netrc"])
def test_a_password_is_sent_to_its_host_alone(
    source: str, served: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def guarded(asked) -> Trouble | None:
        if asked.key.startswith("near") or asked.key.startswith("far"):
            host = served.url if asked.key.startswith("near") else served.url.replace("127.0.0.1", "localhost")
            return Trouble(status=302, location=f"{host}/bucket/a b.mp4")
        return Trouble(login=LOGIN)

    served.trouble = guarded
    monkeypatch.setenv("HOME", str(tmp_path))
    place = urlsplit(served.url).netloc
    if source == "netrc":
        (tmp_path / ".netrc").write_text('machine 127.0.0.1 login "us er" password p@ss\n')
        (tmp_path / ".netrc").chmod(0o600)
    else:
        place = f"us%20er:p%40ss@{place}"
    assert read_range(f"http://{place}/bucket/a b.mp4", 0, 10) == DATA[:10]
    assert read_range(f"http://{place}/near/x", 0, 10) == DATA[:10]
    with pytest.raises(Gone, match="HTTP 401"):
        read_range(f"http://{place}/far/x", 0, 10)


def test_public_urls_have_no_secrets() -> None:
    assert public_url("https://me:pw@host:8/a/b.mp4?X-Amz-Signature=s#t=1") == "https://host:8/a/b.mp4"
    assert public_url("s3://bucket/a?b#c@d") == "s3://bucket/a?b#c@d"
    assert public_url("/data/a?b") == "/data/a?b"


def test_sources_are_named_without_signatures(tmp_path: Path) -> None:
    """Signing again gives the same names. Files that only a query tells apart get names of their own."""

    def names(signature: str) -> list[str]:
        urls = ["a.mp4?X-Amz-Signature=S", "b.mp4?unusual=S", "get.php?id=1&token=S", "get.php?id=2&token=S"]
        lines = [f"https://me:S@host/{url}\n".replace("S\n", f"{signature}\n") for url in urls]
        (tmp_path / "list.txt").write_text("".join(lines).replace(":S@", f":{signature}@"))
        return [source.name for source in ingest([str(tmp_path / "list.txt")], spec=Spec())]

    assert names("first") == names("second")
    assert names("first")[:2] == ["https://host/a.mp4", "https://host/b.mp4"]
    assert len(set(names("first"))) == 4
    assert "first" not in str(names("first"))


def test_failed_downloads_do_not_show_secrets(served: ObjectStore) -> None:
    served.trouble = lambda asked: Trouble(status=500)
    url = f"{served.url}/x?token=HIDDEN".replace("http://", "http://me:HIDDEN@")
    with pytest.raises(StoreUnreachable) as outage:
        read_range(url, 0, 1)
    with pytest.raises(Refused) as refused, open_local(FileRef(url)):
        pass
    assert "HIDDEN" not in f"{outage.value}{refused.value.detail}{FileRef(url)}"


def test_passwords_and_queries_do_not_enter_an_index(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"http://host/x.tar: an index .* would keep the password .*netrc"):
        index_shards("http://me:pw@host/x.tar", out=tmp_path / "o")
    with pytest.raises(BadInput, match=r"a mixture would keep the password"):
        merge(["http://me:pw@host/corpus"])
    with pytest.raises(BadInput, match=r"http://host/corpus\?\.\.\.: a query cannot follow"):
        sample_table.mirror("http://host/corpus?token=1", tmp_path)


def test_caches_move_if_the_home_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc/nothing")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert sample_table.user_cache().parent == tmp_path
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "mine"))
    assert sample_table.user_cache() == tmp_path / "mine" / ".cache" / "vjepa_data"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::DeprecationWarning")
def test_keys_of_a_bucket_may_hold_two_colons(s3: ObjectStore) -> None:
    s3.objects["bucket/raw/a::b.mp4"] = DATA
    [source] = ingest(["s3://bucket/raw/"], spec=Spec())
    assert source.name == "s3://bucket/raw/a::b.mp4"
    with open_local(source.file) as path:
        assert path.read_bytes() == DATA
