"""What a child process does for the builder: open one file of a stranger."""

import hashlib
import io
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vjepa_data.spec import Encode, Filter
from vjepa_data.transcode import Clip, check, decode_all, decode_frames, transcode
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


@dataclass(frozen=True)
class Check:
    """Ask whether a stored clip still decodes to what the table says."""

    key: str
    path: str
    offset: int
    size: int
    frames: int
    width: int
    height: int


@dataclass(frozen=True)
class Checked:
    """It does."""


@dataclass(frozen=True)
class Picture:
    """Ask for a strip of frames of a stored clip."""

    key: str
    path: str
    offset: int
    size: int
    frames: tuple[int, ...]
    height_px: int


@dataclass(frozen=True)
class Strip:
    """The frames side by side, as JPEG, and what it took to decode the clip, in CPU seconds."""

    jpeg: bytes
    decode_s: float


def work(task: Look | Store | Check | Picture) -> Seen | Done | Checked | Strip:
    """Do one task.

    Raises:
        Refused: the file is not fit for the corpus.
    """
    if isinstance(task, Look):
        found = probe(Path(task.path))
        with Path(task.path).open("rb") as file:
            return Seen(found, hashlib.file_digest(file, "sha256").hexdigest())
    if isinstance(task, Check):
        decode_all(_read(task), frames=task.frames, width=task.width, height=task.height)
        return Checked()
    if isinstance(task, Picture):
        return _strip(task)
    return _store(task)


def _store(task: Store) -> Done:
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


def _read(task: Check | Picture) -> bytes:
    with Path(task.path).open("rb") as file:
        file.seek(task.offset)
        return file.read(task.size)


def _strip(task: Picture) -> Strip:
    """Decode a few frames with the training decoder and put them side by side."""
    data = _read(task)
    begin = time.process_time()
    frames = decode_frames(data, task.frames)
    decode_s = time.process_time() - begin
    height, width = frames.shape[1:3]
    size = (max(1, round(width * task.height_px / height)), task.height_px)
    strip = Image.new("RGB", (size[0] * len(frames), size[1]))
    for place, frame in enumerate(frames):
        strip.paste(Image.fromarray(frame).resize(size), (place * size[0], 0))
    file = io.BytesIO()
    strip.save(file, "JPEG", quality=80)
    return Strip(file.getvalue(), decode_s)
