"""Estimate the result and cost of a build: analyze all sources and encode a few clips, but write nothing."""

import functools
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vjepa_data.builder.ingest import ingest
from vjepa_data.builder.pack import pack
from vjepa_data.builder.select import analyze_sources, select_clips
from vjepa_data.builder.shard import show_progress
from vjepa_data.builder.status import format_bytes, format_count, format_duration
from vjepa_data.builder.write import store_task
from vjepa_data.media.pool import WorkerPool
from vjepa_data.media.video import Refused
from vjepa_data.spec import Spec

TRIALS = 12
"""Clips that are encoded to estimate the cost."""


@dataclass(frozen=True)
class Survey:
    """Expected result of `shard` for the same sources and spec."""

    sources: int
    clips: int
    hours: float
    """Hours of video."""
    shards: int
    splits: dict[str, int]
    """Clips per split."""
    rejects: dict[str, int]
    """Rejected sources by reason. Encoding may reject more."""
    bytes_in: int
    """Size of the source files of all clips."""
    trials: int
    """Clips that were encoded for the two estimates below, or 0 if all of them failed."""
    bytes_out: float
    core_hours: float
    """Encoding and checking, on one core of this machine."""

    def lines(self) -> list[str]:
        """Return the survey as lines of text."""
        rejected = ", ".join(f"{count} {reason}" for reason, count in self.rejects.items()) or "none"
        splits = ", ".join(f"{count} clips in {split}" for split, count in self.splits.items())
        return [
            f"{self.sources} sources, {sum(self.rejects.values())} rejected: {rejected}",
            f"{self.clips} clips, {format_duration(3600 * self.hours)}, {format_bytes(self.bytes_in)} to read",
            f"{splits}, {format_count(self.shards, 'shard')}, about {format_bytes(self.bytes_out)} to write",
            f"about {format_duration(3600 * self.core_hours)} on one core of this machine, "
            f"estimated from {format_count(self.trials, 'clip')}",
        ]


def survey(
    sources: Sequence[str], *, spec: Spec, workers: int, out: Path | None = None, console: Console | None = None
) -> Survey:
    """Estimate the result and cost of a build without writing anything.

    Args:
        sources, spec, workers, out, console: as for `shard`.

    Raises:
        BadInput: as for `shard`, except that rejecting every source is not an error.
    """
    found = ingest(sources, spec=spec, out=out)
    with (
        show_progress(console) as progress,
        WorkerPool[Any, Any]("vjepa_data.media.tasks", workers=workers, timeout_s=spec.timeout_s) as pool,
    ):
        bar = progress.add_task("analyzing sources", total=len(found), note="")
        advance = functools.partial(progress.advance, bar)
        analyses = analyze_sources(found, None, spec=spec, pool=pool, start=0.0, advance=advance)
        clips, rejects = select_clips(found, analyses, spec=spec)
        trials = random.Random(0).sample(clips, min(TRIALS, len(clips)))
        files = {source.name: source.file for source in found}
        tasks = [store_task(clip, 0, number, files[clip.source], spec) for number, clip in enumerate(trials)]
        bar = progress.add_task("encoding a few clips", total=len(tasks), note="")
        stored = cpu_s = seconds = 0.0
        tried = 0
        for task, answer in pool.map(tasks):
            progress.advance(bar, 1)
            if not isinstance(answer, Refused):
                tried += 1
                stored += len(answer.clip.data)
                cpu_s += answer.encode_s + answer.check_s
                seconds += max(trials[task.position].seconds, 1e-6 if spec.media == "videos" else 1.0)
    total_s = sum(clip.seconds for clip in clips)
    scale = (total_s if spec.media == "videos" else len(clips)) / seconds if seconds else 0.0
    originals = {clip.source: json.loads(clip.original)["bytes"] for clip in clips}
    return Survey(
        sources=len(found),
        clips=len(clips),
        hours=total_s / 3600,
        shards=len({number for number, _ in pack(clips, spec=spec)}),
        splits=dict(Counter(clip.split for clip in clips)),
        rejects=dict(Counter(str(reject.reason) for reject in rejects)),
        bytes_in=sum(originals.values()),
        trials=tried,
        bytes_out=stored * scale,
        core_hours=cpu_s * scale / 3600,
    )
