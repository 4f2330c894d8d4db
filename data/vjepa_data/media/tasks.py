"""Tasks of the builder's worker processes. Each opens an untrusted file."""

import hashlib
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

from vjepa_data.child_process import heartbeat
from vjepa_data.decoding.backends import Expect, decode, unpadded
from vjepa_data.errors import Unreadable
from vjepa_data.media.analysis import perceptual_hashes, picture_box, scene_starts
from vjepa_data.media.canonical import ClipFormat, compare, read_canonical
from vjepa_data.media.fetch import FileRef, open_local
from vjepa_data.media.gop_table import gop_table
from vjepa_data.media.image import probe_image, store_image
from vjepa_data.media.probe import probe
from vjepa_data.media.transcode import (
    MARGIN,
    MAX_DIFFERENCE,
    PictureBox,
    StoredClip,
    check,
    decode_all,
    decord_message,
    open_decord,
    transcode,
)
from vjepa_data.media.video import Reason, Refused, VideoInfo
from vjepa_data.spec import Encode, Filter

BLOCK = 1 << 22
"""Bytes that are hashed at once."""

CHUNK = 32
"""Frames that PyAV decodes at once when all frames are checked."""


@dataclass(frozen=True)
class AnalyzeTask:
    """Analyze a source file."""

    number: int
    file: FileRef
    media: str
    scene_threshold: float | None
    """Threshold of scene detection, in percent, or None to skip it."""
    wants_hashes: bool
    wants_box: bool


@dataclass(frozen=True)
class Analysis:
    """Analysis of a source file."""

    probe: VideoInfo
    sha256: str
    scenes: tuple[float, ...]
    """Start times of all scenes but the first, in seconds."""
    hashes: tuple[int, ...]
    """Perceptual hashes of three frames."""
    box: PictureBox | None
    """Picture inside black bars, if requested and found."""


@dataclass(frozen=True)
class StoreTask:
    """Convert a clip to the stored form."""

    shard: int
    position: int
    file: FileRef
    bytes: int
    """Size of the file when it was analyzed."""
    media: str
    start_s: float | None
    end_s: float | None
    box: PictureBox | None
    encode: Encode
    accept: Filter
    may_copy: bool
    info: VideoInfo | None = None
    """Properties of a video, from its analysis."""
    has_parts: bool = False
    """A run reads virtual parts of the video, which need a table of its GOPs."""


@dataclass(frozen=True)
class StoredSample:
    """A checked clip, and the CPU seconds it took."""

    clip: StoredClip
    is_copy: bool
    encode_s: float
    check_s: float
    gops: bytes = b""
    """Table of the GOPs, with `has_parts`."""


@dataclass(frozen=True)
class CheckTask:
    """Check that every frame of a stored clip decodes, with the number and size of frames in the table."""

    key: str
    file: FileRef
    suffix: str
    expect: Expect
    is_foreign: bool = False
    """PyAV may decode it if decord cannot, as in a run."""


@dataclass(frozen=True)
class ExamineTask:
    """Examine the form of a clip of a foreign corpus, and check that it decodes."""

    number: int
    file: FileRef
    suffix: str
    gop: int
    deep: bool
    """Decode every frame, otherwise only the first."""


@dataclass(frozen=True)
class Examined:
    """Properties of a clip of a foreign corpus, as the training decoder reads it."""

    stored: ClipFormat
    flaws: tuple[str, ...]
    """Differences from the canonical form, the weightiest first."""


@dataclass(frozen=True)
class StripTask:
    """Render a strip of frames of a stored clip."""

    key: str
    file: FileRef
    suffix: str
    expect: Expect
    frames: tuple[int, ...]
    height_px: int


@dataclass(frozen=True)
class Strip:
    """Frames side by side, as JPEG, and the CPU seconds of decoding them."""

    jpeg: bytes
    decode_s: float


Task = AnalyzeTask | StoreTask | CheckTask | ExamineTask | StripTask
Answer = Analysis | StoredSample | Examined | Strip | None


