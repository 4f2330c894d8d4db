"""The format: tars of samples, a table of where each lies, and a manifest that names the whole.

    OUT/manifest.json               the corpus: its spec, its shards with their sha256, and a hash that is its name
    OUT/samples.parquet             one row a sample: everything that a plan of reading needs
    OUT/rejects.parquet             what was refused, and why
    OUT/shards/NAME-train-000000.tar    KEY.json, KEY.mp4, KEY.json, KEY.mp4 ...
    OUT/shards/000000.json          commit record: written last, when the tar is complete and on the disk

A tar is written beside its name, forced to the disk and renamed; only then its record is. So whatever has a record is
whole, and whatever has none never happened.
"""

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from vjepa_data.atomic import atomic_write, sync_folder, temporary_name
from vjepa_data.settings import BadInput

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
    """A source, or a part of one, that did not enter the corpus."""

    source: str
    start_s: float | None
    end_s: float | None
    stage: str
    reason: str
    detail: str


@dataclass(frozen=True)
class SampleRecord:
    """One sample as it is given to the writer."""

    key: str
    """Lower-case letters, digits, `_` and `-`, at most 64; no dots, which WebDataset would take for suffixes."""
    video: bytes
    suffix: str
    """`mp4` or `jpg`."""
    facts: dict[str, Any]
    """The sample's JSON. Its `stored`, `group` and `labels` also go to the table."""


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
    """What a corpus is. `hash` is the sha256 of all the rest, and so the corpus's name."""

    format: int
    name: str
    spec: dict[str, Any]
    tools: dict[str, str]
    shards: tuple[ShardEntry, ...]
    splits: dict[str, dict[str, float]]
    samples_sha256: str
    hash: str = ""

    def root(self, place: str) -> str:
        """Where the shards' paths begin: at the manifest's own place, or at the address that was indexed."""
        return str(self.spec.get("root", place)) if self.spec.get("foreign") else place

    def with_hash(self) -> "Manifest":
        values = asdict(self)
        del values["hash"]
        return Manifest(**{**self.__dict__, "hash": hashlib.sha256(canonical_json(values)).hexdigest()})

    def as_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def canonical_json(value: Any) -> bytes:
    """The one way to write a value as JSON: sorted, without spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def is_ours(facts: Mapping[str, Any]) -> bool:
    """Whether this project wrote a sample's JSON; of another's, all of it is labels."""
    return isinstance(facts.get("labels"), dict) and isinstance(facts.get("group"), str)


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json` of a corpus and check that it is whole.

    Raises:
        BadInput: there is none, it is of another format, or its hash does not fit.
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
        raise BadInput(f"{path}: it was changed after it was written (its hash does not fit); build the corpus again")
    return manifest


class _Hashing(io.RawIOBase):
    """A file for writing that knows its length and sha256."""

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
        with contextlib.suppress(OSError):  # what is still in its buffer may not fit the disk
            self._file.close()


class ShardWriter:
    """Writes one shard and its commit record; nothing is visible before `commit`.

    Args:
        folder: the corpus's folder.
        number: number of the shard in the whole corpus; names its record.
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

    def refuse(self, reject: RejectRecord) -> None:
        """Note a clip that should have been in this shard."""
        self._rejects.append(reject)
        os.utime(self._temporary)  # we are still at work on it

    def write(self, sample: SampleRecord) -> None:
        """Append one sample: its JSON, then its video."""
        stored = sample.facts["stored"]
        text = canonical_json(sample.facts)
        json_at = self._append(sample.key, "json", text)
        video_at = self._append(sample.key, sample.suffix, sample.video)
        self._rows.append(
            {
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
        )

    def _append(self, key: str, suffix: str, data: bytes) -> int:
        """Append one member and say where its data begins. A key of ours fits the header, which is then one block."""
        header = tarfile.TarInfo(f"{key}.{suffix}")  # no time stamp and no owner: equal samples make equal bytes
        header.size = len(data)
        begin = self._sink.tell() + tarfile.BLOCKSIZE
        self._tar.addfile(header, io.BytesIO(data))
        return begin

    def commit(self, *, plan: str) -> None:
        """Make the shard visible: to the disk, its name, then its record. A shard without samples leaves only that."""
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
        }
        atomic_write(record_path(self._folder, self._number), canonical_json(record) + b"\n")

    def abandon(self) -> None:
        """Leave no trace of a shard that was not committed."""
        self._sink.abandon()
        self._temporary.unlink(missing_ok=True)


def record_path(folder: Path, number: int) -> Path:
    return folder / "shards" / f"{number:06d}.json"


def read_record(folder: Path, number: int, *, plan: str) -> dict[str, Any] | None:
    """A shard's commit record, or None if the shard is not there as the plan wants it."""
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
    """Gather the commit records of all shards to the tables and the manifest, which is written last."""
    full = sorted((r for r in records if r["file"] is not None), key=lambda record: (record["split"], record["file"]))
    rows = [
        {"split": record["split"], "shard": number, "position": position, **row}
        for number, record in enumerate(full)
        for position, row in enumerate(record["samples"])
    ]
    samples = table_bytes(rows, SAMPLE_COLUMNS)
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
    ).with_hash()
    atomic_write(folder / "manifest.json", manifest.as_json())
    return manifest


def table_bytes(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, compression="zstd", row_group_size=1 << 17)
    return sink.getvalue()
