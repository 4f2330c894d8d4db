"""Reading a corpus of shards: its columns memory-mapped, its samples by offset.

The columns of `samples.parquet` become numpy arrays; from 200,000 samples on they live in a memory-mapped file that all
processes of a node share, so that 22 million samples cost a worker nothing. A sample is one `pread` at its recorded
offset: no tar is parsed, nothing but the two known members is looked at, nothing is unpickled, no URL is executed.
What a tar reader would accept in silence (a shard cut short, a byte flipped) is noticed: sizes and hashes are checked.
Remote shards are read the same way, from a local copy (`cache`) or, until there is one, by range.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import weakref
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import xxhash

from vjepa_data.atomic import atomic_write, remove_leftovers, temporary_name
from vjepa_data.corpus.cache import Cache
from vjepa_data.corpus.format import Manifest, ShardEntry, is_ours, read_manifest
from vjepa_data.corpus.remote import Gone, is_remote, read_range
from vjepa_data.errors import Unreadable
from vjepa_data.settings import BadInput

MAPPED_FROM = 200_000  # samples; below, reading the parquet takes less than 0.1 s and 40 MB (measured once)
OPEN_SHARDS = 128  # file descriptors that one process keeps
GAP_BYTES = 1 << 16  # between two members that are read at once

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
    """One sample as it lies in its shard."""

    key: str
    shard: str
    suffix: str
    json: bytes
    video: bytes

    @property
    def labels(self) -> dict[str, Any]:
        """What its JSON says of it; nothing if it has none, as samples of others may."""
        try:
            facts = json.loads(self.json or b"{}")
        except (ValueError, RecursionError):
            return {}
        if not isinstance(facts, dict):
            return {}
        return facts["labels"] if is_ours(facts) else facts


class Index:
    """All samples of one split of a corpus: columns as numpy arrays of one entry per sample, sorted by shard."""

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
    """Where the data of the two members lies in the shard, bytes, int64 [N]."""
    xxh64: np.ndarray
    """Hash of the video's bytes, uint64 [N]."""

    def __init__(
        self, place: str | Path, split: str = "train", cache: Cache | None = None, *, corpus: str | None = None
    ) -> None:
        """Open a corpus.

        Args:
            place: folder or URL of what `vjepa shard` or `vjepa index` wrote.
            split: which of its splits.
            cache: where copies of remote shards are kept; by default up to 100 GiB below `~/.cache`.
            corpus: hash of the corpus that must lie there; any by default.

        Raises:
            BadInput: no corpus, another one, no such split, or a manifest that points outside its folder.
        """
        self.place, self.split = str(place), split
        self.cache = None
        folder = Path(place)
        if is_remote(self.place):
            self.cache = cache or Cache(user_cache() / "shards", 100)
            folder = mirror(self.place, self.cache.folder)
        manifest = read_manifest(folder)
        self.name, self.hash = manifest.name, manifest.hash
        if corpus not in (None, self.hash):
            raise BadInput(
                f"{place} holds the corpus {self.hash}, not {corpus}; bring that one back, or set data.sources[].corpus"
            )
        self.root = manifest.root(self.place)
        if self.root != self.place:
            if not is_remote(self.root):
                raise BadInput(f"{place}/manifest.json places its shards in {self.root}, which is no address")
            self.cache = self.cache or cache or Cache(user_cache() / "shards", 100)
        if split not in manifest.splits:
            has = ", ".join(sorted(manifest.splits))
            raise BadInput(f"{place} has no split {split!r}, only {has}; set its `split`, or --split")
        self.shards = manifest.shards
        for s in self.shards:
            if not re.fullmatch(r"[\w.,=+@ -]+(/[\w.,=+@ -]+)*", s.file) or ".." in s.file.split("/"):
                raise BadInput(f"{place}/manifest.json names the shard {s.file!r}, which is no plain path below it")
        self._table = _read_table(folder, split, self.hash)
        for name in [*NUMBERS, "xxh64"]:
            setattr(self, name, self._table.column(name).chunk(0).to_numpy(zero_copy_only=True))
        said = manifest.splits[split]["samples"]
        if len(self) != said:
            raise BadInput(f"{place} has {len(self)} samples of {split} in samples.parquet, its manifest says {said}")
        self.first = np.searchsorted(self.shard, np.arange(len(self.shards) + 1))
        self._files = functools.lru_cache(maxsize=OPEN_SHARDS)(self._open)

    def __len__(self) -> int:
        return self._table.num_rows

    def __reduce__(self) -> tuple:
        return functools.partial(Index, corpus=self.hash), (self.place, self.split, self.cache)

    def key(self, sample: int) -> str:
        """Give the key of a sample."""
        return self._table.column("key")[sample].as_py()

    def find(self, keys: Collection[str]) -> np.ndarray:
        """Give the samples that have these keys, int64, rising."""
        wanted = pa.array(list(keys), pa.large_string())
        found = pa.compute.is_in(self._table.column("key").chunk(0), wanted)  # pyright: ignore[reportAttributeAccessIssue]
        return np.flatnonzero(found.to_numpy(zero_copy_only=False))

    def url(self, sample: int) -> str:
        """Give the place of the shard that holds a sample."""
        return f"{self.root}/{self.shards[int(self.shard[sample])].file}"

    def suffix(self, sample: int) -> str:
        """Give the kind of file of a sample: "mp4" or "jpg"."""
        return self._table.column("suffix")[sample].as_py()

    def read(self, sample: int) -> Sample:
        """Read the two members of a sample.

        Raises:
            Unreadable: the shard is missing, has another size than its manifest says, or the bytes were altered.
        """
        shard = self.shards[int(self.shard[sample])]
        file = self._files(int(self.shard[sample]))
        places = ((self.json_offset, self.json_size), (self.video_offset, self.video_size))
        text, video = _read_members(file, shard.file, [(int(at[sample]), int(size[sample])) for at, size in places])
        if xxhash.xxh64_intdigest(video) != int(self.xxh64[sample]):
            if file.distrust():
                return self.read(sample)
            raise Unreadable("hash", f"{shard.file} holds other bytes than were stored")
        return Sample(self.key(sample), shard.file, self.suffix(sample), text, video)

    def want(self, sample: int) -> None:
        """Say that a sample will be read soon: if its shard is remote, a copy is fetched meanwhile."""
        if self.cache is not None:
            shard = self.shards[int(self.shard[sample])]
            self.cache.want(self.url(sample), shard.bytes, shard.sha256)

    def _open(self, number: int) -> "_File | _RemoteFile":
        shard = self.shards[number]
        if self.cache is not None:
            return _RemoteFile(f"{self.root}/{shard.file}", shard, self.cache)
        return _File(Path(self.place) / shard.file, shard)


