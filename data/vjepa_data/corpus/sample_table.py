"""The table of the samples of a split: memory-mapped if it is large, and with a row per virtual part of long videos."""

import contextlib
import functools
import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from vjepa_data.atomic import atomic_write, remove_leftovers, temporary_name
from vjepa_data.corpus import parts
from vjepa_data.corpus.format import Manifest, extra_columns, part_seconds, read_manifest
from vjepa_data.corpus.http_client import Gone, public_url
from vjepa_data.corpus.remote import read_blocks
from vjepa_data.errors import BadInput

log = logging.getLogger(__name__)

MAPPED_FROM = 200_000  # samples; reading the parquet of fewer takes less than 0.1 s and 40 MB (measured once)

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
"""Columns with numbers, and their types in memory."""


@dataclass(frozen=True)
class Parts:
    """The division of the videos of a corpus into virtual parts."""

    seconds: float
    gop: int
    is_default: bool
    """The corpus was built with this length."""


def division_of(manifest: Manifest, part_s: float | None, shown: str) -> Parts | None:
    """Return how the videos of a corpus are divided: as it was built, or by another length. None means undivided.

    Raises:
        BadInput: a length is given, and the corpus was built without virtual parts.
    """
    built = part_seconds(manifest.spec)
    if built is None:
        if part_s is None:
            return None
        raise BadInput(
            f"{shown} was built without cut.part_s, so its videos are read whole; "
            "remove data.sources[].part_s, or build the corpus again with cut.part_s"
        )
    return Parts(part_s or built, manifest.spec["encode"]["gop"], part_s in (None, built))


def prepare(folder: Path, manifest: Manifest) -> None:
    """Write the memory-mapped table of a large corpus in advance, so that the first run starts fast."""
    for split in manifest.splits:
        read_table(folder, split, manifest, division_of(manifest, None, str(folder)))


def read_table(folder: Path, split: str, manifest: Manifest, division: Parts | None) -> pa.Table:
    """Read the rows of a split as a single chunk, memory-mapped if there are many."""
    path = folder / "samples.parquet"
    try:
        rows = pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowInvalid) as e:
        raise BadInput(f"{path} cannot be read ({e}); build the corpus again or restore this file") from e
    length = "" if division is None or division.is_default else f"-{division.seconds}s"
    name = f"{manifest.hash[:32]}-{split}{length}.arrow"
    table = None
    if rows < MAPPED_FROM:
        table = _convert(path, split, extra_columns(manifest.spec), division)
        if table.num_rows < MAPPED_FROM:
            return table
    for place in (folder / ".index", user_cache()):
        file = place / name
        if not file.exists():
            table = table or _convert(path, split, extra_columns(manifest.spec), division)
            if not _store(table, file):
                continue
        return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    raise BadInput(
        f"neither {folder} nor {user_cache()} can be written; make either writable for the index of {rows} samples"
    )


def _convert(path: Path, split: str, extra: Mapping[str, pa.DataType], division: Parts | None) -> pa.Table:
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
    whole = pa.table(columns) if division is None else _divide(pa.table(columns), division)
    return whole.combine_chunks() if len(whole) else whole


def _divide(videos: pa.Table, division: Parts) -> pa.Table:
    """Return a row for each part of each video, with its first frame in the column `first`."""
    frames, fps = videos["frames"].to_numpy(), videos["fps"].to_numpy()
    video, first = parts.parts_of(frames, fps, part_s=division.seconds, gop=division.gop)
    is_last = np.append(np.diff(video) > 0, True)[: len(video)]
    ends = np.where(is_last, frames[video], np.roll(first, -1))
    table = videos.take(pa.array(video))
    suffixes = pa.array([f"{parts.KEY_SUFFIX}{frame}" for frame in first.tolist()], pa.large_string())
    nothing = pa.scalar("", pa.large_string())
    keys = pa.compute.binary_join_element_wise(table["key"], suffixes, nothing)  # pyright: ignore[reportAttributeAccessIssue]
    table = table.set_column(table.column_names.index("key"), "key", keys)
    table = table.set_column(table.column_names.index("frames"), "frames", pa.array((ends - first).astype(np.int32)))
    return table.append_column("first", pa.array(first.astype(np.int32)))


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
