"""What a build would do and cost: everything is looked at, a few clips are encoded, nothing is written."""

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
from vjepa_data.builder.select import choose, look_at
from vjepa_data.builder.shard import show_progress
from vjepa_data.builder.status import counted, lasting, size
from vjepa_data.builder.write import store_task
from vjepa_data.media.pool import WorkerPool
from vjepa_data.media.video import Refused
from vjepa_data.spec import Spec

TRIALS = 12
"""Clips that are encoded to learn what one costs."""


@dataclass(frozen=True)
class Survey:
    """What `shard` would make of the same sources and spec."""

    sources: int
    clips: int
    hours: float
    """Of video."""
    shards: int
    splits: dict[str, int]
    """Clips of each."""
    rejects: dict[str, int]
    """Refused sources by reason; more may be refused when they are encoded."""
    bytes_in: int
    """Of the files that the clips come from."""
    trials: int
    """Clips that were encoded for the two estimates below; 0 if all of them failed."""
    bytes_out: float
    core_hours: float
    """On this machine's cores, encoding and checking."""

    def lines(self) -> list[str]:
        """For a reader."""
        refused = ", ".join(f"{count} {reason}" for reason, count in self.rejects.items()) or "none"
        return [
            f"{self.sources} sources, {sum(self.rejects.values())} refused: {refused}",
            f"{self.clips} clips, {lasting(3600 * self.hours)}, {size(self.bytes_in)} to read",
            ", ".join(f"{count} clips in {split}" for split, count in self.splits.items())
            + f"; {counted(self.shards, 'shard')}, about {size(self.bytes_out)} to write",
            f"about {lasting(3600 * self.core_hours)} of one core like these, judged by {self.trials} clips",
        ]


def survey(
    sources: Sequence[str], *, spec: Spec, workers: int, out: Path | None = None, console: Console | None = None
) -> Survey:
    """Say what a build would do, without writing anything.

    Args:
        sources, spec, workers, out, console: as for `shard`.

    Raises:
        BadInput: as for `shard`, except that it is no error if nothing would be left.
    """
    found = ingest(sources, spec=spec, out=out)
    with (
        show_progress(console) as progress,
        WorkerPool[Any, Any]("vjepa_data.media.tasks", workers=workers, timeout_s=spec.timeout_s) as pool,
    ):
        bar = progress.add_task("looking at sources", total=len(found), note="")
        looks = look_at(found, None, spec=spec, pool=pool, start=0.0, advance=lambda n: progress.advance(bar, n))
        clips, rejects = choose(found, looks, spec=spec)
        trials = random.Random(0).sample(clips, min(TRIALS, len(clips)))
        places = {source.name: source.place for source in found}
        tasks = [store_task(clip, 0, number, places[clip.source], spec) for number, clip in enumerate(trials)]
        bar = progress.add_task("trying a few clips", total=len(tasks), note="")
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