def work(task: Task) -> Answer:
    """Run a task.

    Raises:
        Refused: the file cannot be used.
    """
    with open_local(task.file) as path:
        match task:
            case AnalyzeTask():
                return _analyze(task, path)
            case StoreTask():
                return _store(task, path)
            case CheckTask():
                return _check(path, task.suffix, task.expect, is_foreign=task.is_foreign)
            case ExamineTask():
                return _examine(task, path)
            case StripTask():
                return _render_strip(task, path)


def _analyze(task: AnalyzeTask, path: Path) -> Analysis:
    info = probe_image(path) if task.media == "images" else probe(path)
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            heartbeat()
            sha256.update(block)
    scenes: tuple[float, ...] = ()
    hashes: tuple[int, ...] = ()
    box = None
    if task.media == "videos":
        if task.scene_threshold is not None:
            scenes = scene_starts(path, info, threshold=task.scene_threshold)
        if task.wants_hashes:
            hashes = perceptual_hashes(path, info)
        if task.wants_box:
            box = picture_box(path, info)
    return Analysis(info, sha256.hexdigest(), scenes, hashes, box)


def _store(task: StoreTask, path: Path) -> StoredSample:
    begin = time.process_time()
    size = path.stat().st_size if path.exists() else 0
    if size != task.bytes:
        raise Refused(Reason.CHANGED, f"{size} bytes, but {task.bytes} when it was analyzed")
    if task.media == "images":
        clip = store_image(path, encode=task.encode)
        return StoredSample(clip, is_copy=False, encode_s=time.process_time() - begin, check_s=0.0)
    is_whole = task.start_s is None and task.end_s is None and task.box is None
    kept = _read_if_canonical(task, path) if task.may_copy and is_whole else None
    part = {"start_s": task.start_s, "end_s": task.end_s, "box": task.box}
    clip = kept or transcode(path, **part, encode=task.encode, accept=task.accept, info=task.info)
    middle = time.process_time()
    check(clip, gop=task.encode.gop)
    gops = gop_table(clip.data, gop=task.encode.gop) if task.has_parts else b""
    clip = StoredClip(clip.data, clip.stored)
    return StoredSample(clip, kept is not None, middle - begin, time.process_time() - middle, gops)


def _read_if_canonical(task: StoreTask, path: Path) -> StoredClip | None:
    """Return the file unchanged if it is canonical and has the requested size and rate."""
    data = path.read_bytes()
    try:
        stored = read_canonical(data, gop=task.encode.gop)
        if task.has_parts:
            gop_table(data, gop=task.encode.gop)
    except Refused:
        return None
    fps, limit = task.encode.fps, task.encode.max_fps * float(MARGIN)
    has_rate = stored.fps <= limit + 0.01 if fps is None else abs(stored.fps - fps) <= 0.01
    has_size = min(stored.width, stored.height) == task.encode.short_side_px
    return StoredClip(data, stored) if has_rate and has_size else None


def _check(path: Path, suffix: str, expect: Expect, *, is_foreign: bool) -> None:
    data = path.read_bytes()
    if suffix != "mp4":
        _decode(data, (0,), suffix, expect)
        return
    try:
        decode_all(data, frames=expect.frames, width=expect.width, height=expect.height)
    except Refused as refusal:
        if not is_foreign:
            raise
        for first in range(0, expect.frames, CHUNK):
            heartbeat()
            _decode_with("pyav", data, range(first, min(first + CHUNK, expect.frames)), expect, refusal)


def _examine(task: ExamineTask, path: Path) -> Examined:
    if task.suffix != "mp4":
        info = probe_image(path)
        examined = Examined(ClipFormat(1, (1, 1), info.width, info.height), ())
    else:
        info = probe(path)
        data = path.read_bytes()
        stored, flaws = compare(data, gop=task.gop)
        examined = Examined(stored, ()) if stored and not flaws else _compare_decoders(data, info, flaws)
    stored = examined.stored
    if task.deep or task.suffix != "mp4":
        _check(path, task.suffix, Expect(stored.frames, stored.width, stored.height), is_foreign=True)
    return examined


