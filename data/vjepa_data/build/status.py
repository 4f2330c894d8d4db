"""How far a build is, on however many machines: each builder keeps a small file in OUT/status."""

import json
import os
import socket
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vjepa_data.settings import BadInput
from vjepa_data.shards import write_whole

EVERY_S = 5.0
"""How often a builder writes down what it did."""


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
    """Host and process number."""
    started: float
    updated: float
    """Unix time in seconds."""
    tally: Tally


@dataclass(frozen=True)
class Status:
    """What a build has done so far."""

    stage: str
    """`looking`, `writing` or `complete`."""
    shards: int
    shards_done: int
    clips: int
    """Clips in the plan, and in shards that are done."""
    clips_done: int
    bytes_done: int
    rejects: dict[str, int]
    builders: tuple[BuilderStatus, ...]
    """All that ever were, by age."""

    @property
    def clips_per_s(self) -> float:
        """Rate of the builders that wrote within the last minute."""
        now = time.time()
        alive = [b for b in self.builders if now - b.updated < 60]
        return sum(b.tally.clips / max(1.0, b.updated - b.started) for b in alive)

    @property
    def left_s(self) -> float | None:
        return (self.clips - self.clips_done) / self.clips_per_s if self.clips_per_s else None

    def text(self) -> str:
        """For a reader."""
        left = f", {self.left_s / 60:.0f} min left" if self.left_s is not None and self.stage == "writing" else ""
        lines = [
            f"{self.stage}: {self.shards_done} of {self.shards} shards, {self.clips_done} of {self.clips} clips, "
            f"{self.bytes_done / 1e6:.1f} MB; {self.clips_per_s:.1f} clips/s{left}"
        ]
        lines += [f"  refused {count}: {reason}" for reason, count in self.rejects.items()]
        lines += [
            f"  builder {one.builder}: {one.tally.clips} clips, last heard of {time.time() - one.updated:.0f} s ago"
            for one in self.builders
        ]
        return "\n".join(lines)


class StatusFile:
    """Writes down what this builder did, from time to time."""

    def __init__(self, out: Path) -> None:
        (out / "status").mkdir(exist_ok=True)
        self._started, self._written = time.time(), 0.0
        # With the time: a second build in one process must not take the place of the first.
        self._builder = f"{socket.gethostname()}-{os.getpid()}-{self._started:.3f}"
        self._path = out / "status" / f"{self._builder}.json"

    def update(self, tally: Tally, *, is_last: bool = False) -> None:
        now = time.time()
        if is_last or now - self._written >= EVERY_S:
            self._written = now
            status = BuilderStatus(self._builder, self._started, now, tally)
            write_whole(self._path, json.dumps(asdict(status), sort_keys=True).encode() + b"\n")


def read_builders(out: Path) -> tuple[BuilderStatus, ...]:
    found = [json.loads(path.read_bytes()) for path in sorted((out / "status").glob("*.json"))]
    builders = [BuilderStatus(**{**values, "tally": Tally(**values["tally"])}) for values in found]
    return tuple(sorted(builders, key=lambda builder: builder.started))


def total(builders: tuple[BuilderStatus, ...]) -> Tally:
    """What all builders did together, what was done twice counted twice."""
    tallies = [builder.tally for builder in builders]
    rejects = sum((Counter(tally.rejects) for tally in tallies), Counter())
    return Tally(
        clips=sum(tally.clips for tally in tallies),
        bytes=sum(tally.bytes for tally in tallies),
        video_s=sum(tally.video_s for tally in tallies),
        encode_s=sum(tally.encode_s for tally in tallies),
        check_s=sum(tally.check_s for tally in tallies),
        rejects=dict(rejects),
    )


def status(out: Path) -> Status:
    """Say how far the build in a folder is, from its files alone.

    Raises:
        BadInput: no build was begun there.
    """
    builders = read_builders(out) if out.is_dir() else ()
    plan = out / "plan" / "plan.json"
    if not plan.exists():
        if not (out / "plan").is_dir():
            raise BadInput(f"{out}: no build was begun there; give the --out of a `vjepa shard`")
        return Status("looking", 0, 0, 0, 0, 0, {}, builders)
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
    return Status(stage, len(counts), done, sum(counts), clips, size, dict(rejects), builders)
