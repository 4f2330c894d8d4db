"""Reading a corpus of shards: its columns memory-mapped, its samples by offset.

The columns of `samples.parquet` become numpy arrays. From 200,000 samples on they live in a memory-mapped file that all
processes of a node share, so 22 million samples take no memory of a worker. A sample is one `pread` at its recorded
offset: no tar is parsed, only the listed members are read, nothing is unpickled, and no URL is executed. Sizes and
hashes are checked, which finds damage that a tar reader accepts silently (a truncated shard, a flipped byte). Remote
shards are read the same way, from a local copy (`cache`) or by range until there is a copy.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import tempfile
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import xxhash

from vjepa_data.atomic import atomic_write, remove_leftovers, temporary_name
from vjepa_data.corpus.cache import Cache
from vjepa_data.corpus.format import Manifest, ShardEntry, is_ours, is_plain_path, member_columns, read_manifest
from vjepa_data.corpus.http_client import Gone, public_url
from vjepa_data.corpus.remote import is_remote, read_blocks, read_range
from vjepa_data.corpus.signal_statistics import SignalStatistics, read_statistics
from vjepa_data.errors import BadInput, Unreadable
from vjepa_data.signal_spec import member_of_signal, member_of_text, signals_of, stored, stored_name, texts_of

log = logging.getLogger(__name__)

MAPPED_FROM = 200_000  # samples; reading the parquet of fewer takes less than 0.1 s and 40 MB (measured once)
OPEN_SHARDS = 128  # file descriptors that one process keeps
GAP_BYTES = 1 << 16  # largest gap between members that are read together

NUMBERS = {
    "shard": np.int32,
    "video_offset": np.int64,
    "video_size": np.int64,
    "json_offset": np.int64,
    "json_size": np.int64,
    "frames": np.int32,
    "fps": np.float64,
    "width": np.int32,
    "height": np.int32,
}


@dataclass(frozen=True)
class Sample:
    """The members of a sample, as bytes."""

    key: str
    shard: str
    suffix: str
    json: bytes
    video: bytes
    members: Mapping[str, bytes] = field(default_factory=dict)
    """The signals and texts that were asked for, by suffix, such as `actions.npy`."""

    @property
    def labels(self) -> dict[str, Any]:
        """The labels in its JSON. A foreign sample without a JSON object has none."""
        return parse_labels(self.json)


def parse_labels(text: bytes) -> dict[str, Any]:
    """Return the labels in the JSON of a sample, or no labels if it is not a JSON object."""
    try:
        facts = json.loads(text or b"{}")
    except (ValueError, RecursionError):
        return {}
    if not isinstance(facts, dict):
        return {}
    return facts["labels"] if is_ours(facts) else facts


class Index:
    """The samples of a split of a corpus: numpy arrays with an entry per sample, sorted by shard."""

    shard: np.ndarray
    """Position in `shards`, int32 [N]."""
    frames: np.ndarray
    """Frames of the stored video, int32 [N]."""
    fps: np.ndarray
    """Frames per second of the stored video, float64 [N]."""
    width: np.ndarray
    height: np.ndarray
    """Pixels, int32 [N]."""
    video_offset: np.ndarray
    video_size: np.ndarray
    json_offset: np.ndarray
    json_size: np.ndarray
    """Position of the two members in the shard, bytes, int64 [N]."""
    xxh64: np.ndarray
    """Hash of the video's bytes, uint64 [N]."""
    signal_rates: dict[str, np.ndarray]
    """Rows per second of each signal, float64 [N]."""
    signal_starts: dict[str, np.ndarray]
    """Time of row 0 of each signal in the stored video, seconds, float64 [N]."""
    statistics: dict[str, SignalStatistics]
    """Statistics of each signal over the train split. A corpus of an earlier version has none."""

    def __init__(
        self, place: str | Path, split: str = "train", cache: Cache | None = None, *, corpus: str | None = None
    ) -> None:
        """Open a corpus.

        Args:
            place: folder or URL that `vjepa shard` or `vjepa index` wrote.
            split: name of the split to read.
            cache: where copies of remote shards are kept. Default: up to 100 GiB below `~/.cache`.
            corpus: hash that the corpus must have. Default: any.

        Raises:
            BadInput: the corpus or split is missing, the hash differs, or the manifest points outside its folder.
        """
        self.place, self.split = str(place), split
        shown = public_url(self.place)
        self.cache = None
        folder = Path(place)
        if is_remote(self.place):
            self.cache = cache or Cache(user_cache() / "shards", 100)
            folder = mirror(self.place, self.cache.folder)
        manifest = read_manifest(folder)
        self.name, self.hash = manifest.name, manifest.hash
        if corpus not in (None, self.hash):
            raise BadInput(
                f"{shown} holds the corpus {self.hash}, not {corpus}; restore that corpus, or set data.sources[].corpus"
            )
        self.root = manifest.root(self.place)
        if self.root != self.place:
            if not is_remote(self.root):
                raise BadInput(f"{shown}/manifest.json: root {self.root} is not a URL; index the corpus again")
            self.cache = self.cache or cache or Cache(user_cache() / "shards", 100)
        if split not in manifest.splits:
            has = ", ".join(sorted(manifest.splits))
            raise BadInput(f"{shown} has no split {split!r}, only {has}; set data.sources[].split, or --split")
        self.shards = manifest.shards
        for s in self.shards:
            if not is_plain_path(s.file):
                raise BadInput(
                    f"{shown}/manifest.json: shard {s.file!r} is not a plain relative path; build the corpus again"
                )
        self.signals, self.texts = signals_of(manifest.spec), texts_of(manifest.spec)
        self.statistics = read_statistics(manifest.signals)
        in_shards = stored(self.signals)
        extra = member_columns(in_shards, self.texts)
        self._table = _read_table(folder, split, self.hash, extra)
        for name in [*NUMBERS, "xxh64"]:
            setattr(self, name, self._column(name))
        self._members = {
            member: tuple(self._column(f"{member}.{name}") for name in ("offset", "size", "xxh64"))
            for member in (*map(member_of_signal, in_shards), *map(member_of_text, self.texts))
        }
        for name in ("rate_hz", "start_s"):
            columns = {signal: self._column(f"{member_of_signal(signal)}.{name}") for signal in in_shards}
            columns = {signal: columns[stored_name(signal, self.signals)] for signal in self.signals}
            setattr(self, "signal_rates" if name == "rate_hz" else "signal_starts", columns)
        said = manifest.splits[split]["samples"]
        if len(self) != said:
            raise BadInput(
                f"{shown}: samples.parquet has {len(self)} samples of {split}, manifest.json {said}. "
                "Build the corpus again."
            )
        self.first = np.searchsorted(self.shard, np.arange(len(self.shards) + 1))
        self._files = functools.lru_cache(maxsize=OPEN_SHARDS)(self._open)

    def __len__(self) -> int:
        return self._table.num_rows

    def _column(self, name: str) -> np.ndarray:
        return self._table.column(name).chunk(0).to_numpy(zero_copy_only=True)

    def __reduce__(self) -> tuple:
        return functools.partial(Index, corpus=self.hash), (self.place, self.split, self.cache)

    def key(self, sample: int) -> str:
        """Return the key of a sample."""
        return self._table.column("key")[sample].as_py()

    def find(self, keys: Collection[str]) -> np.ndarray:
        """Return the numbers of the samples with these keys, int64, ascending."""
        wanted = pa.array(list(keys), pa.large_string())
        found = pa.compute.is_in(self._table.column("key").chunk(0), wanted)  # pyright: ignore[reportAttributeAccessIssue]
        return np.flatnonzero(found.to_numpy(zero_copy_only=False))

    def url(self, sample: int) -> str:
        """Return the path or URL of the shard that holds a sample."""
        return f"{self.root}/{self.shards[int(self.shard[sample])].file}"

    def suffix(self, sample: int) -> str:
        """Return the file type of a sample: "mp4" or "jpg"."""
        return self._table.column("suffix")[sample].as_py()

    def read(self, sample: int, members: Sequence[str] = ()) -> Sample:
        """Read the JSON and the video of a sample, and further members by suffix.

        Raises:
            Unreadable: the shard is missing, has another size than its manifest says, or the bytes were altered.
        """
        shard = self.shards[int(self.shard[sample])]
        file = self._files(int(self.shard[sample]))
        columns = [(self.json_offset, self.json_size), (self.video_offset, self.video_size)]
        columns += [self._members[member][:2] for member in members]
        spans = [(int(offset[sample]), int(size[sample])) for offset, size in columns]
        text, video, *others = _read_members(file, shard.file, spans)
        hashes = [self.xxh64, *(self._members[member][2] for member in members)]
        for data, column in zip((video, *others), hashes, strict=True):
            if xxhash.xxh64_intdigest(data) != int(column[sample]):
                if file.distrust():
                    return self.read(sample, members)
                raise Unreadable("hash", f"{shard.file} holds other bytes than were stored")
        found = dict(zip(members, others, strict=True))
        return Sample(self.key(sample), shard.file, self.suffix(sample), text, video, found)

    def read_labels(self, sample: int) -> dict[str, Any]:
        """Read the labels of a sample without its video.

        Raises:
            Unreadable: the shard is missing or truncated.
        """
        span = (int(self.json_offset[sample]), int(self.json_size[sample]))
        number = int(self.shard[sample])
        return parse_labels(_read_members(self._files(number), self.shards[number].file, [span])[0])

    def want(self, sample: int) -> None:
        """Announce that a sample will be read soon, so that a copy of its remote shard is fetched meanwhile."""
        if self.cache is not None:
            shard = self.shards[int(self.shard[sample])]
            self.cache.want(self.url(sample), shard.bytes, shard.sha256)

    def _open(self, number: int) -> "_File | _RemoteFile":
        shard = self.shards[number]
        if self.cache is not None:
            return _RemoteFile(f"{self.root}/{shard.file}", shard, self.cache)
        return _File(Path(self.place) / shard.file, shard)


