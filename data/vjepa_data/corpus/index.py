"""Reading a corpus of shards: its columns memory-mapped, its samples by offset.

The columns of `samples.parquet` become numpy arrays. From 200,000 samples on they live in a memory-mapped file that all
processes of a node share, so 22 million samples take no memory of a worker. A sample is one `pread` at its recorded
offset: no tar is parsed, only the listed members are read, nothing is unpickled, and no URL is executed. Sizes and
hashes are checked, which finds damage that a tar reader accepts silently (a truncated shard, a flipped byte). Remote
shards are read the same way, from a local copy (`cache`) or by range until there is a copy.
"""

import functools
import json
import os
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import xxhash

from vjepa_data.corpus import parts
from vjepa_data.corpus.cache import Cache
from vjepa_data.corpus.format import ShardEntry, is_ours, is_plain_path, read_manifest
from vjepa_data.corpus.http_client import Gone, public_url
from vjepa_data.corpus.remote import is_remote, read_range
from vjepa_data.corpus.sample_table import NUMBERS, division_of, mirror, read_table, user_cache
from vjepa_data.corpus.signal_statistics import SignalStatistics, read_statistics
from vjepa_data.errors import BadInput, Unreadable
from vjepa_data.signal_spec import member_of_signal, member_of_text, signals_of, stored, stored_name, texts_of

