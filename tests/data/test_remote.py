"""Shards are read from local servers that throttle, drop, corrupt and refuse."""

import hashlib
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from object_store import ObjectStore, Trouble

from vjepa_data.corpus import remote
from vjepa_data.corpus.cache import Cache
from vjepa_data.corpus.index import Index
from vjepa_data.corpus.remote import Gone, StoreUnreachable, is_remote, read_range
from vjepa_data.errors import Unreadable
from vjepa_data.reader.loader import ClipLoader
from vjepa_data.settings import BadInput, Clip, Crop, Data, Loader, Source

TROUBLES = {
    "none": None,
    "503 twice": lambda asked: Trouble(status=503) if asked.time % 3 else None,
    "drops": lambda asked: Trouble(sent_bytes=150) if asked.time % 2 else None,
    "no ranges": lambda asked: Trouble(knows_ranges=False),
}


@pytest.fixture
def store(store: ObjectStore, corpus: Path) -> ObjectStore:
    """The store, filled with the corpus."""
    store.take(corpus)
    return store


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 1.0)


@pytest.fixture(autouse=True)
def short_outage_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "OUTAGE_LIMIT_S", 2.0)


def same_as_local(index: Index, corpus: Path) -> bool:
    local = Index(corpus)
    return [index.read(i) for i in range(len(index))] == [local.read(i) for i in range(len(local))]


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
def test_a_faulty_server_gives_the_same_samples_as_a_folder(store: ObjectStore, corpus: Path, cache: Cache, trouble):
    store.trouble = trouble or store.trouble
    index = Index(f"{store.url}/toy", cache=cache)
    assert same_as_local(index, corpus)


def test_the_first_sample_does_not_wait_for_its_shard(store: ObjectStore, corpus: Path, cache: Cache, monkeypatch):
    monkeypatch.setattr(Cache, "want", lambda *_: None)
    index = Index(f"{store.url}/toy", cache=cache)
    before = store.bytes_sent
    sample = index.read(3)
    assert store.bytes_sent - before < len(sample.video) + len(sample.json) + 2048
    assert index.read(3) == Index(corpus).read(3)


def test_a_shard_is_downloaded_once(store: ObjectStore, corpus: Path, cache: Cache):
    index = Index(f"{store.url}/toy", cache=cache)
    index.want(0)
    path = cache.path(index.shards[0].sha256)
    end = time.monotonic() + 10
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.02)
    asked = store.count(key=f"toy/{index.shards[0].file}")
    assert [index.read(i) for i in range(9)] == [Index(corpus).read(i) for i in range(9)]
    assert store.count(key=f"toy/{index.shards[0].file}") == asked == 1


def fetch_in_a_process(folder: str, url: str, size: int, sha256: str) -> None:
    assert Cache(folder, 1.0).fetch(url, size, sha256)


