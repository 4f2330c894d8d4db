"""Progress of a build on any number of machines: each builder keeps a small file in OUT/status.

Task K of an array of N has one file for all its attempts, so that work before a requeue counts.
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
"""Interval at which a builder updates its file, in seconds."""

SILENT_S = 60.0
"""Seconds without an update after which a builder no longer counts as active."""


@dataclass
class Tally:
    """Work done by a builder. Not a part of the corpus."""

    clips: int = 0
    bytes: int = 0
    video_s: float = 0.0
    encode_s: float = 0.0
    check_s: float = 0.0
    rejects: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class BuilderStatus:
    """Last update of a builder."""

    builder: str
    """Task of an array, or else host, process id and time."""
    sources: int
    """Number of sources given to the builder."""
    updated: float
    """Unix time in seconds."""
    clips_per_s: float
    """Average since the last start."""
    is_done: bool
    """The builder found the corpus complete."""
    tally: Tally

    @property
    def is_active(self) -> bool:
        return not self.is_done and time.time() - self.updated < SILENT_S


@dataclass(frozen=True)
class BuildStatus:
    """Progress of a build."""

    stage: str
    """`analyzing`, `writing` or `complete`."""
    sources: int
    sources_done: int
    """Sources whose analysis is stored."""
    shards: int
    shards_done: int
    clips: int
    """Clips in the plan."""
    clips_done: int
    """Clips in finished shards."""
    bytes_done: int
    rejects: dict[str, int]
    """Rejected clips of finished shards, by reason."""
    builders: tuple[BuilderStatus, ...]
    """All builders that ever worked on the corpus."""

    @property
    def clips_per_s(self) -> float:
        return sum(builder.clips_per_s for builder in self.builders if builder.is_active)

    @property
    def left_s(self) -> float | None:
        return (self.clips - self.clips_done) / self.clips_per_s if self.clips_per_s else None

    def text(self) -> str:
        """Return the progress as text."""
        if self.stage == "analyzing":
            lines = [f"analyzing: {self.sources_done} of {self.sources} sources"]
        else:
            left = f", {self.left_s / 60:.0f} min left" if self.left_s is not None and self.stage == "writing" else ""
            lines = [
                f"{self.stage}: {self.shards_done} of {self.shards} shards, {self.clips_done} of {self.clips} clips, "
                + format_bytes(self.bytes_done)
                + (f", {self.clips_per_s:.1f} clips/s{left}" if self.clips_per_s else "")
            ]
        lines += [f"  rejected {count}: {reason}" for reason, count in sorted(self.rejects.items())]
        for builder in self.builders:
            state = "done" if builder.is_done else f"last update {time.time() - builder.updated:.0f} s ago"
            work = f"{format_count(builder.tally.clips, 'clip')}, {format_bytes(builder.tally.bytes)}"
            lines.append(f"  {builder.builder}: {work}, {state}")
        return "\n".join(lines)


class StatusFile:
    """Status file of this builder, updated every few seconds.

    Args:
        out: folder of the corpus.
        sources: number of sources given to this builder.
        task: K and N, for task K of an array of N.
    """

    def __init__(self, out: Path, *, sources: int, task: tuple[int, int] | None) -> None:
        (out / "status").mkdir(exist_ok=True)
        self._started, self._written, self._sources = time.time(), 0.0, sources
        # The time keeps two builds in the same process apart.
        name = f"{socket.gethostname()}-{os.getpid()}-{self._started:.3f}"
        self._builder = name if task is None else f"task {task[0]} of {task[1]}"
        self._path = out / "status" / (f"{name}.json" if task is None else f"task-{task[0]:05d}-of-{task[1]:05d}.json")
        self._before = (_read(self._path),) if self._path.exists() else ()
        self.update(Tally(), is_forced=True)

    def update(self, tally: Tally, *, is_done: bool = False, is_forced: bool = False) -> None:
        now = time.time()
        if not (is_done or is_forced or now - self._written >= EVERY_S):
            return
        self._written = now
        rate = tally.clips / max(1.0, now - self._started)
        total = sum_tallies([*(before.tally for before in self._before), tally])
        status = BuilderStatus(self._builder, self._sources, now, rate, is_done, total)
        atomic_write(self._path, json.dumps(asdict(status), sort_keys=True).encode() + b"\n", durable=False)


def read_builders(out: Path) -> tuple[BuilderStatus, ...]:
    return tuple(_read(path) for path in sorted((out / "status").glob("*.json")))


def _read(path: Path) -> BuilderStatus:
    try:
        values = json.loads(path.read_bytes())
        return BuilderStatus(**{**values, "tally": Tally(**values["tally"])})
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{path}: unknown format of a status file; delete it (it only holds statistics)") from None


def sum_tallies(tallies: Sequence[Tally]) -> Tally:
    """Add the work of several builders. Work that was done twice counts twice."""
    rejects = sum((Counter(tally.rejects) for tally in tallies), Counter())
    return Tally(
        clips=sum(tally.clips for tally in tallies),
        bytes=sum(tally.bytes for tally in tallies),
        video_s=sum(tally.video_s for tally in tallies),
        encode_s=sum(tally.encode_s for tally in tallies),
        check_s=sum(tally.check_s for tally in tallies),
        rejects=dict(rejects),
    )


def count_rejects(out: Path) -> dict[str, int]:
    """Count the rejected sources and clips of a complete build, by reason."""
    reasons = pq.read_table(out / "rejects.parquet", columns=["reason"])["reason"].to_pylist()
    return dict(sorted(Counter(reasons).items()))


def format_bytes(count: float) -> str:
    """Format a number of bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_duration(seconds: float) -> str:
    """Format a time span."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"


def format_count(count: int, thing: str) -> str:
    """Format a number of things."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def read_status(out: Path) -> BuildStatus:
    """Read the progress of the build in a folder from its files.

    Raises:
        BadInput: there is no build in the folder.
    """
    builders = read_builders(out) if out.is_dir() else ()
    plan = out / "plan" / "plan.json"
    sources = max((builder.sources for builder in builders), default=0)
    if not plan.exists():
        if not builders:
            raise BadInput(f"{out} holds no build; give the --out of a `vjepa shard` command")
        analyzed = min(sources, CHUNK * len(list((out / "plan").glob("seen-*.json"))))
        return BuildStatus("analyzing", sources, analyzed, 0, 0, 0, 0, 0, {}, builders)
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
