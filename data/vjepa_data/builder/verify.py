"""Verify a corpus against its manifest: read every byte once and, with `deep`, decode every clip."""

import hashlib
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from vjepa_data.builder.tars import local_tar
from vjepa_data.corpus.format import SAMPLE_COLUMNS, Manifest, ShardEntry, read_manifest
from vjepa_data.corpus.remote import is_remote
from vjepa_data.corpus.sample_table import mirror, user_cache
from vjepa_data.decoding.backends import Expect
from vjepa_data.media.fetch import FileRef
from vjepa_data.media.pool import WorkerPool
from vjepa_data.media.tasks import CheckTask
from vjepa_data.media.video import Refused
from vjepa_data.settings import BadInput

KEY = re.compile(r"[a-z0-9_-]{1,64}")


@dataclass(frozen=True)
class VerifyResult:
    """Outcome of verifying a corpus."""

    manifest: Manifest
    problems: tuple[str, ...]
    """A line for each problem. Empty for an intact corpus."""
    bytes: int
    """Size of the shards in bytes."""
    samples: int
    decoded: int
    """Clips of which every frame was decoded."""


def verify(
    place: str | Path,
    *,
    deep: bool = False,
    workers: int = 1,
    timeout_s: float = 120.0,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> VerifyResult:
    """Check a corpus against its manifest: tables, sizes, sha256, and each sample at its recorded offset.

    Args:
        place: folder or URL of the corpus. Remote shards are copied to this machine in turn.
        deep: also decode every frame of every clip.
        workers: number of processes that decode.
        timeout_s: seconds after which a clip that is still being decoded is reported.
        advance: called with the number of bytes read and the number of all bytes.

    Raises:
        BadInput: the manifest or the sample table is missing or was modified.
    """
    folder = mirror(str(place), user_cache()) if is_remote(str(place)) else Path(place)
    manifest = read_manifest(folder)
    table = _read_table(folder, manifest)
    problems = list(_check_table(table, manifest))
    total = sum(shard.bytes for shard in manifest.shards)
    done = decoded = 0
    root = manifest.root(str(place))
    is_foreign = bool(manifest.spec.get("foreign"))
    with WorkerPool[CheckTask, None]("vjepa_data.media.tasks", workers=workers, timeout_s=timeout_s) as pool:
        for number, shard in enumerate(manifest.shards):
            own = table.filter(pc.field("shard") == number).to_pylist()
            with local_tar(root, shard.file, scratch=folder) as path:
                found = list(_check_shard(path, shard, own, is_foreign=is_foreign))
                if deep and path is not None and not found:
                    decoded += len(own)
                    found.extend(_decode_all(path, shard.file, own, pool, is_foreign=is_foreign))
            problems.extend(found)
            done += shard.bytes
            advance(done, total)
    return VerifyResult(manifest, tuple(problems), done, table.num_rows, decoded)


def _read_table(folder: Path, manifest: Manifest) -> pa.Table:
    path = folder / "samples.parquet"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); rebuild the corpus") from None
    if hashlib.sha256(data).hexdigest() != manifest.samples_sha256:
        raise BadInput(f"{path}: differs from the manifest (sha256); rebuild the corpus")
    table = pq.read_table(path)
    missing = set(SAMPLE_COLUMNS.names) - set(table.column_names)
    if missing:
        raise BadInput(f"{path}: missing column {min(missing)!r}; rebuild the corpus")
    return table


