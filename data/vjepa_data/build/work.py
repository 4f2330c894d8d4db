"""What a child process does for the builder: open one file of a stranger."""

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

from vjepa_data.spec import Encode, Filter
from vjepa_data.transcode import Clip, check, transcode
from vjepa_data.video import Probe, Refused, probe, read_canonical


@dataclass(frozen=True)
class Look:
    """Ask what a file is."""

    number: int
    path: str


@dataclass(frozen=True)
class Seen:
    """What it is, and the sha256 of its bytes."""

    probe: Probe
    sha256: str


@dataclass(frozen=True)
class Store:
    """Ask for one clip in the form in which it is stored."""

    shard: int
    position: int
    path: str
    start_s: float | None
    end_s: float | None
    encode: Encode
    accept: Filter
    may_copy: bool


@dataclass(frozen=True)
class Done:
    """The clip, checked, and what it cost in CPU seconds."""

    clip: Clip
    is_copy: bool
    encode_s: float
    check_s: float


def work(task: Look | Store) -> Seen | Done:
    """Do one task.

    Raises:
        Refused: the file is not fit for the corpus.
    """
    if isinstance(task, Look):
        found = probe(Path(task.path))
        with Path(task.path).open("rb") as file:
            return Seen(found, hashlib.file_digest(file, "sha256").hexdigest())
    begin = time.process_time()
    kept = _as_it_is(task) if task.may_copy and task.start_s is None and task.end_s is None else None
    clip = kept or transcode(
        Path(task.path), start_s=task.start_s, end_s=task.end_s, encode=task.encode, accept=task.accept
    )
    middle = time.process_time()
    check(clip.data, clip.stored, gop=task.encode.gop)
    return Done(clip, kept is not None, middle - begin, time.process_time() - middle)


def _as_it_is(task: Store) -> Clip | None:
    """The file byte for byte if it is canonical already and of the size and rate that are wanted."""
    data = Path(task.path).read_bytes()
    try:
        stored = read_canonical(data, gop=task.encode.gop)
    except Refused:
        return None
    wanted_rate = task.encode.fps or task.encode.max_fps
    is_rate = stored.fps <= wanted_rate + 0.01 and (task.encode.fps is None or stored.fps >= wanted_rate - 0.01)
    is_size = min(stored.width, stored.height) == task.encode.short_side_px
    return Clip(data, stored) if is_rate and is_size else None