class _File:
    """An open shard, closed when it is forgotten."""

    def __init__(self, path: Path, shard: ShardEntry) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise Unreadable("missing", f"{shard.file}: {e.strerror}") from e
        weakref.finalize(self, os.close, descriptor)
        self.descriptor = descriptor
        size = os.fstat(descriptor).st_size
        if size != shard.bytes:
            raise Unreadable("size", f"{shard.file} has {size} bytes, its manifest says {shard.bytes}")

    def pread(self, size: int, offset: int) -> bytes:
        return _pread(self.descriptor, size, offset)

    def distrust(self) -> bool:
        """Say whether reading again may give other bytes: from a local file it does not."""
        return False


class _RemoteFile:
    """A remote shard: read from its local copy if there is one, else by range while a copy is being made."""

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
        """Drop a copy that holds wrong bytes; say whether it is worth reading again."""
        if self.descriptor is not None:
            self._close()
            self.descriptor = None
            self.cache.distrust(self.shard.sha256)
        self.distrusted += 1
        return self.distrusted <= 3


def _read_members(file: "_File | _RemoteFile", name: str, places: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes at some places (offset, size): one read where they lie side by side, as we pack them."""
    start, end = min(at for at, _ in places), max(at + size for at, size in places)
    if end - start > sum(size for _, size in places) + GAP_BYTES:
        return [_read_members(file, name, [place])[0] for place in places]
    data = memoryview(file.pread(end - start, start))
    if len(data) != end - start:
        raise Unreadable("size", f"{name} ends before byte {end}")
    return [bytes(data[at - start :][:size]) for at, size in places]


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
    """Copy the manifest and the table of a remote corpus; the table only if it changed.

    Raises:
        BadInput: they are not there.
    """
    folder = cache / "corpora" / hashlib.sha256(url.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("manifest.json", "samples.parquet"):
        file = folder / name
        if name == "samples.parquet" and file.exists():
            said = read_manifest(folder).samples_sha256
            if hashlib.sha256(file.read_bytes()).hexdigest() == said:
                continue
        try:
            data = b"".join(iter(_Blocks(f"{url}/{name}")))
        except Gone as e:
            raise BadInput(
                f"{url}/{name}: {e}; give the URL of a folder that `vjepa shard` or `vjepa index` wrote"
            ) from e
        atomic_write(file, data)
    return folder


class _Blocks:
    """The blocks of a remote file of unknown length."""

    def __init__(self, url: str, size: int = 64 << 20) -> None:
        self.url, self.size = url, size

    def __iter__(self) -> Iterator[bytes]:
        at = 0
        while block := read_range(self.url, at, self.size):
            yield block
            at += len(block)
            if len(block) < self.size:
                return


def prepare(folder: Path, manifest: Manifest) -> None:
    """Write the mapped file of a corpus that has many samples, so that the first run need not."""
    for split in manifest.splits:
        _read_table(folder, split, manifest.hash)


def _read_table(folder: Path, split: str, corpus: str) -> pa.Table:
    """Read the rows of a split in one chunk, memory-mapped where they are many."""
    path = folder / "samples.parquet"
    try:
        rows = pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowInvalid) as e:
        raise BadInput(f"{path} cannot be read ({e}); write the corpus again or restore this file") from e
    if rows < MAPPED_FROM:
        return _convert(path, split)
    for place in (folder / ".index", user_cache()):
        file = place / f"{corpus[:32]}-{split}.arrow"
        if not file.exists() and not _store(_convert(path, split), file):
            continue
        return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    raise BadInput(f"neither {folder} nor {user_cache()} can be written; one must hold the index of {rows} samples")


def _convert(path: Path, split: str) -> pa.Table:
    names = ["key", "suffix", "xxh64", *NUMBERS]
    buffer = pa.memory_map(
        str(path)
    ).read_buffer()  # a file is read by Arrow's pool, whose threads stay in every worker
    with pq.ParquetFile(pa.BufferReader(buffer)) as file:
        table = file.read(columns=[*names, "split"], use_threads=False)
    table = table.filter(pyarrow.compute.equal(table["split"], split), null_selection_behavior="drop")  # pyright: ignore[reportAttributeAccessIssue]
    columns: dict[str, pa.Array] = {
        "key": table["key"].cast(pa.large_string()).combine_chunks(),
        "suffix": table["suffix"].cast(pa.large_string()).combine_chunks(),
    }
    hashes = bytes.fromhex("".join(table["xxh64"].to_pylist()))
    columns["xxh64"] = pa.array(np.frombuffer(hashes, dtype=">u8").astype(np.uint64))
    for name, kind in NUMBERS.items():
        columns[name] = pa.array(table[name].to_numpy().astype(kind, copy=False))
    if (np.diff(table["shard"].to_numpy()) < 0).any():
        raise BadInput(f"{path} is not sorted by shard; write it again with `vjepa index`")
    whole = pa.table(columns)
    return whole.combine_chunks() if len(whole) else whole


def _store(table: pa.Table, file: Path) -> bool:
    """Write a table beside and rename, so that it is whole or absent; say whether the place can be written."""
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
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "vjepa_data"
