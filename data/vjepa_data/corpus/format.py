"""The corpus format: tars of samples, a table of their positions, and a manifest with the hash of everything.

    OUT/manifest.json               the corpus: its spec, its shards with their sha256, and a hash that is its name
    OUT/samples.parquet             one row per sample: everything needed to plan the reading order
    OUT/rejects.parquet             refused sources and clips, with reasons
    OUT/shards/NAME-train-000000.tar    KEY.json, KEY.mp4 [, KEY.gops.bin, KEY.actions.npy, KEY.caption.txt], ...
    OUT/shards/000000.json          commit record, written last, when the tar is complete and on the disk

A tar is written under a temporary name, synced and renamed. Its commit record is written after that. A shard with a
record is therefore complete, and a shard without a record does not count.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from vjepa_data.atomic import atomic_write, sync_folder, temporary_name
from vjepa_data.corpus import signal_statistics
from vjepa_data.corpus.parts import MEMBER
from vjepa_data.errors import BadInput
from vjepa_data.signal_spec import member_of_signal, member_of_text, signals_of, stored, texts_of

FORMAT = 1

SAMPLE_COLUMNS = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("shard", pa.int32()),
        ("position", pa.int32()),
        ("video_offset", pa.int64()),
        ("video_size", pa.int64()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        ("suffix", pa.string()),
        ("frames", pa.int32()),
        ("fps", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("duration_s", pa.float64()),
        ("group", pa.string()),
        ("labels", pa.string()),
        ("xxh64", pa.string()),
    ]
)

REJECT_COLUMNS = pa.schema(
    [
        ("source", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True)
class RejectRecord:
    """A source, or a part of a source, that did not enter the corpus."""

    source: str
    start_s: float | None
    end_s: float | None
    stage: str
    reason: str
    detail: str


@dataclass(frozen=True)
class SampleRecord:
    """A sample for the shard writer."""

    key: str
    """Lower-case letters, digits, `_` and `-`, at most 64. Dots are not allowed: WebDataset reads them as suffixes."""
    video: bytes
    suffix: str
    """`mp4` or `jpg`."""
    facts: dict[str, Any]
    """The sample's JSON. Its `stored`, `group`, `labels` and `signals` also go to the table."""
    members: Mapping[str, bytes] = field(default_factory=dict)
    """Signals and texts, by suffix, such as `actions.npy`."""
    derived: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Rows of signals that are derived when clips are read. They are measured and not stored."""


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the manifest lists it."""

    file: str
    split: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class Manifest:
    """Description of a corpus. `hash` is the sha256 of all other fields and identifies the corpus."""

    format: int
    name: str
    spec: dict[str, Any]
    tools: dict[str, str]
    shards: tuple[ShardEntry, ...]
    splits: dict[str, dict[str, float]]
    samples_sha256: str
    hash: str = ""
    signals: dict[str, Any] = field(default_factory=dict)
    """Statistics of each signal over the train split (`vjepa_data.corpus.signal_statistics`)."""

    def root(self, place: str) -> str:
        """Return the folder or URL of the shards: next to the manifest, or where the indexed shards are."""
        return str(self.spec.get("root", place)) if self.spec.get("foreign") else place

    def with_hash(self) -> "Manifest":
        """Return a copy with the hash that fits the other fields."""
        values = self._values()
        del values["hash"]
        return Manifest(**{**self.__dict__, "hash": hashlib.sha256(canonical_json(values)).hexdigest()})

    def as_json(self) -> bytes:
        """Return the contents of `manifest.json`."""
        return json.dumps(self._values(), indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"

    def _values(self) -> dict[str, Any]:
        """Return all fields. Without signals that field is left out, so that such corpora keep their bytes."""
        return {name: value for name, value in asdict(self).items() if value or name != "signals"}


def canonical_json(value: Any) -> bytes:
    """Encode a value as JSON that equal values share byte for byte: sorted, without spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def is_ours(facts: Mapping[str, Any]) -> bool:
    """Return whether this project wrote a sample's JSON. All of a foreign JSON counts as labels."""
    return isinstance(facts.get("labels"), dict) and isinstance(facts.get("group"), str)


def is_plain_path(file: str) -> bool:
    """Return whether the path of a shard is relative, stays below its folder, and cannot be taken for a command or URL.

    Every index has only such paths. WebDataset would run `pipe:COMMAND`.
    """
    if re.match(r"[A-Za-z][\w+.-]*:", file):
        return False
    is_text = "\0" not in file and not any(0xD800 <= ord(letter) < 0xE000 for letter in file)
    return is_text and not {"", ".", ".."} & set(file.split("/"))


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json` of a corpus.

    Raises:
        BadInput: the file is missing, of another format, or does not match its hash.
    """
    path = folder / "manifest.json"
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give a folder that `vjepa shard` or `vjepa index` wrote") from None
    except ValueError:
        raise BadInput(f"{path}: not JSON; build the corpus again") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise BadInput(f"{path}: format {found!r}, this version reads {FORMAT}; build the corpus again")
    try:
        values["shards"] = tuple(ShardEntry(**entry) for entry in values["shards"])
        manifest = Manifest(**values)
    except (TypeError, KeyError):
        raise BadInput(f"{path}: fields are missing or unknown; build the corpus again") from None
    if manifest.with_hash().hash != manifest.hash:
        raise BadInput(f"{path}: the content does not match its hash, so it was edited; build the corpus again")
    return manifest


class _Hashing(io.RawIOBase):
    """A file for writing that keeps track of its length and sha256."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._sha256 = hashlib.sha256()
        self._at = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self._file.write(data)
        self._sha256.update(data)
        self._at += len(data)
        return len(data)

    def tell(self) -> int:
        return self._at

    def finish(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._sha256.hexdigest()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # its buffer may not fit on the disk
            self._file.close()


class ShardWriter:
    """Writes a shard and its commit record. Nothing is visible before `commit`.

    Args:
        folder: the corpus's folder.
        number: number of the shard in the corpus, and name of its record.
        file: path of the tar in the corpus's folder.
        split: split of all its samples.
    """

    def __init__(self, folder: Path, *, number: int, file: str, split: str) -> None:
        self._folder, self._number, self._file, self._split = folder, number, file, split
        self._temporary = temporary_name(folder / file)
        self._sink = _Hashing(self._temporary)
        # webdataset's own TarWriter does no more than this, but needs torch.
        self._tar = tarfile.TarFile(fileobj=self._sink, mode="w", format=tarfile.USTAR_FORMAT)
        self._rows: list[dict[str, Any]] = []
        self._rejects: list[RejectRecord] = []
        self._moments: dict[str, dict[str, Any]] = {}

    def refuse(self, reject: RejectRecord) -> None:
        """Record a clip that was planned for this shard and refused."""
        self._rejects.append(reject)
        os.utime(self._temporary)  # renews the claim on this shard

    def write(self, sample: SampleRecord) -> None:
        """Append a sample: its JSON, its video, then its signals and texts."""
        stored = sample.facts["stored"]
        text = canonical_json(sample.facts)
        json_at = self._append(sample.key, "json", text)
        video_at = self._append(sample.key, sample.suffix, sample.video)
        row = {
            "key": sample.key,
            "video_offset": video_at,
            "video_size": len(sample.video),
            "json_offset": json_at,
            "json_size": len(text),
            "suffix": sample.suffix,
            "frames": stored["frames"],
            "fps": stored["fps"],
            "width": stored["width"],
            "height": stored["height"],
            "duration_s": stored["duration_s"],
            "group": sample.facts["group"],
            "labels": canonical_json(sample.facts["labels"]).decode(),
            "xxh64": xxhash.xxh64_hexdigest(sample.video),
        }
        for member, data in sample.members.items():
            row[f"{member}.offset"] = self._append(sample.key, member, data)
            row[f"{member}.size"] = len(data)
            row[f"{member}.xxh64"] = xxhash.xxh64_hexdigest(data)
        for signal, clock in sample.facts.get("signals", {}).items():
            row |= {f"{member_of_signal(signal)}.{name}": clock[name] for name in ("rate_hz", "start_s")}
            rows = np.load(io.BytesIO(sample.members[member_of_signal(signal)]), allow_pickle=False)
            self._measure(signal, rows)
        for signal, rows in sample.derived.items():
            self._measure(signal, rows)
        self._rows.append(row)

    def _measure(self, signal: str, rows: np.ndarray) -> None:
        self._moments[signal] = signal_statistics.merge(self._moments.get(signal), signal_statistics.measure(rows))

    def _append(self, key: str, suffix: str, data: bytes) -> int:
        """Append a member and return the offset of its data. Our keys fit a plain header, which is a single block."""
        header = tarfile.TarInfo(f"{key}.{suffix}")  # no time stamp and no owner: equal samples make equal bytes
        header.size = len(data)
        begin = self._sink.tell() + tarfile.BLOCKSIZE
        self._tar.addfile(header, io.BytesIO(data))
        return begin

    def commit(self, *, plan: str) -> None:
        """Publish the shard: sync, rename, then write the record. A shard without samples leaves only its record."""
        self._tar.close()
        sha256 = self._sink.finish()
        size = self._sink.tell()
        if self._rows:
            self._temporary.rename(self._folder / self._file)
            sync_folder((self._folder / self._file).parent)
        else:
            self._temporary.unlink()
        record = {
            "format": FORMAT,
            "plan": plan,
            "file": self._file if self._rows else None,
            "split": self._split,
            "bytes": size if self._rows else 0,
            "sha256": sha256 if self._rows else "",
            "samples": self._rows,
            "rejects": [asdict(reject) for reject in self._rejects],
            **({"signals": self._moments} if self._moments else {}),
        }
        atomic_write(record_path(self._folder, self._number), canonical_json(record) + b"\n")

    def abandon(self) -> None:
        """Remove the temporary file of a shard that was not committed."""
        self._sink.abandon()
        self._temporary.unlink(missing_ok=True)


def record_path(folder: Path, number: int) -> Path:
    """Return the path of a shard's commit record."""
    return folder / "shards" / f"{number:06d}.json"


def read_record(folder: Path, number: int, *, plan: str) -> dict[str, Any] | None:
    """Read a shard's commit record, or return None if the shard is missing, incomplete or of another plan."""
    try:
        record = json.loads(record_path(folder, number).read_bytes())
        if record["file"] is not None and (folder / record["file"]).stat().st_size != record["bytes"]:
            return None
    except (OSError, ValueError, KeyError):
        return None
    return record if record.get("plan") == plan else None


def write_manifest(
    folder: Path,
    records: Sequence[dict[str, Any]],
    rejects: Sequence[RejectRecord],
    *,
    name: str,
    spec: dict[str, Any],
    tools: dict[str, str],
) -> Manifest:
    """Write the tables and the manifest from the commit records of all shards. The manifest comes last."""
    full = sorted((r for r in records if r["file"] is not None), key=lambda record: (record["split"], record["file"]))
    rows = [
        {"split": record["split"], "shard": number, "position": position, **row}
        for number, record in enumerate(full)
        for position, row in enumerate(record["samples"])
    ]
    extra = extra_columns(spec)
    samples = table_bytes(rows, pa.schema([*SAMPLE_COLUMNS, *(pa.field(n, kind) for n, kind in extra.items())]))
    everything = [*(asdict(r) for r in rejects), *(reject for record in records for reject in record["rejects"])]
    everything.sort(key=lambda reject: (reject["source"], reject["start_s"] or 0.0, reject["stage"]))
    atomic_write(folder / "samples.parquet", samples)
    atomic_write(folder / "rejects.parquet", table_bytes(everything, REJECT_COLUMNS))
    splits: dict[str, dict[str, float]] = {}
    for record in full:
        totals = splits.setdefault(record["split"], {"samples": 0, "shards": 0, "seconds": 0.0})
        totals["samples"] += len(record["samples"])
        totals["shards"] += 1
        totals["seconds"] = round(totals["seconds"] + sum(row["duration_s"] for row in record["samples"]), 3)
    manifest = Manifest(
        format=FORMAT,
        name=name,
        spec=spec,
        tools=tools,
        shards=tuple(ShardEntry(r["file"], r["split"], r["bytes"], r["sha256"], len(r["samples"])) for r in full),
        splits=splits,
        samples_sha256=hashlib.sha256(samples).hexdigest(),
        signals=signal_statistics.merge_records(full),
    ).with_hash()
    atomic_write(folder / "manifest.json", manifest.as_json())
    return manifest


def extra_columns(spec: Mapping[str, Any]) -> dict[str, pa.DataType]:
    """Return the columns that tables of GOPs, signals and texts, if any, add to the table of samples."""
    member = {"offset": pa.int64(), "size": pa.int64(), "xxh64": pa.string()}
    clock = {"rate_hz": pa.float64(), "start_s": pa.float64()}
    columns = {f"{MEMBER}.{name}": kind for name, kind in member.items()} if part_seconds(spec) else {}
    for signal in sorted(stored(signals_of(spec))):
        columns |= {f"{member_of_signal(signal)}.{name}": kind for name, kind in {**member, **clock}.items()}
    for text in sorted(texts_of(spec)):
        columns |= {f"{member_of_text(text)}.{name}": kind for name, kind in member.items()}
    return columns


def part_seconds(spec: Mapping[str, Any]) -> float | None:
    """Return the length of the virtual parts of a corpus, in seconds, or None if it has none."""
    return spec.get("cut", {}).get("part_s")


def table_bytes(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    """Encode rows as a parquet file."""
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, compression="zstd", row_group_size=1 << 17)
    return sink.getvalue()
