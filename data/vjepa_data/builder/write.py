"""Encode, check, store: shards are written one by one, their clips by as many children as there are workers."""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from vjepa_data.atomic import is_claimed, remove_leftovers
from vjepa_data.builder.pack import BuildPlan, ShardPlan
from vjepa_data.builder.select import Cutting
from vjepa_data.builder.signals import SidecarParts, with_sidecars
from vjepa_data.builder.status import Tally
from vjepa_data.corpus.format import RejectRecord, SampleRecord, ShardWriter, read_record
from vjepa_data.media.fetch import FileRef
from vjepa_data.media.pool import WorkerPool
from vjepa_data.media.tasks import StoredSample, StoreTask
from vjepa_data.media.transcode import PictureBox
from vjepa_data.media.video import Refused
from vjepa_data.spec import Spec

PATIENCE_S = 1.0
"""How often to look whether other builders have finished what only they still write."""


def write_shards(
    out: Path,
    plan: BuildPlan,
    *,
    places: Mapping[str, FileRef],
    spec: Spec,
    pool: WorkerPool[StoreTask, StoredSample],
    start: float,
    advance: Callable[[Tally], None],
) -> None:
    """Write those shards of a plan that are not there yet; return when all are, whoever wrote them.

    Args:
        out: the corpus's folder.
        plan: the frozen plan.
        places: where each source is now, by name.
        spec: how to encode.
        pool: processes that encode.
        start: at which of the shards to begin, as a share of them, so that several builders begin apart.
        advance: called after each clip with all that was done here so far.
    """
    (out / "shards").mkdir(exist_ok=True)
    turn = int(start * len(plan.shards))
    missing = [*plan.shards[turn:], *plan.shards[:turn]]
    writers: dict[int, ShardWriter] = {}
    commits: deque[Future[None]] = deque()
    tally = Tally()
    # Forcing a shard to the disk takes seconds, in which children that are done must find new work.
    with ThreadPoolExecutor(1) as committer:
        try:
            while missing := [s for s in missing if read_record(out, s.number, plan=plan.hash) is None]:
                free = [shard for shard in missing if not is_claimed(out / shard.file)]
                if not free:
                    time.sleep(PATIENCE_S)
                    remove_leftovers(out / "shards")
                for task, answer in pool.map(_tasks(out, plan, free, writers, places, spec)):
                    shard = plan.shards[task.shard]
                    clip = shard.clips[task.position]
                    span = {"original": clip.original, "start_s": clip.start_s, "seconds": clip.seconds}
                    answer, sidecars = with_sidecars(answer, places[clip.source], spec, **span)
                    _store(writers[shard.number], clip, answer, tally, sidecars)
                    advance(tally)
                    if task.position == len(shard.clips) - 1:
                        commits.append(committer.submit(_commit, writers.pop(shard.number), plan.hash))
                    while commits and commits[0].done():
                        commits.popleft().result()
                while commits:
                    commits.popleft().result()
        finally:
            for writer in writers.values():
                writer.abandon()


def _commit(writer: ShardWriter, plan: str) -> None:
    try:
        writer.commit(plan=plan)
    finally:
        writer.abandon()


def _tasks(
    out: Path,
    plan: BuildPlan,
    shards: Sequence[ShardPlan],
    writers: dict[int, ShardWriter],
    places: Mapping[str, FileRef],
    spec: Spec,
) -> Iterator[StoreTask]:
    """The clips of each shard that nobody wrote or claimed meanwhile; its writer is opened, which is our claim."""
    for shard in shards:
        if read_record(out, shard.number, plan=plan.hash) is not None or is_claimed(out / shard.file):
            continue
        writers[shard.number] = ShardWriter(out, number=shard.number, file=shard.file, split=shard.split)
        for position, clip in enumerate(shard.clips):
            yield store_task(clip, shard.number, position, places[clip.source], spec)


def store_task(clip: Cutting, shard: int, position: int, place: FileRef, spec: Spec) -> StoreTask:
    """What a child must know to store a clip."""
    original = json.loads(clip.original)
    return StoreTask(
        shard=shard,
        position=position,
        place=place,
        bytes=original["bytes"],
        media=spec.media,
        start_s=clip.start_s,
        end_s=clip.end_s,
        box=PictureBox(**original["box"]) if "box" in original else None,
        encode=spec.encode,
        accept=spec.filter,
        may_copy=spec.mode == "copy",
    )


def _store(
    writer: ShardWriter, clip: Cutting, answer: StoredSample | Refused, tally: Tally, sidecars: SidecarParts
) -> None:
    tally.clips += 1
    if isinstance(answer, Refused):
        writer.refuse(RejectRecord(clip.source, clip.start_s, clip.end_s, "store", answer.reason, answer.detail))
        tally.rejects[answer.reason] = tally.rejects.get(answer.reason, 0) + 1
        return
    facts = {**sample_facts(clip, answer), **sidecars.facts}
    sample = SampleRecord(clip.key, answer.clip.data, _suffix(clip), facts, sidecars.members)
    writer.write(sample)
    tally.bytes += len(sample.video)
    tally.video_s += sample.facts["stored"]["duration_s"]
    tally.encode_s += answer.encode_s
    tally.check_s += answer.check_s


def _suffix(clip: Cutting) -> str:
    return "jpg" if is_image(json.loads(clip.original)) else "mp4"


def is_image(original: Mapping[str, Any]) -> bool:
    return original["frames"] == 1 and original["duration_s"] == 0


def sample_facts(clip: Cutting, done: StoredSample) -> dict[str, Any]:
    """The JSON of a sample."""
    stored = done.clip.stored
    original = json.loads(clip.original)
    form = {"codec": "jpeg", "pixel_format": "yuv444p"} if is_image(original) else CANONICAL
    return {
        "key": clip.key,
        "source": clip.source,
        "start_s": clip.start_s or 0.0,
        "end_s": round((clip.start_s or 0.0) + clip.seconds, 6),
        "group": clip.group,
        "split": clip.split,
        "labels": json.loads(clip.labels),
        "original": original,
        "stored": {
            **form,
            "is_copy": done.is_copy,
            "frames": stored.frames,
            "fps": stored.fps,
            "width": stored.width,
            "height": stored.height,
            "duration_s": 0.0 if is_image(original) else round(stored.frames / stored.fps, 6),
            "bytes": len(done.clip.data),
            "xxh64": xxhash.xxh64_hexdigest(done.clip.data),
        },
    }


CANONICAL = {"codec": "h264", "pixel_format": "yuv420p"}