def _check_table(table: pa.Table, manifest: Manifest) -> Iterator[str]:
    """Report problems of the sample table as a whole."""
    repeated = table.num_rows - len(table["key"].unique())
    if repeated:
        yield f"samples.parquet: {repeated} duplicate keys"
    order = table.select(["split", "shard", "position"])
    if not order.equals(order.sort_by([(name, "ascending") for name in order.column_names])):
        yield "samples.parquet: rows are not sorted by split, shard and position"
    splits = table.group_by("group").aggregate([("split", "count_distinct")])
    shared = splits.filter(pc.field("split_count_distinct") > 1)["group"].to_pylist()
    if shared:
        yield f"samples.parquet: groups in several splits: {len(shared)}, such as {min(shared)!r}"
    for split, totals in manifest.splits.items():
        count = table.filter(pc.field("split") == split).num_rows
        if count != totals["samples"]:
            yield f"samples.parquet: {count} samples of split {split}, expected {totals['samples']}"


def _check_shard(
    path: Path | None, shard: ShardEntry, rows: list[dict[str, Any]], *, is_foreign: bool
) -> Iterator[str]:
    if path is None:
        yield f"{shard.file}: missing"
        return
    with path.open("rb") as file:
        size = path.stat().st_size
        if size != shard.bytes:
            yield f"{shard.file}: {size} bytes, expected {shard.bytes}"
            return
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            yield f"{shard.file}: sha256 differs from the manifest"
        if len(rows) != shard.samples:
            yield f"{shard.file}: {len(rows)} samples in samples.parquet, expected {shard.samples}"
        suffixes = [(row["key"], ("json", row["suffix"], *_extra_members(row))) for row in rows]
        expected = [f"{key}.{suffix}" for key, of_key in suffixes for suffix in of_key]
        if not is_foreign and _member_names(file) != expected:  # foreign tars may be joined, or damaged elsewhere
            yield f"{shard.file}: members differ from samples.parquet"
        for row in rows:
            problems = _check_bytes(file, row) if is_foreign else _check_sample(file, row)
            yield from (f"{shard.file}: {row['key']}: {problem}" for problem in problems)


def _member_names(file: BinaryIO) -> list[str] | None:
    """List the names of a tar's members in order, or None if the tar is damaged."""
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            return [member.name for member in tar]
    except tarfile.TarError:
        return None


def _check_sample(file: BinaryIO, row: dict[str, Any]) -> Iterator[str]:
    """Report problems of the sample at its recorded offset."""
    if not KEY.fullmatch(row["key"]):
        yield "invalid key; use at most 64 characters a-z, 0-9, _ and -"
    yield from _check_bytes(file, row)
    file.seek(row["json_offset"])
    try:
        facts = json.loads(file.read(row["json_size"]))
    except ValueError:
        yield "its json cannot be parsed"
        return
    if not isinstance(facts, dict) or facts.get("key", row["key"]) != row["key"]:
        yield "its json belongs to another sample"


def _extra_members(row: dict[str, Any]) -> list[str]:
    """Return the suffixes of the signals and texts of a sample."""
    return [name.removesuffix(".offset") for name in row if name.endswith(".offset")]


def _check_bytes(file: BinaryIO, row: dict[str, Any]) -> Iterator[str]:
    file.seek(row["video_offset"])
    if xxhash.xxh64_hexdigest(file.read(row["video_size"])) != row["xxh64"]:
        yield f"its {row['suffix']} has changed (xxh64 differs)"
    for member in _extra_members(row):
        file.seek(row[f"{member}.offset"])
        if xxhash.xxh64_hexdigest(file.read(row[f"{member}.size"])) != row[f"{member}.xxh64"]:
            yield f"its {member} has changed (xxh64 differs)"


def _decode_all(
    path: Path, name: str, rows: list[dict[str, Any]], pool: WorkerPool[CheckTask, None], *, is_foreign: bool
) -> Iterator[str]:
    tasks = [
        CheckTask(
            key=row["key"],
            file=FileRef(str(path), row["video_offset"], row["video_size"]),
            suffix=row["suffix"],
            expect=Expect(row["frames"], row["width"], row["height"]),
            is_foreign=is_foreign,
        )
        for row in rows
    ]
    for task, answer in pool.map(tasks):
        if isinstance(answer, Refused):
            yield f"{name}: {task.key}: {answer.reason}: {answer.detail}"