class _File:
    """An open shard on a local disk, closed when it is garbage-collected."""

    def __init__(self, path: Path, shard: ShardEntry) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise Unreadable("missing", f"{shard.file}: {e.strerror}") from e
        weakref.finalize(self, os.close, descriptor)
        self.descriptor = descriptor
        size = os.fstat(descriptor).st_size
        if size != shard.bytes:
            raise Unreadable("size", f"{shard.file} has {size} bytes, not {shard.bytes} as in the manifest")

    def pread(self, size: int, offset: int) -> bytes:
        return _pread(self.descriptor, size, offset)

    def distrust(self) -> bool:
        """Return whether reading again may give other bytes. For a local file it cannot."""
        return False


class _RemoteFile:
    """A remote shard, read from its local copy, or by range until a copy is complete."""

    def __init__(self, url: str, shard: ShardEntry, cache: Cache) -> None:
        self.url, self.shard, self.cache = url, shard, cache
        self.descriptor: int | None = None
        self.distrusted = 0

    def pread(self, size: int, offset: int) -> bytes:
        if self.descriptor is None:
            self.descriptor = self.cache.open(self.shard.sha256)
            if self.descriptor is not None:
                self._close = weakref.finalize(self, os.close, self.descriptor)
        if self.descriptor is not None:
            return _pread(self.descriptor, size, offset)
        self.cache.want(self.url, self.shard.bytes, self.shard.sha256)
        try:
            return read_range(self.url, offset, size)
        except Gone as e:
            raise Unreadable("missing", f"{self.shard.file}: {e}") from e

    def distrust(self) -> bool:
        """Drop a copy that holds wrong bytes, and return whether another attempt is allowed."""
        if self.descriptor is not None:
            self._close()
            self.descriptor = None
            self.cache.distrust(self.shard.sha256)
        self.distrusted += 1
        return self.distrusted <= 3