def _compare_decoders(data: bytes, info: VideoInfo, flaws: list[str]) -> Examined:
    """Examine a clip that is not canonical with both decoders of a run, decord and PyAV.

    Raises:
        Refused: neither decodes it, or they show different pictures.
    """
    try:
        stored, refusal = read_with_decord(data, info), None
    except Refused as refused:
        stored, refusal = ClipFormat(_count(data), info.rate, info.width, info.height), refused
        flaws = [f"decord cannot decode {info.codec}, PyAV does", *flaws]
    expect = Expect(stored.frames, stored.width, stored.height)
    numbers = sorted({0, stored.frames // 2, stored.frames - 1})
    shown = _decode_with("pyav", data, numbers, expect, refusal)
    if refusal is None:
        other = _decode_with("decord", data, numbers, expect, None)
        differences = np.abs(shown.astype(np.int16) - other).mean(axis=(1, 2, 3))
        if differences.max() > MAX_DIFFERENCE:
            detail = f"of frame {numbers[int(differences.argmax())]}; `vjepa shard` stores such clips"
            raise Refused(Reason.DECODERS_DIFFER, f"decord and PyAV show different pictures {detail}")
    return Examined(stored, tuple(flaws))


def _count(data: bytes) -> int:
    """Return the number of frames of a video, by its packets."""
    with av.open(io.BytesIO(data), "r", metadata_errors="replace") as container:
        stream = container.streams.best("video")
        return sum(p.pts is not None and not p.is_discard for p in container.demux(stream)) if stream else 0


def _decode_with(backend: str, data: bytes, numbers: Sequence[int], expect: Expect, before: Refused | None):
    """Decode frames with a decoder of a run.

    Raises:
        Refused: it fails, as the decoder before it did, or else the two differ.
    """
    try:
        return decode(data, numbers, backend=backend, expect=expect)
    except Unreadable as error:
        if before is not None:
            raise Refused(before.reason, f"{before.detail}; {error.detail}") from None
        detail = f"{error.detail}; `vjepa shard` stores such clips"
        raise Refused(Reason.DECODERS_DIFFER, f"only one decoder reads it: {detail}") from None


def read_with_decord(data: bytes, info: VideoInfo) -> ClipFormat:
    """Read the properties of a clip that is not canonical, with the training decoder.

    Raises:
        Refused: decord cannot open the clip or decode its first frame.
    """
    reader, errors = open_decord(data)
    try:
        height, width = unpadded(reader.next().asnumpy()).shape[:2]
    except errors as error:
        raise Refused(Reason.CHECK_FAILED, f"decord: {decord_message(error)}") from None
    return ClipFormat(len(reader), info.rate, width, height)


def _decode(data: bytes, frames: tuple[int, ...], suffix: str, expect: Expect):
    try:
        return decode(data, frames, backend="decord" if suffix == "mp4" else "image", expect=expect)
    except Unreadable as error:
        raise Refused(Reason.CHECK_FAILED if suffix == "mp4" else Reason.NOT_IMAGE, str(error)) from None


def _render_strip(task: StripTask, path: Path) -> Strip:
    """Decode a few frames with the training decoder, and join them side by side."""
    data = path.read_bytes()
    begin = time.process_time()
    frames = _decode(data, task.frames, task.suffix, task.expect)
    decode_s = time.process_time() - begin
    height, width = frames.shape[1:3]
    size = (max(1, round(width * task.height_px / height)), task.height_px)
    strip = Image.new("RGB", (size[0] * len(frames), size[1]))
    for position, frame in enumerate(frames):
        strip.paste(Image.fromarray(frame).resize(size), (position * size[0], 0))
    file = io.BytesIO()
    strip.save(file, "JPEG", quality=80)
    return Strip(file.getvalue(), decode_s)
