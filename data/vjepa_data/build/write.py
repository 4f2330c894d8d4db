"""Encode, check, store: shards are written one by one, their clips by as many children as there are workers."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from vjepa_data.build.pack import BuildPlan, ShardPlan
from vjepa_data.build.select import Cutting
from vjepa_data.pool import Pool
from vjepa_data.shards import Reject, Sample, ShardWriter, read_record
from vjepa_data.spec import Spec
from vjepa_data.video import Refused
from vjepa_data.work import Done, Store


@dataclass
class Tally:
    """What this builder did, for progress and report; no part of the corpus."""

    clips: int = 0
    bytes: int = 0
    video_s: float = 0.0
    encode_s: float = 0.0
    check_s: float = 0.0
    rejects: dict[str, int] = field(default_factory=dict)


def write_shards(
    out: Path,
    plan: BuildPlan,
    shards: Sequence[ShardPlan],
    *,
    paths: dict[str, str],
    spec: Spec,
    pool: Pool[Store, Done],
    advance: Callable[[Tally], None],
) -> Tally:
    """Write those of the shards that are not there yet.

    Args:
        out: the corpus's folder.
        plan: the frozen plan.
        shards: this builder's part of it.
        paths: where each source is now, by name.
        spec: how to encode.
        pool: processes that encode.
        advance: called after each clip with all that was done so far.

    Returns:
        What was done here.
    """
    (out / "shards").mkdir(exist_ok=True)
    by_number = {shard.number: shard for shard in shards}
    tally = Tally()
    writer: ShardWriter | None = None
    rejects: list[Reject] = []
    try:
        for task, answer in pool.map(_tasks(out, plan, shards, paths, spec)):
            shard = by_number[task.shard]
            clip = shard.clips[task.position]
            if writer is None:
                writer = ShardWriter(out, number=shard.number, file=shard.file, split=shard.split)
                rejects = []
            if isinstance(answer, Refused):
                rejects.append(Reject(clip.source, clip.start_s, clip.end_s, "store", answer.reason, answer.detail))
                tally.rejects[answer.reason] = tally.rejects.get(answer.reason, 0) + 1
            else:
                sample = Sample(clip.key, answer.clip.data, "mp4", sample_facts(clip, answer))
                writer.write(sample)
                tally.bytes += len(sample.video)
                tally.video_s += sample.facts["stored"]["duration_s"]
                tally.encode_s += answer.encode_s
                tally.check_s += answer.check_s
            tally.clips += 1
            advance(tally)
            if task.position == len(shard.clips) - 1:
                writer.commit(rejects, plan=plan.hash)
                writer = None
    finally:
        if writer is not None:
            writer.abandon()
    return tally


def _tasks(
    out: Path, plan: BuildPlan, shards: Sequence[ShardPlan], paths: dict[str, str], spec: Spec
) -> Iterator[Store]:
    """The clips of each shard that is missing. Looked up late, since another builder may have written it meanwhile."""
    for shard in shards:
        if read_record(out, shard.number, plan=plan.hash) is not None:
            continue
        for position, clip in enumerate(shard.clips):
            yield Store(
                shard=shard.number,
                position=position,
                path=paths[clip.source],
                start_s=clip.start_s,
                end_s=clip.end_s,
                encode=spec.encode,
                accept=spec.filter,
                may_copy=spec.mode == "copy",
            )


def sample_facts(clip: Cutting, done: Done) -> dict[str, Any]:
    """The JSON of a sample."""
    stored = done.clip.stored
    return {
        "key": clip.key,
        "source": clip.source,
        "start_s": clip.start_s or 0.0,
        "end_s": round((clip.start_s or 0.0) + clip.seconds, 6),
        "group": clip.group,
        "split": clip.split,
        "labels": json.loads(clip.labels),
        "original": json.loads(clip.original),
        "stored": {
            "codec": "h264",
            "pixel_format": "yuv420p",
            "is_copy": done.is_copy,
            "frames": stored.frames,
            "fps": stored.fps,
            "width": stored.width,
            "height": stored.height,
            "duration_s": round(stored.frames / stored.fps, 6),
            "bytes": len(done.clip.data),
            "xxh64": xxhash.xxh64_hexdigest(done.clip.data),
        },
    }
