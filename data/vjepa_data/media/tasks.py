"""What a child process does for the builder: open one file of a stranger."""

import hashlib
import io
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vjepa_data.decoding.backends import Expect, decode
from vjepa_data.errors import Unreadable
from vjepa_data.media.analysis import perceptual_hashes, picture_box, scene_starts
from vjepa_data.media.fetch import FileRef, local
from vjepa_data.media.image import probe_image, store_image
from vjepa_data.media.transcode import PictureBox, StoredClip, check, decode_all, open_decord, said_by, transcode
from vjepa_data.media.video import Reason, Refused, Stored, VideoInfo, probe, read_canonical
from vjepa_data.spec import Encode, Filter


@dataclass(frozen=True)
class AnalyzeTask:
    """Ask what a file is."""

    number: int
    place: FileRef
    media: str
    scene_threshold: float | None
    """If given, ask for scenes as well."""
    wants_hashes: bool
    wants_box: bool


@dataclass(frozen=True)
class Analysis:
    """What it is."""

    probe: VideoInfo
    sha256: str
    scenes: tuple[float, ...]
    """When scenes begin after the first, in seconds."""
    hashes: tuple[int, ...]
    """Perceptual hashes of three moments."""
    box: PictureBox | None
    """Where the picture lies, if there are black bars around it and they were asked for."""


@dataclass(frozen=True)
class StoreTask:
    """Ask for one clip in the form in which it is stored."""

    shard: int
    position: int
    place: FileRef
    bytes: int
    """Size of the file when it was looked at."""
    media: str
    start_s: float | None
    end_s: float | None
    box: PictureBox | None
    encode: Encode
    accept: Filter
    may_copy: bool


@dataclass(frozen=True)
class StoredSample:
    """The clip, checked, and what it cost in CPU seconds."""

    clip: StoredClip
    is_copy: bool
    encode_s: float
    check_s: float


@dataclass(frozen=True)
class CheckTask:
    """Ask whether a stored clip decodes from first to last frame to what the table says."""

    key: str
    place: FileRef
    suffix: str
    expect: Expect


@dataclass(frozen=True)
class ExamineTask:
    """Ask what a stored clip of a foreign corpus is, and whether it decodes."""

    number: int
    place: FileRef
    suffix: str
    gop: int
    deep: bool
    """Decode it from first to last frame; otherwise the first frame."""


@dataclass(frozen=True)
class Examined:
    """Its form as the training decoder finds it, and why that is not canonical, or nothing."""

    stored: Stored
    flaw: str


@dataclass(frozen=True)
class StripTask:
    """Ask for a strip of frames of a stored clip."""

    key: str
    place: FileRef
    suffix: str
    expect: Expect
    frames: tuple[int, ...]
    height_px: int


@dataclass(frozen=True)
class Strip:
    """The frames side by side, as JPEG, and what it took to decode them, in CPU seconds."""

    jpeg: bytes
    decode_s: float


Task = AnalyzeTask | StoreTask | CheckTask | ExamineTask | StripTask
Answer = Analysis | StoredSample | Examined | Strip | None


def work(task: Task) -> Answer:
    """Do one task.

    Raises:
        Refused: the file is not fit for the corpus.
    """
    with local(task.place) as path:
        match task:
            case AnalyzeTask():
                return _look(task, path)
            case StoreTask():
                return _store(task, path)
            case CheckTask():
                return _check(path, task.suffix, task.expect)
            case ExamineTask():
                return _examine(task, path)
            case StripTask():
                return _strip(task, path)


def _look(task: AnalyzeTask, path: Path) -> Analysis:
    facts = probe_image(path) if task.media == "images" else probe(path)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    scenes: tuple[float, ...] = ()
    hashes: tuple[int, ...] = ()
    box = None
    if task.media == "videos":
        if task.scene_threshold is not None:
            scenes = scene_starts(path, facts, threshold=task.scene_threshold)
        if task.wants_hashes:
            hashes = perceptual_hashes(path, facts)
        if task.wants_box:
            box = picture_box(path, facts)
    return Analysis(facts, sha256, scenes, hashes, box)


