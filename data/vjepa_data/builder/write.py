"""Stage 4 of a build: encode and check clips in worker processes, and write shards one at a time."""

import contextlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from vjepa_data.atomic import is_claimed, remove_leftovers, remove_own
from vjepa_data.builder.pack import BuildPlan, ShardPlan
from vjepa_data.builder.select import PlannedClip, info_from_json
from vjepa_data.builder.signals import SidecarParts, with_sidecars
from vjepa_data.builder.status import Tally
from vjepa_data.corpus.format import RejectRecord, SampleRecord, ShardWriter, read_record
from vjepa_data.corpus.parts import MEMBER
from vjepa_data.media.fetch import FileRef
from vjepa_data.media.pool import WorkerPool
from vjepa_data.media.tasks import StoredSample, StoreTask
from vjepa_data.media.transcode import PictureBox
from vjepa_data.media.video import Refused
from vjepa_data.spec import Spec

CANONICAL = {"codec": "h264", "pixel_format": "yuv420p"}

POLL_S = 1.0
"""Interval at which to check for shards that other builders are still writing, in seconds."""


def write_shards(
    out: Path,
    plan: BuildPlan,
    *,
    files: Mapping[str, FileRef],
    spec: Spec,
    pool: WorkerPool[StoreTask, StoredSample],
    start: float,
    advance: Callable[[Tally], None],
) -> None:
    """Write the missing shards of a plan, and return when all shards exist, including the shards of other builders.

    Args:
        out: folder of the corpus.
        plan: the saved plan.
        files: current location of each source, by name.
        spec: how to encode.
        pool: processes that encode.
        start: fraction of the shards at which to begin, so that concurrent builders begin at different shards.
        advance: called after each clip with the totals of this builder.
    """
    (out / "shards").mkdir(exist_ok=True)
    first = int(start * len(plan.shards))
    missing = [*plan.shards[first:], *plan.shards[:first]]
    writers: dict[int, ShardWriter] = {}
    commits: deque[Future[None]] = deque()
    tally = Tally()
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(remove_own, out / "shards")
        # Syncing a shard to disk takes seconds, during which idle workers must get new tasks.
        committer = cleanup.enter_context(ThreadPoolExecutor(1))
        try:
            while missing := [s for s in missing if read_record(out, s.number, plan=plan.hash) is None]:
                free = [shard for shard in missing if not is_claimed(out / shard.file)]
                if not free:
                    time.sleep(POLL_S)
                    remove_leftovers(out / "shards")
                for task, answer in pool.map(_tasks(out, plan, free, writers, files, spec)):
                    shard = plan.shards[task.shard]
                    clip = shard.clips[task.position]
                    span = {"original": clip.original, "start_s": clip.start_s, "seconds": clip.seconds}
                    answer, sidecars = with_sidecars(answer, files[clip.source], spec, **span)
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
    files: Mapping[str, FileRef],
    spec: Spec,
) -> Iterator[StoreTask]:
    """Yield the clips of each shard that is still missing and unclaimed. Opening its writer claims the shard."""
    for shard in shards:
        if read_record(out, shard.number, plan=plan.hash) is not None or is_claimed(out / shard.file):
            continue
        writers[shard.number] = ShardWriter(out, number=shard.number, file=shard.file, split=shard.split)
        for position, clip in enumerate(shard.clips):
            yield store_task(clip, shard.number, position, files[clip.source], spec)


def store_task(clip: PlannedClip, shard: int, position: int, file: FileRef, spec: Spec) -> StoreTask:
    """Return the task of storing a clip."""
    original = json.loads(clip.original)
    return StoreTask(
        shard=shard,
        position=position,
        file=file,
        bytes=original["bytes"],
        media=spec.media,
        start_s=clip.start_s,
        end_s=clip.end_s,
        box=PictureBox(**original["box"]) if "box" in original else None,
        encode=spec.encode,
        accept=spec.filter,
        may_copy=spec.mode == "copy",
        info=info_from_json(json.loads(clip.probe)) if clip.probe else None,
        has_parts=spec.cut.part_s is not None,
    )


def _store(
    writer: ShardWriter, clip: PlannedClip, answer: StoredSample | Refused, tally: Tally, sidecars: SidecarParts
) -> None:
    tally.clips += 1
    if isinstance(answer, Refused):
        writer.refuse(RejectRecord(clip.source, clip.start_s, clip.end_s, "store", answer.reason, answer.detail))
        tally.rejects[answer.reason] = tally.rejects.get(answer.reason, 0) + 1
        return
    facts = {**sample_facts(clip, answer), **sidecars.facts}
    members = {MEMBER: answer.gops, **sidecars.members} if answer.gops else sidecars.members
    sample = SampleRecord(clip.key, answer.clip.data, _suffix(clip), facts, members, sidecars.derived)
    writer.write(sample)
    tally.bytes += len(sample.video)
    tally.video_s += sample.facts["stored"]["duration_s"]
    tally.encode_s += answer.encode_s
    tally.check_s += answer.check_s


def _suffix(clip: PlannedClip) -> str:
    return "jpg" if _is_image(json.loads(clip.original)) else "mp4"


def _is_image(original: Mapping[str, Any]) -> bool:
    return original["frames"] == 1 and original["duration_s"] == 0


def sample_facts(clip: PlannedClip, done: StoredSample) -> dict[str, Any]:
    """Return the JSON of a sample."""
    stored = done.clip.stored
    original = json.loads(clip.original)
    form = {"codec": "jpeg", "pixel_format": "yuv444p"} if _is_image(original) else CANONICAL
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
            "duration_s": 0.0 if _is_image(original) else round(stored.frames / stored.fps, 6),
            "bytes": len(done.clip.data),
            "xxh64": xxhash.xxh64_hexdigest(done.clip.data),
        },
    }
