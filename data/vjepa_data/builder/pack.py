"""Which clip goes to which shard: decided once, frozen as files, the same for every builder that comes after.

OUT/plan/clips.parquet   one row a clip, with its shard, in the order in which it is stored
OUT/plan/rejects.parquet what was refused before anything was encoded
OUT/plan/plan.json       written last: spec, tools, and the sums of what it was made from and of the two tables
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vjepa_data.atomic import atomic_write
from vjepa_data.builder.ingest import InputFile
from vjepa_data.builder.select import Cutting
from vjepa_data.corpus.format import REJECT_COLUMNS, RejectRecord, canonical_json, table_bytes
from vjepa_data.settings import BadInput
from vjepa_data.spec import Spec

BYTES_PER_PIXEL = 0.018
"""Of a canonical clip at crf 23: median over 12 public clips (0.008 to 0.031). Only the size of shards hangs on it."""

BYTES_PER_PIXEL_IMAGE = 0.35
"""Of a JPEG of quality 92, roughly; only the size of shards hangs on it."""

CLIP_COLUMNS = pa.schema(
    [
        ("shard", pa.int32()),
        ("key", pa.string()),
        ("source", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("seconds", pa.float64()),
        ("group", pa.string()),
        ("split", pa.string()),
        ("labels", pa.string()),
        ("original", pa.string()),
    ]
)


@dataclass(frozen=True)
class ShardPlan:
    """One shard to be written."""

    number: int
    file: str
    split: str
    clips: tuple[Cutting, ...]


@dataclass(frozen=True)
class BuildPlan:
    """All shards of a build. `hash` goes into every commit record: a shard of another plan does not count."""

    hash: str
    shards: tuple[ShardPlan, ...]
    rejects: tuple[RejectRecord, ...]


def pack(clips: Sequence[Cutting], *, spec: Spec) -> list[tuple[int, Cutting]]:
    """Deal the clips to shards: shuffled by a hash of their keys, so that every shard is like the whole.

    Returns:
        Number of the shard, and clip, in the order in which they are stored.
    """
    packed: list[tuple[int, Cutting]] = []
    number = -1
    for split in sorted({clip.split for clip in clips}):
        size, count = float("inf"), 0
        for clip in sorted((c for c in clips if c.split == split), key=_order):
            estimate = estimated_bytes(clip, spec=spec)
            if size + estimate > spec.shard_mb * 1e6 or count >= spec.shard_samples:
                number, size, count = number + 1, 0.0, 0
            size, count = size + estimate, count + 1
            packed.append((number, clip))
    return packed


def _order(clip: Cutting) -> bytes:
    return hashlib.blake2b(clip.key.encode(), digest_size=16, person=b"vjepa.pack").digest()


def estimated_bytes(clip: Cutting, *, spec: Spec) -> float:
    """Size of a clip before it is encoded, from its length and shape."""
    original = json.loads(clip.original)
    if spec.mode == "copy" and clip.start_s is None and clip.end_s is None:
        return original["bytes"]
    picture = original.get("box") or original
    short, long = sorted((picture["width"], picture["height"]))
    pixels = spec.encode.short_side_px**2 * long / short
    if spec.media == "images":
        return pixels * BYTES_PER_PIXEL_IMAGE
    fps = spec.encode.fps or min(original["fps"], spec.encode.max_fps)
    return clip.seconds * fps * pixels * BYTES_PER_PIXEL


def freeze(
    out: Path,
    clips: Sequence[Cutting],
    rejects: Sequence[RejectRecord],
    *,
    sources: Sequence[InputFile],
    spec: Spec,
    tools: dict[str, str],
) -> BuildPlan:
    """Write the plan and read it back as every other builder will."""
    folder = out / "plan"
    folder.mkdir(exist_ok=True)
    rows = [{"shard": number, **asdict(clip)} for number, clip in pack(clips, spec=spec)]
    tables = {
        "clips": table_bytes(rows, CLIP_COLUMNS),
        "rejects": table_bytes([asdict(reject) for reject in rejects], REJECT_COLUMNS),
    }
    for name, data in tables.items():
        atomic_write(folder / f"{name}.parquet", data)
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in tables.items()}
    counts = Counter(row["shard"] for row in rows)
    values = {**_heading(sources, spec, tools), **sums, "shard_clips": [counts[n] for n in sorted(counts)]}
    atomic_write(folder / "plan.json", json.dumps(values, indent=1, sort_keys=True).encode() + b"\n")
    plan = thaw(out, sources=sources, spec=spec, tools=tools)
    assert plan is not None
    return plan


def _heading(sources: Sequence[InputFile], spec: Spec, tools: dict[str, str]) -> dict[str, Any]:
    listing = [(s.name, s.labels, s.group, s.split, s.start_s, s.end_s) for s in sources]
    return {
        "format": 1,
        "spec": spec.model_dump(mode="json"),
        "tools": tools,
        "sources": hashlib.sha256(canonical_json(listing)).hexdigest(),
    }


def thaw(out: Path, *, sources: Sequence[InputFile], spec: Spec, tools: dict[str, str]) -> BuildPlan | None:
    """Read the plan of a build that was begun, or None if there is none.

    Raises:
        BadInput: it was made from other sources, with another spec or by other tools.
    """
    path = out / "plan" / "plan.json"
    if not path.exists():
        return None
    values = json.loads(path.read_bytes())
    for name, wanted in _heading(sources, spec, tools).items():
        if values.get(name) != wanted:
            later = "; videos that came later make a corpus of their own (`vjepa merge` mixes them)"
            raise BadInput(
                f"{out} holds a build with {'other' if name != 'spec' else 'another'} {name}"
                f"{_difference(values.get(name), wanted)}; give a new --out, or remove that folder"
                f"{later if name == 'sources' else ''}"
            )
    clips, rejects = (pq.read_table(out / "plan" / f"{name}.parquet").to_pylist() for name in ("clips", "rejects"))
    names = [f.name for f in fields(Cutting)]
    shards: list[ShardPlan] = []
    counts: dict[str, int] = {}
    groups: dict[int, list[Cutting]] = {}
    for row in clips:
        groups.setdefault(row["shard"], []).append(Cutting(**{name: row[name] for name in names}))
    for number, members in sorted(groups.items()):
        split = members[0].split
        count = counts[split] = counts.get(split, -1) + 1
        shards.append(ShardPlan(number, f"shards/{spec.name}-{split}-{count:06d}.tar", split, tuple(members)))
    return BuildPlan(
        hash=hashlib.sha256(path.read_bytes()).hexdigest(),
        shards=tuple(shards),
        rejects=tuple(RejectRecord(**reject) for reject in rejects),
    )


def _difference(found: Any, wanted: Any, prefix: str = "") -> str:
    """Which of two mappings' values differ first, for a message."""
    if not isinstance(found, dict) or not isinstance(wanted, dict):
        return f" ({prefix} was {found!r}, now {wanted!r})" if prefix else ""
    name = next((name for name in wanted if found.get(name) != wanted[name]), None)
    return _difference(found.get(name), wanted[name], f"{prefix}.{name}".lstrip(".")) if name else ""