def _read_members(file: "_File | _RemoteFile", name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """Return the bytes of some spans (offset, size), with a single read if they are adjacent, as in our shards."""
    start, end = min(at for at, _ in spans), max(at + size for at, size in spans)
    if end - start > sum(size for _, size in spans) + GAP_BYTES:
        return [_read_members(file, name, [span])[0] for span in spans]
    data = memoryview(file.pread(end - start, start))
    if len(data) != end - start:
        raise Unreadable("size", f"{name} ends before byte {end}")
    return [bytes(data[at - start :][:size]) for at, size in spans]


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    parts = []
    while size > 0:
        try:
            part = os.pread(descriptor, size, offset)
        except OSError as e:
            raise Unreadable("missing", f"read at byte {offset}: {e.strerror}") from e
        if not part:
            break
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def mirror(url: str, cache: Path) -> Path:
    """Copy the manifest and the table of a remote corpus to the cache. An unchanged table is not copied again.

    Raises:
        BadInput: a file is missing.
    """
    if url.startswith("http") and "?" in url:
        raise BadInput(
            f"{public_url(url)}?...: a query cannot follow the address of a corpus, which has many files. "
            "Give the address without it, and a password in ~/.netrc."
        )
    folder = cache / "corpora" / hashlib.sha256(url.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("manifest.json", "samples.parquet"):
        file = folder / name
        if name == "samples.parquet" and file.exists():
            said = read_manifest(folder).samples_sha256
            if hashlib.sha256(file.read_bytes()).hexdigest() == said:
                continue
        try:
            data = b"".join(read_blocks(f"{url}/{name}"))
        except Gone as e:
            raise BadInput(
                f"{public_url(url)}/{name}: {e}; give the URL of a folder that `vjepa shard` or `vjepa index` wrote"
            ) from e
        atomic_write(file, data)
    return folder


def prepare(folder: Path, manifest: Manifest) -> None:
    """Write the memory-mapped table of a large corpus in advance, so that the first run starts fast."""
    extra = member_columns(stored(signals_of(manifest.spec)), texts_of(manifest.spec))
    for split in manifest.splits:
        _read_table(folder, split, manifest.hash, extra)


def _read_table(folder: Path, split: str, corpus: str, extra: Mapping[str, pa.DataType]) -> pa.Table:
    """Read the rows of a split as a single chunk, memory-mapped if there are many."""
    path = folder / "samples.parquet"
    try:
        rows = pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowInvalid) as e:
        raise BadInput(f"{path} cannot be read ({e}); build the corpus again or restore this file") from e
    if rows < MAPPED_FROM:
        return _convert(path, split, extra)
    for place in (folder / ".index", user_cache()):
        file = place / f"{corpus[:32]}-{split}.arrow"
        if not file.exists() and not _store(_convert(path, split, extra), file):
            continue
        return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    raise BadInput(
        f"neither {folder} nor {user_cache()} can be written; make either writable for the index of {rows} samples"
    )


def _convert(path: Path, split: str, extra: Mapping[str, pa.DataType]) -> pa.Table:
    names = ["key", "suffix", "xxh64", *NUMBERS, *extra]
    # A file opened by name is read by Arrow's thread pool, whose threads would stay in every worker.
    buffer = pa.memory_map(str(path)).read_buffer()
    with pq.ParquetFile(pa.BufferReader(buffer)) as file:
        if missing := [name for name in names if name not in file.schema_arrow.names]:
            raise BadInput(f"{path} has no column {missing[0]!r}; build the corpus again")
        table = file.read(columns=[*names, "split"], use_threads=False)
    table = table.filter(pyarrow.compute.equal(table["split"], split), null_selection_behavior="drop")  # pyright: ignore[reportAttributeAccessIssue]
    columns: dict[str, pa.Array] = {
        "key": table["key"].cast(pa.large_string()).combine_chunks(),
        "suffix": table["suffix"].cast(pa.large_string()).combine_chunks(),
    }
    for name, kind in {"xxh64": pa.string(), **extra}.items():
        if kind == pa.string():  # a hash in hexadecimal
            hashes = bytes.fromhex("".join(table[name].to_pylist()))
            columns[name] = pa.array(np.frombuffer(hashes, dtype=">u8").astype(np.uint64))
        else:
            columns[name] = pa.array(table[name].to_numpy())
    for name, kind in NUMBERS.items():
        columns[name] = pa.array(table[name].to_numpy().astype(kind, copy=False))
    if (np.diff(table["shard"].to_numpy()) < 0).any():
        raise BadInput(f"{path} is not sorted by shard; index the corpus again with `vjepa index`")
    whole = pa.table(columns)
    return whole.combine_chunks() if len(whole) else whole


def _store(table: pa.Table, file: Path) -> bool:
    """Write a table atomically, and return whether the folder is writable."""
    temporary = temporary_name(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(file.parent)
        with temporary.open("wb") as out:
            with pa.ipc.new_file(out, table.schema) as writer:
                writer.write_table(table)
            out.flush()
            os.fsync(out.fileno())
        temporary.rename(file)
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return True


def user_cache() -> Path:
    """Return the folder of this user's caches, or a temporary folder if the home folder cannot be written."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # unlike Path, never raises
    return _writable_cache(home, tempfile.gettempdir())


@functools.cache
def _writable_cache(home: str, temporary: str) -> Path:
    folder = Path(home) / "vjepa_data"
    if not home.startswith("~") and _can_write(folder):
        return folder
    spare = Path(temporary) / f"vjepa_data-{os.getuid()}"
    if not _can_write(spare) or spare.stat().st_uid != os.getuid():
        spare = Path(tempfile.mkdtemp(prefix="vjepa_data-"))
    log.warning("%s cannot be written, so remote files are cached in %s; set XDG_CACHE_HOME", folder, spare)
    return spare


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