OPEN_SHARDS = 128  # file descriptors that one process keeps
GAP_BYTES = 1 << 16  # largest gap between members that are read together


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
        self,
        place: str | Path,
        split: str = "train",
        cache: Cache | None = None,
        *,
        corpus: str | None = None,
        part_s: float | None = None,
    ) -> None:
        """Open a corpus.

        Args:
            place: folder or URL that `vjepa shard` or `vjepa index` wrote.
            split: name of the split to read.
            cache: where copies of remote shards are kept. Default: up to 100 GiB below `~/.cache`.
            corpus: hash that the corpus must have. Default: any.
            part_s: length of virtual parts in seconds. Default: as the corpus was built.

        Raises:
            BadInput: the corpus or split is missing, the hash differs, the manifest points outside its folder, or the
                corpus was built without virtual parts.
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
        self.parts = division_of(manifest, part_s, shown)
        self._table = read_table(folder, split, manifest, self.parts)
        for name in [*NUMBERS, "xxh64"]:
            setattr(self, name, self._column(name))
        self._first = self._column("first") if self.parts else None
        self._members = {
            member: tuple(self._column(f"{member}.{name}") for name in ("offset", "size", "xxh64"))
            for member in (
                *map(member_of_signal, in_shards),
                *map(member_of_text, self.texts),
                *([parts.MEMBER] if self.parts else []),
            )
        }
        for name in ("rate_hz", "start_s"):
            columns = {signal: self._column(f"{member_of_signal(signal)}.{name}") for signal in in_shards}
            columns = {signal: columns[stored_name(signal, self.signals)] for signal in self.signals}
            if name == "start_s" and self._first is not None:
                columns = {signal: start_s - self._first / self.fps for signal, start_s in columns.items()}
            setattr(self, "signal_rates" if name == "rate_hz" else "signal_starts", columns)
        said, found = manifest.splits[split]["samples"], self.videos
        if found != said:
            raise BadInput(
                f"{shown}: samples.parquet has {found} samples of {split}, manifest.json {said}. "
                "Build the corpus again."
            )
        self.first = np.searchsorted(self.shard, np.arange(len(self.shards) + 1))
        self._files = functools.lru_cache(maxsize=OPEN_SHARDS)(self._open)

    def __len__(self) -> int:
        return self._table.num_rows

    @property
    def videos(self) -> int:
        """Number of stored videos: of samples, or of the videos that the samples are parts of."""
        return len(self) if self._first is None else int((self._first == 0).sum())

    def first_frame(self, sample: int) -> int:
        """Return the number in its stored video of the first frame of a sample: 0, except for virtual parts."""
        return 0 if self._first is None else int(self._first[sample])

    def start_s(self, sample: int) -> float:
        """Return the time of the first frame of a sample in its stored video, in seconds."""
        first = self.first_frame(sample)
        return first / float(self.fps[sample]) if first else 0.0

    def _column(self, name: str) -> np.ndarray:
        return self._table.column(name).chunk(0).to_numpy(zero_copy_only=True)

    def __reduce__(self) -> tuple:
        part_s = self.parts.seconds if self.parts else None
        return functools.partial(Index, corpus=self.hash, part_s=part_s), (self.place, self.split, self.cache)

    def key(self, sample: int) -> str:
        """Return the key of a sample."""
        return self._table.column("key")[sample].as_py()

    def video_key(self, sample: int) -> str:
        """Return the key of the stored video that a sample is, or is a part of."""
        return self.key(sample).rpartition(parts.KEY_SUFFIX)[0] if self.parts else self.key(sample)

    def find(self, keys: Collection[str]) -> np.ndarray:
        """Return the numbers of the samples with these keys, int64, ascending. A video's key finds all of its parts."""
        wanted = pa.array(list(keys), pa.large_string())
        own = self._table.column("key").chunk(0)
        found = pa.compute.is_in(own, wanted)  # pyright: ignore[reportAttributeAccessIssue]
        if self.parts:
            of_video = pa.compute.replace_substring_regex(own, rf"{parts.KEY_SUFFIX}\d+$", "")  # pyright: ignore[reportAttributeAccessIssue]
            found = pa.compute.or_(found, pa.compute.is_in(of_video, wanted))  # pyright: ignore[reportAttributeAccessIssue]
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
        columns = [(self.json_offset, self.json_size)]
        columns += [self._members[member][:2] for member in members]
        hashes = [None, *(self._members[member][2] for member in members)]
        if self.parts is None:
            columns.append((self.video_offset, self.video_size))
            hashes.append(self.xxh64)
        spans = [(int(offset[sample]), int(size[sample])) for offset, size in columns]
        text, *others = found = _read_members(file, shard.file, spans)
        is_intact = all(
            column is None or xxhash.xxh64_intdigest(data) == int(column[sample])
            for data, column in zip(found, hashes, strict=True)
        )
        video = None
        if is_intact:
            video = others.pop() if self.parts is None else self._read_part(file, shard.file, sample, self.parts.gop)
        if video is None:
            if file.distrust():
                return self.read(sample, members)
            raise Unreadable("hash", f"{shard.file} holds other bytes than were stored")
        named = dict(zip(members, others, strict=True))
        return Sample(self.key(sample), shard.file, self.suffix(sample), text, video, named)

    def _read_part(self, file: "_File | _RemoteFile", name: str, sample: int, gop: int) -> bytes | None:
        """Read a virtual part as an mp4, or return None if its bytes were altered."""
        kind, video_at = parts.gop_type(gop), int(self.video_offset[sample])
        first, count = self.first_frame(sample) // gop, -(-int(self.frames[sample]) // gop)
        table_at = int(self._members[parts.MEMBER][0][sample]) + first * kind.itemsize
        head_size = min(parts.HEAD_BYTES, int(self.video_size[sample]))
        spans = [(video_at, head_size), (table_at, count * kind.itemsize)]
        head, table = _read_members(file, name, spans)
        rows = np.frombuffer(table, kind)
        sizes = rows["bytes"].sum(axis=1, dtype=np.int64)
        ends = np.cumsum(sizes)
        start = int(rows["offset"][0])
        if start < 0 or start + int(ends[-1]) > int(self.video_size[sample]):
            return None
        description = parts.codec_description(head)
        if description is None:
            return None
        (data,) = _read_members(file, name, [(video_at + start, int(ends[-1]))])
        view = memoryview(data)
        for row, end, size in zip(rows, ends.tolist(), sizes.tolist(), strict=True):
            if parts.hash_of_gop(description, row, view[end - size : end]) != int(row["xxh64"]):
                return None
        shape = {"width": int(self.width[sample]), "height": int(self.height[sample]), "fps": float(self.fps[sample])}
        return parts.part_as_mp4(description, rows, data, **shape, gop=gop)

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
