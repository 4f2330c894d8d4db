"""How far a build is, on however many machines: each builder keeps a small file in OUT/status.

A builder that is task K of N of an array has one file for all its attempts; what it did before it was requeued counts.
"""

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from vjepa_data.atomic import atomic_write
from vjepa_data.builder.select import CHUNK
from vjepa_data.settings import BadInput

EVERY_S = 5.0
"""How often a builder writes down what it did."""

SILENT_S = 60.0
"""After so long without a word a builder no longer counts as being at work."""


@dataclass
class Tally:
    """What one builder did; no part of the corpus."""

    clips: int = 0
    bytes: int = 0
    video_s: float = 0.0
    encode_s: float = 0.0
    check_s: float = 0.0
    rejects: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class BuilderStatus:
    """What one builder says of itself."""

    builder: str
    """Task of an array, or host, process number and time."""
    sources: int
    """That it was given."""
    updated: float
    """Unix time in seconds."""
    clips_per_s: float
    """Since it was started the last time."""
    is_done: bool
    """It found the corpus complete."""
    tally: Tally

    @property
    def is_at_work(self) -> bool:
        return not self.is_done and time.time() - self.updated < SILENT_S


@dataclass(frozen=True)
class BuildStatus:
    """What a build has done so far."""

    stage: str
    """`looking`, `writing` or `complete`."""
    sources: int
    sources_seen: int
    """Sources, and those of them that were looked at and written down."""
    shards: int
    shards_done: int
    clips: int
    clips_done: int
    """Clips in the plan, and in shards that are done."""
    bytes_done: int
    rejects: dict[str, int]
    """Of shards that are done, by reason."""
    builders: tuple[BuilderStatus, ...]
    """All that ever were."""

    @property
    def clips_per_s(self) -> float:
        return sum(builder.clips_per_s for builder in self.builders if builder.is_at_work)

    @property
    def left_s(self) -> float | None:
        return (self.clips - self.clips_done) / self.clips_per_s if self.clips_per_s else None

    def text(self) -> str:
        """For a reader."""
        if self.stage == "looking":
            lines = [f"looking: {self.sources_seen} of {self.sources} sources"]
        else:
            left = f", {self.left_s / 60:.0f} min left" if self.left_s is not None and self.stage == "writing" else ""
            lines = [
                f"{self.stage}: {self.shards_done} of {self.shards} shards, {self.clips_done} of {self.clips} clips, "
                f"{size(self.bytes_done)}" + (f"; {self.clips_per_s:.1f} clips/s{left}" if self.clips_per_s else "")
            ]
        lines += [f"  refused {count}: {reason}" for reason, count in sorted(self.rejects.items())]
        for one in self.builders:
            state = "done" if one.is_done else f"last heard of {time.time() - one.updated:.0f} s ago"
            lines.append(f"  {one.builder}: {counted(one.tally.clips, 'clip')}, {size(one.tally.bytes)}, {state}")
        return "\n".join(lines)


class StatusFile:
    """Writes down what this builder did, from time to time.

    Args:
        out: the corpus's folder.
        sources: how many this builder was given.
        task: K and N, for task K of an array of N.
    """

    def __init__(self, out: Path, *, sources: int, task: tuple[int, int] | None) -> None:
        (out / "status").mkdir(exist_ok=True)
        self._started, self._written, self._sources = time.time(), 0.0, sources
        # With the time: a second build in one process must not take the place of the first.
        lone = f"{socket.gethostname()}-{os.getpid()}-{self._started:.3f}"
        self._builder = lone if task is None else f"task {task[0]} of {task[1]}"
        self._path = out / "status" / (f"{lone}.json" if task is None else f"task-{task[0]:05d}-of-{task[1]:05d}.json")
        self._before = (_read(self._path),) if self._path.exists() else ()
        self.update(Tally(), is_forced=True)

    def update(self, tally: Tally, *, is_done: bool = False, is_forced: bool = False) -> None:
        now = time.time()
        if not (is_done or is_forced or now - self._written >= EVERY_S):
            return
        self._written = now
        rate = tally.clips / max(1.0, now - self._started)
        whole = total([*(before.tally for before in self._before), tally])
        status = BuilderStatus(self._builder, self._sources, now, rate, is_done, whole)
        atomic_write(self._path, json.dumps(asdict(status), sort_keys=True).encode() + b"\n", durable=False)


def read_builders(out: Path) -> tuple[BuilderStatus, ...]:
    return tuple(_read(path) for path in sorted((out / "status").glob("*.json")))


def _read(path: Path) -> BuilderStatus:
    try:
        values = json.loads(path.read_bytes())
        return BuilderStatus(**{**values, "tally": Tally(**values["tally"])})
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{path}: not what this version writes there; delete it, it only tells of the past") from None


def total(tallies: Sequence[Tally]) -> Tally:
    """What several builders did together, what was done twice counted twice."""
    rejects = sum((Counter(tally.rejects) for tally in tallies), Counter())
    return Tally(
        clips=sum(tally.clips for tally in tallies),
        bytes=sum(tally.bytes for tally in tallies),
        video_s=sum(tally.video_s for tally in tallies),
        encode_s=sum(tally.encode_s for tally in tallies),
        check_s=sum(tally.check_s for tally in tallies),
        rejects=dict(rejects),
    )


def refusals(out: Path) -> dict[str, int]:
    """How many sources and clips a build that is complete refused, by reason."""
    reasons = pq.read_table(out / "rejects.parquet", columns=["reason"])["reason"].to_pylist()
    return dict(sorted(Counter(reasons).items()))


def size(count: float) -> str:
    """Bytes for a reader."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def lasting(seconds: float) -> str:
    """A time for a reader."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"


def counted(count: int, thing: str) -> str:
    """So many of a thing."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def status(out: Path) -> BuildStatus:
    """Say how far the build in a folder is, from its files alone.

    Raises:
        BadInput: no build was begun there.
    """
    builders = read_builders(out) if out.is_dir() else ()
    plan = out / "plan" / "plan.json"
    sources = max((builder.sources for builder in builders), default=0)
    if not plan.exists():
        if not builders:
            raise BadInput(f"{out}: no build was begun there; give the --out of a `vjepa shard`")
        seen = min(sources, CHUNK * len(list((out / "plan").glob("seen-*.json"))))
        return BuildStatus("looking", sources, seen, 0, 0, 0, 0, 0, {}, builders)
    counts = json.loads(plan.read_bytes())["shard_clips"]
    rejects: Counter[str] = Counter()
    done = clips = size = 0
    for number, expected in enumerate(counts):
        path = out / "shards" / f"{number:06d}.json"
        if path.exists():
            record = json.loads(path.read_bytes())
            done, clips, size = done + 1, clips + expected, size + record["bytes"]
            rejects.update(reject["reason"] for reject in record["rejects"])
    stage = "complete" if (out / "manifest.json").exists() else "writing"
    return BuildStatus(stage, sources, sources, len(counts), done, sum(counts), clips, size, dict(rejects), builders)