def _store(task: StoreTask, path: Path) -> StoredSample:
    begin = time.process_time()
    size = path.stat().st_size if path.exists() else 0
    if size != task.bytes:
        raise Refused(Reason.CHANGED, f"{size} bytes, {task.bytes} when it was looked at")
    if task.media == "images":
        clip = store_image(path, encode=task.encode)
        return StoredSample(clip, is_copy=False, encode_s=time.process_time() - begin, check_s=0.0)
    is_whole = task.start_s is None and task.end_s is None and task.box is None
    kept = _as_it_is(task, path) if task.may_copy and is_whole else None
    part = {"start_s": task.start_s, "end_s": task.end_s, "box": task.box}
    clip = kept or transcode(path, **part, encode=task.encode, accept=task.accept)
    middle = time.process_time()
    check(clip.data, clip.stored, gop=task.encode.gop)
    return StoredSample(clip, kept is not None, middle - begin, time.process_time() - middle)


def _as_it_is(task: StoreTask, path: Path) -> StoredClip | None:
    """The file byte for byte if it is canonical already and of the size and rate that are wanted."""
    data = path.read_bytes()
    try:
        stored = read_canonical(data, gop=task.encode.gop)
    except Refused:
        return None
    wanted_rate = task.encode.fps or task.encode.max_fps
    is_rate = stored.fps <= wanted_rate + 0.01 and (task.encode.fps is None or stored.fps >= wanted_rate - 0.01)
    is_size = min(stored.width, stored.height) == task.encode.short_side_px
    return StoredClip(data, stored) if is_rate and is_size else None


def _check(path: Path, suffix: str, expect: Expect) -> None:
    if suffix == "mp4":
        decode_all(path.read_bytes(), frames=expect.frames, width=expect.width, height=expect.height)
    else:
        _decode(path.read_bytes(), (0,), suffix, expect)


def _examine(task: ExamineTask, path: Path) -> Examined:
    if task.suffix != "mp4":
        facts = probe_image(path)
        stored, flaw = Stored(1, (1, 1), facts.width, facts.height), ""
    else:
        facts = probe(path)
        data = path.read_bytes()
        try:
            stored, flaw = read_canonical(data, gop=task.gop), ""
        except Refused as refusal:
            stored, flaw = count_frames(data, facts), refusal.detail
    if task.deep or task.suffix != "mp4":
        _check(path, task.suffix, Expect(stored.frames, stored.width, stored.height))
    return Examined(stored, flaw)


def count_frames(data: bytes, facts: VideoInfo) -> Stored:
    """The form of a clip that is not canonical, as the training decoder finds it.

    Raises:
        Refused: decord cannot open it, or decode its first frame.
    """
    reader, decord = open_decord(data)
    try:
        height, width = reader.next().shape[:2]
    except decord.DECORDError as error:
        raise Refused(Reason.CHECK_FAILED, f"decord: {said_by(error)}") from None
    return Stored(len(reader), facts.rate, width, height)


def _decode(data: bytes, frames: tuple[int, ...], suffix: str, expect: Expect):
    try:
        return decode(data, frames, backend="decord" if suffix == "mp4" else "image", expect=expect)
    except Unreadable as error:
        raise Refused(Reason.CHECK_FAILED if suffix == "mp4" else Reason.NOT_IMAGE, str(error)) from None


def _strip(task: StripTask, path: Path) -> Strip:
    """Decode a few frames with the training decoder and put them side by side."""
    data = path.read_bytes()
    begin = time.process_time()
    frames = _decode(data, task.frames, task.suffix, task.expect)
    decode_s = time.process_time() - begin
    height, width = frames.shape[1:3]
    size = (max(1, round(width * task.height_px / height)), task.height_px)
    strip = Image.new("RGB", (size[0] * len(frames), size[1]))
    for place, frame in enumerate(frames):
        strip.paste(Image.fromarray(frame).resize(size), (place * size[0], 0))
    file = io.BytesIO()
    strip.save(file, "JPEG", quality=80)
    return Strip(file.getvalue(), decode_s)