def test_concurrent_processes_download_a_shard_once(store: ObjectStore, corpus: Path, cache: Cache):
    shard = Index(corpus).shards[2]
    url = f"{store.url}/toy/{shard.file}"
    spawn = multiprocessing.get_context("fork")
    arguments = (str(cache.folder), url, shard.bytes, shard.sha256)
    processes = [spawn.Process(target=fetch_in_a_process, args=arguments) for _ in range(4)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    assert [p.exitcode for p in processes] == [0] * 4
    assert store.count(key=f"toy/{shard.file}") == 1
    assert cache.path(shard.sha256).read_bytes() == (corpus / shard.file).read_bytes()


def test_a_corrupt_download_never_enters_the_cache(store: ObjectStore, corpus: Path, cache: Cache, caplog):
    shard = Index(corpus).shards[2]
    store.trouble = lambda asked: Trouble(flipped_byte=1500)
    assert not cache.fetch(f"{store.url}/toy/{shard.file}", shard.bytes, shard.sha256)
    assert "does not match its manifest" in caplog.text
    assert not [f for f in cache.folder.rglob("*") if f.is_file() and f.stat().st_size]


def test_a_sample_that_stays_corrupt_is_rejected(store: ObjectStore, cache: Cache, monkeypatch):
    monkeypatch.setattr(Cache, "want", lambda *_: None)
    index = Index(f"{store.url}/toy", cache=cache)
    store.trouble = lambda asked: Trouble(flipped_byte=1500)
    with pytest.raises(Unreadable, match="hash"):
        index.read(0)
    store.trouble = lambda asked: None
    assert index.read(1)


def test_a_damaged_copy_is_downloaded_again(store: ObjectStore, corpus: Path, cache: Cache):
    index = Index(f"{store.url}/toy", cache=cache)
    shard = index.shards[0]
    assert cache.fetch(f"{store.url}/toy/{shard.file}", shard.bytes, shard.sha256)
    path = cache.path(shard.sha256)
    data = bytearray(path.read_bytes())
    data[int(index.video_offset[4]) + 100] ^= 1
    path.write_bytes(data)
    assert [index.read(i) for i in range(9)] == [Index(corpus).read(i) for i in range(9)]


def put(cache: Cache, name: str, size: int, used_s_ago: float) -> str:
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    path = cache.path(sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    used = time.time() - used_s_ago
    os.utime(path, (used, used))
    return sha256


def test_old_copies_are_evicted_unless_open(store: ObjectStore, corpus: Path, tmp_path: Path):
    cache = Cache(tmp_path / "cache", 0.001)  # 1.07 MB
    old, opened, new = (put(cache, n, 400_000, s) for n, s in [("old", 50), ("opened", 90), ("new", 10)])
    descriptor = cache.open(opened)
    assert descriptor is not None
    os.utime(cache.path(opened), (0, 0))
    shard = Index(corpus).shards[0]
    assert cache.fetch(f"{store.url}/toy/{shard.file}", shard.bytes, shard.sha256)
    assert [cache.path(s).exists() for s in (old, opened, new)] == [False, True, True]
    os.close(descriptor)


def test_two_corpora_with_the_same_file_names_do_not_mix(
    store: ObjectStore, corpus: Path, cache: Cache, videos, make_corpus
):
    facts = {"frames": 48, "fps": 12.0, "width": 96, "height": 64}
    other = make_corpus(corpus.parent / "other", [[{"key": "toy-0000", "video": videos[5], **facts}]])
    store.take(other)
    first, second = Index(f"{store.url}/toy", cache=cache), Index(f"{store.url}/other", cache=cache)
    for index in (first, second):
        shard = index.shards[0]
        assert cache.fetch(index.url(0), shard.bytes, shard.sha256)
    assert first.shards[0].file == second.shards[0].file
    assert second.read(0).video == videos[5] == Index(other).read(0).video != first.read(0).video


def test_on_a_full_disk_samples_are_read_by_range(store: ObjectStore, corpus: Path, cache: Cache, monkeypatch, caplog):
    index = Index(f"{store.url}/toy", cache=cache)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vjepa_data.corpus.cache.atomic_file", full)
    shard = index.shards[0]
    assert not cache.fetch(f"{store.url}/toy/{shard.file}", shard.bytes, shard.sha256)
    assert "is full" in caplog.text
    assert same_as_local(index, corpus)


def test_a_permanent_failure_is_reported_at_once(store: ObjectStore, cache: Cache):
    with pytest.raises(Gone, match="404"):
        read_range(f"{store.url}/toy/nothing", 0, 10)
    assert store.count(key="toy/nothing") == 1
    store.trouble = lambda asked: Trouble(status=403)
    with pytest.raises(Gone, match="403"):
        read_range(f"{store.url}/toy/manifest.json", 0, 10)
    with pytest.raises(BadInput, match=r"manifest.json: HTTP 403; give the URL of a folder that"):
        Index(f"{store.url}/toy", cache=cache)


def test_a_long_outage_stops_the_run(store: ObjectStore, monkeypatch: pytest.MonkeyPatch):
    store.trouble = lambda asked: Trouble(bytes_per_s=10_000)
    monkeypatch.setattr(remote, "SILENCE_S", 0.3)
    with pytest.raises(StoreUnreachable, match=r"was unreachable for .*slower than"):
        read_range(f"{store.url}/toy/samples.parquet", 0, 5000)
    with pytest.raises(StoreUnreachable, match="refused"):
        read_range("http://127.0.0.1:9/x", 0, 5)


def test_a_missing_remote_shard_makes_its_samples_unreadable(store: ObjectStore, cache: Cache):
    del store.objects["toy/shards/toy-train-000001.tar"]
    index = Index(f"{store.url}/toy", cache=cache)
    assert index.read(8).key == "toy-0008"
    with pytest.raises(Unreadable, match=r"missing: .*toy-train-000001.tar: HTTP 404"):
        index.read(9)


def test_suspended_time_does_not_count_as_an_outage(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]

    def answer(*_: object) -> bytes:
        if clock[0]:
            return b"here"
        clock[0] = 10_000.0
        raise ConnectionResetError

    monkeypatch.setattr(remote, "OUTAGE_LIMIT_S", 300.0)
    monkeypatch.setattr(remote, "_http_range", answer)
    monkeypatch.setattr(remote.time, "monotonic", lambda: clock[0])
    assert read_range("http://somewhere/x", 0, 4) == b"here"


@pytest.mark.parametrize("place", ["pipe:cat x", "file:///etc/passwd", "ftp://host/x", "sftp://host/x"])
def test_unsupported_urls_are_rejected(place: str):
    with pytest.raises(BadInput, match="cannot read shards from"):
        is_remote(place)
    assert is_remote("s3://bucket/x")
    assert not is_remote("/data/x:y")
    assert not is_remote("some/folder")


@pytest.mark.parametrize("trouble", [TROUBLES["none"], TROUBLES["503 twice"]], ids=["none", "503 twice"])
def test_an_object_store_serves_the_same_samples(
    store: ObjectStore, s3: ObjectStore, corpus: Path, cache: Cache, trouble
):
    store.trouble = trouble or store.trouble
    index = Index("s3://toy", cache=cache)
    assert same_as_local(index, corpus)
    assert cache.fetch(index.url(0), index.shards[0].bytes, index.shards[0].sha256)
    with pytest.raises(Gone):
        read_range("s3://toy/nothing", 0, 10)


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_the_stream_is_the_same_from_anywhere(
    kind: str, store: ObjectStore, s3: ObjectStore, corpus: Path, tmp_path: Path
):
    def stream(place: str, workers: int) -> list:
        data = Data(sources=(Source(shards=place),), clip=Clip(frames=4, fps=4), crop=Crop(px=32))
        loader = Loader(workers=workers, cache=str(tmp_path / "cache"), cache_gib=0.5)
        with ClipLoader(data, loader, seed=0, batch_size=8, step=3) as batches:
            groups = [next(batches).groups[0] for _ in range(4)]
        return [(g.keys, hashlib.sha256(g.frames.numpy().tobytes()).hexdigest()) for g in groups]

    place, workers = {"http": (f"{store.url}/toy", 1), "s3": ("s3://toy", 0)}[
        kind
    ]  # a fork server keeps its first environment
    assert stream(place, workers) == stream(str(corpus), 0)
