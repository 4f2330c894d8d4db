"""Stage 3 of a build: assign clips to shards and save this plan, which all builders of a corpus share.

OUT/plan/clips.parquet   one row per clip, with its shard, in stored order
OUT/plan/rejects.parquet sources that were rejected before encoding
OUT/plan/plan.json       written last: spec, tools, and the hashes of the sources and of the two tables
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
from vjepa_data.builder.select import PlannedClip
from vjepa_data.corpus.format import REJECT_COLUMNS, RejectRecord, canonical_json, table_bytes
from vjepa_data.settings import BadInput
from vjepa_data.spec import Spec

BYTES_PER_PIXEL = 0.018
"""Canonical clip at crf 23: median over 12 public clips (0.008 to 0.031). It only affects the size of shards."""

BYTES_PER_PIXEL_IMAGE = 0.35
"""JPEG of quality 92, roughly. It only affects the size of shards."""

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
        ("probe", pa.string()),
    ]
)


@dataclass(frozen=True)
class ShardPlan:
    """A shard to write."""

    number: int
    file: str
    split: str
    clips: tuple[PlannedClip, ...]


@dataclass(frozen=True)
class BuildPlan:
    """All shards of a build. Every commit record holds `hash`, so that shards of another plan are ignored."""

    hash: str
    shards: tuple[ShardPlan, ...]
    rejects: tuple[RejectRecord, ...]


def pack(clips: Sequence[PlannedClip], *, spec: Spec) -> list[tuple[int, PlannedClip]]:
    """Assign clips to shards, shuffled by a hash of their keys, so that every shard resembles the corpus.

    Returns:
        Pairs of shard number and clip, in stored order.
    """
    packed: list[tuple[int, PlannedClip]] = []
    number = -1
    for split in sorted({clip.split for clip in clips}):
        size, count = float("inf"), 0
        for clip in sorted((c for c in clips if c.split == split), key=_order):
            estimate = estimate_bytes(clip, spec=spec)
            if size + estimate > spec.shard_mb * 1e6 or count >= spec.shard_samples:
                number, size, count = number + 1, 0.0, 0
            size, count = size + estimate, count + 1
            packed.append((number, clip))
    return packed


def _order(clip: PlannedClip) -> bytes:
    return hashlib.blake2b(clip.key.encode(), digest_size=16, person=b"vjepa.pack").digest()


def estimate_bytes(clip: PlannedClip, *, spec: Spec) -> float:
    """Estimate the size of an encoded clip in bytes from its length and shape."""
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


def save_plan(
    out: Path,
    clips: Sequence[PlannedClip],
    rejects: Sequence[RejectRecord],
    *,
    sources: Sequence[InputFile],
    spec: Spec,
    tools: dict[str, str],
) -> BuildPlan:
    """Write the plan, and read it back as every other builder will."""
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
    values = {**_inputs(sources, spec, tools), **sums, "shard_clips": [counts[n] for n in sorted(counts)]}
    atomic_write(folder / "plan.json", json.dumps(values, indent=1, sort_keys=True).encode() + b"\n")
    plan = load_plan(out, sources=sources, spec=spec, tools=tools)
    assert plan is not None
    return plan


def _inputs(sources: Sequence[InputFile], spec: Spec, tools: dict[str, str]) -> dict[str, Any]:
    listing = [(s.name, s.labels, s.group, s.split, s.start_s, s.end_s) for s in sources]
    return {
        "format": 1,
        "spec": spec.model_dump(mode="json"),
        "tools": tools,
        "sources": hashlib.sha256(canonical_json(listing)).hexdigest(),
    }


def load_plan(out: Path, *, sources: Sequence[InputFile], spec: Spec, tools: dict[str, str]) -> BuildPlan | None:
    """Read the plan of a build that was begun, or None if there is no plan.

    Raises:
        BadInput: the plan was made from other sources, with another spec or by other tools.
    """
    path = out / "plan" / "plan.json"
    if not path.exists():
        return None
    values = json.loads(path.read_bytes())
    for name, wanted in _inputs(sources, spec, tools).items():
        if values.get(name) != wanted:
            hint = ". Put additional videos into a corpus of their own and mix them with `vjepa merge`"
            raise BadInput(
                f"{out} holds a build with different {name}{_first_difference(values.get(name), wanted)}; "
                f"give another --out or remove that folder{hint if name == 'sources' else ''}"
            )
    clips, rejects = (pq.read_table(out / "plan" / f"{name}.parquet").to_pylist() for name in ("clips", "rejects"))
    names = [f.name for f in fields(PlannedClip) if not clips or f.name in clips[0]]  # older plans lack some
    shards: list[ShardPlan] = []
    counts: dict[str, int] = {}
    groups: dict[int, list[PlannedClip]] = {}
    for row in clips:
        groups.setdefault(row["shard"], []).append(PlannedClip(**{name: row[name] for name in names}))
    for number, members in sorted(groups.items()):
        split = members[0].split
        count = counts[split] = counts.get(split, -1) + 1
        shards.append(ShardPlan(number, f"shards/{spec.name}-{split}-{count:06d}.tar", split, tuple(members)))
    return BuildPlan(
        hash=hashlib.sha256(path.read_bytes()).hexdigest(),
        shards=tuple(shards),
        rejects=tuple(RejectRecord(**reject) for reject in rejects),
    )


def _first_difference(found: Any, wanted: Any, prefix: str = "") -> str:
    """Describe the first value that differs between two mappings, for a message."""
    if not isinstance(found, dict) or not isinstance(wanted, dict):
        return f" ({prefix} was {found!r}, now {wanted!r})" if prefix else ""
    name = next((name for name in wanted if found.get(name) != wanted[name]), None)
    return _first_difference(found.get(name), wanted[name], f"{prefix}.{name}".lstrip(".")) if name else ""
