"""Probe video files, and name the reasons for rejecting them."""

import io
import itertools
import stat
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import av.container
import av.video.stream
from av.error import FFmpegError
from av.stream import Disposition

FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,gif,mxf,dv,rm,h264,hevc,ivf,nut,y4m"
    ",yuv4mpegpipe,av1,obu,wtv"
)
"""Accepted containers. Playlists (HLS, DASH, concat) are excluded because they refer to other files."""

SUFFIXES = frozenset(
    """.mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .m2v .ts .m2ts .mts .vob .flv .wmv .asf .ogv .ogg .gif .3gp .3g2 .mxf
    .dv .ivf .y4m .h264 .264 .hevc .265 .divx .rm .rmvb""".split()  # noqa: SIM905
)
"""Suffixes of videos in a folder search. The content then decides whether the file is a video."""

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
"""Suffixes of images in a folder search for a corpus of images."""

MAX_PIXELS = 8192 * 8192


class Reason(StrEnum):
    """Why a source or clip was rejected. The names are part of the format of `rejects.parquet`."""

    MISSING = "missing"
    """The file does not exist or cannot be read."""
    EMPTY = "empty"
    """The file has 0 bytes."""
    UNREACHABLE = "unreachable"
    """The file could not be downloaded, after retries."""
    BAD_LABELS = "bad_labels"
    """The file with the labels is not a JSON object."""
    BAD_SIGNAL = "bad_signal"
    """A signal or text next to the video is missing, damaged, or does not cover the video."""
    NOT_VIDEO = "not_video"
    """The container is unknown: a text, a web page, a playlist, noise."""
    NO_INDEX = "no_index"
    """An MP4 without its index (`moov`): an interrupted download or recording."""
    NOT_IMAGE = "not_image"
    """The image is damaged or has an unknown format."""
    NO_VIDEO_STREAM = "no_video_stream"
    """The container has no video stream, only sound."""
    NO_DECODER = "no_decoder"
    """The codec is unknown."""
    TOO_LARGE = "too_large"
    """The declared frame size exceeds 8192 x 8192, or the file exceeds a memory limit."""
    DAMAGED = "damaged"
    """The video cannot be decoded from start to end."""
    TRUNCATED = "truncated"
    """The frames end before the declared duration."""
    SIZE_CHANGES = "size_changes"
    """The frame size changes within the video."""
    DUPLICATE = "duplicate"
    """An earlier source has the same bytes."""
    NEAR_DUPLICATE = "near_duplicate"
    """An earlier source looks the same."""
    DENIED = "denied"
    """The source is on the deny-list."""
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    TOO_SMALL = "too_small"
    TOO_NARROW = "too_narrow"
    TOO_SLOW = "too_slow"
    CODEC = "codec"
    STILL = "still"
    DARK = "dark"
    CHANGED = "changed"
    """The size of the file has changed since the analysis."""
    BAD_RANGE = "bad_range"
    """The requested time range lies outside the video."""
    NOT_CANONICAL = "not_canonical"
    """The encoded clip does not have the canonical form, which is a bug."""
    CHECK_FAILED = "check_failed"
    """The training decoder does not reproduce the stored clip."""
    TIMED_OUT = "timed_out"
    """Reading, encoding or checking took longer than `timeout_s`, twice."""
    CRASHED = "crashed"
    """Reading, encoding or checking killed its process, twice."""


class Refused(Exception):
    """Raised for a video, clip or sample that is rejected.

    Args:
        reason: the code that is counted.
        detail: one line of explanation. It must not contain times, local paths or process ids, so that builds are
            reproducible.
    """

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = " ".join("".join(c if c.isprintable() else " " for c in detail).split())[:200]


@dataclass(frozen=True)
class VideoInfo:
    """Declared properties of a video or image file."""

    bytes: int
    container: str
    codec: str
    pixel_format: str
    width: int
    """Displayed width: after rotation, in square pixels."""
    height: int
    rate: tuple[int, int]
    """Average frames per second, as a fraction."""
    duration_s: float
    frames: int
    """Declared number of frames, or 0 if the container does not declare it."""
    start_s: float
    audio: bool

    @property
    def fps(self) -> float:
        return self.rate[0] / self.rate[1]


def open_video(path: Path) -> av.container.InputContainer:
    """Open a local video file. Other files or URLs that it refers to are never opened.

    Raises:
        Refused: the file is missing, empty, or not a known container.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would block, and a device has no end
            raise Refused(Reason.MISSING, "not a file")
        size = status.st_size
        with path.open("rb") as file:
            head = file.read(12)
            is_mp4 = head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip")
            has_index = is_mp4 and _has_index(file, size)
    except OSError as error:
        raise Refused(Reason.MISSING, error.strerror or "cannot be read") from None
    if not size:
        raise Refused(Reason.EMPTY, "0 bytes")
    if is_mp4 and not has_index:
        raise Refused(Reason.NO_INDEX, "MP4 without a complete moov box")
    try:
        return av.open(
            f"file:{path.absolute()}",
            options={"format_whitelist": FORMATS, "protocol_whitelist": "file"},
            metadata_errors="replace",
        )
    except FFmpegError as error:
        raise Refused(Reason.DAMAGED if is_mp4 else Reason.NOT_VIDEO, error.strerror or "") from None


def _has_index(file: BinaryIO, size: int) -> bool:
    """Tell whether an MP4 contains its complete index."""
    at = 0
    while at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        length = int.from_bytes(head[:4])
        length = int.from_bytes(head[8:16]) if length == 1 else size - at if length == 0 else length
        if head[4:8] == b"moov":
            return at + length <= size
        if length < 8:
            return False
        at += length
    return False


def video_stream(container: av.container.InputContainer) -> av.video.stream.VideoStream:
    """Return the video stream (not the cover art), set to decode in one thread.

    Raises:
        Refused: there is no video stream, or it cannot be decoded.
    """
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise Refused(Reason.NO_VIDEO_STREAM, f"none of {len(container.streams)} streams is a video")
    stream = streams[0]
    if stream.codec_context is None:
        raise Refused(Reason.NO_DECODER, "unknown codec")
    if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
        raise Refused(Reason.TOO_LARGE, f"{stream.codec_context.width}x{stream.codec_context.height}")
    stream.thread_count = 1
    stream.thread_type = "NONE"
    return stream


def probe(path: Path) -> VideoInfo:
    """Read the declared properties of a video, and decode one frame to learn its displayed size.

    Raises:
        Refused: the file is not a video, or cannot be decoded.
    """
    with open_video(path) as container:
        stream = video_stream(container)
        try:
            frame = next(container.decode(stream), None)
        except FFmpegError as error:
            raise Refused(Reason.DAMAGED, f"first frame: {error.strerror}") from None
        if frame is None:
            raise Refused(Reason.DAMAGED, "no frame can be decoded")
        width, height = shown_size(frame, stream)
        rate = stream.average_rate or stream.guessed_rate or Fraction(0)
        if not 0 < rate <= 1000:
            rate = stream.guessed_rate if stream.guessed_rate and 0 < stream.guessed_rate <= 1000 else Fraction(25)
        rate = Fraction(rate).limit_denominator(1001)
        duration = _duration(container, stream, rate)
        return VideoInfo(
            bytes=path.stat().st_size,
            container=container.format.name,
            codec=stream.codec_context.name,
            pixel_format=stream.codec_context.pix_fmt or "",
            width=width,
            height=height,
            rate=(rate.numerator, rate.denominator),
            duration_s=round(duration, 6),
            frames=stream.frames,
            start_s=round(float((stream.start_time or 0) * (stream.time_base or 0)), 6),
            audio=bool(container.streams.audio),
        )


def _duration(container: av.container.InputContainer, stream: av.video.stream.VideoStream, rate: Fraction) -> float:
    """Return the declared duration in seconds: of the stream, else from its frame count, else of the container."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if stream.frames:
        return float(stream.frames / rate)
    return (container.duration or 0) / av.time_base


def shown_size(frame: av.VideoFrame, stream: av.video.stream.VideoStream) -> tuple[int, int]:
    """Return the displayed width and height: after rotation, in square pixels."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    width, height = frame.width, frame.height
    if aspect > 0 and aspect != 1:
        width = max(1, round(width * aspect))
    return (height, width) if frame.rotation % 180 else (width, height)


def boxes(data: bytes, start: int = 0, end: int | None = None) -> list[tuple[str, int, int]]:
    """List the boxes of an MP4 at one level: name, and offsets of the start and end of its content.

    Source: ISO/IEC 14496-12, section 4.2.
    """
    found, at, end = [], start, len(data) if end is None else end
    while at + 8 <= end:
        size, name, head = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8], 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16]), 16
        size = end - at if size == 0 else size
        if size < head or at + size > end:
            break
        found.append((name.decode("latin-1"), at + head, at + size))
        at += size
    return found


@dataclass(frozen=True)
class ClipFormat:
    """Properties of a stored clip."""

    frames: int
    rate: tuple[int, int]
    width: int
    height: int

    @property
    def fps(self) -> float:
        return self.rate[0] / self.rate[1]


def read_canonical(data: bytes, *, gop: int) -> ClipFormat:
    """Check that an MP4 has the canonical form, without decoding it, and return its properties.

    Canonical: index first, no edit list, one track, H.264 yuv420p, square pixels, no rotation, constant rate from time
    0, and a key frame at least every `gop` frames.

    Raises:
        Refused: it has another form. The detail names the first difference.
    """
    track = _check_boxes(data)
    try:
        with av.open(io.BytesIO(data), "r", format="mp4") as container:
            stream = container.streams.video[0] if container.streams.video else None
            if stream is None or stream.codec_context is None or stream.codec_context.name != "h264":
                raise _not_canonical("not H.264")
            context, step = stream.codec_context, stream.time_base
            packets = sorted((p.pts, p.is_keyframe) for p in container.demux(stream) if p.pts is not None)
            if context.pix_fmt != "yuv420p":
                raise _not_canonical(f"pixel format {context.pix_fmt}, expected yuv420p")
            if (stream.sample_aspect_ratio or 1) != 1:
                raise _not_canonical(f"pixels are not square ({stream.sample_aspect_ratio})")
    except FFmpegError as error:
        raise _not_canonical(error.strerror or "cannot be read") from None
    if _is_rotated(data, track):
        raise _not_canonical("it is rotated")
    gap = _check_timing(packets, gop)
    assert step is not None
    rate = 1 / (step * gap) if gap else Fraction(stream.average_rate or 1)
    return ClipFormat(len(packets), (rate.numerator, rate.denominator), context.width, context.height)


def _not_canonical(difference: str) -> Refused:
    return Refused(Reason.NOT_CANONICAL, difference)


def _check_boxes(data: bytes) -> list[tuple[str, int, int]]:
    """Check the layout of an MP4, and return the boxes of its only track."""
    top = {name: (start, end) for name, start, end in reversed(boxes(data))}
    if not {"ftyp", "moov", "mdat"} <= top.keys():
        raise _not_canonical("not a complete MP4")
    if top["moov"] > top["mdat"]:
        raise _not_canonical("the index is not at the front")
    inside = boxes(data, *top["moov"])
    tracks = [boxes(data, start, end) for name, start, end in inside if name == "trak"]
    if len(tracks) != 1:
        raise _not_canonical(f"{len(tracks)} tracks, expected 1")
    if any(name == "edts" for name, _, _ in tracks[0]):
        raise _not_canonical("it has an edit list")
    if any(name == "mvex" for name, _, _ in inside):
        raise _not_canonical("it is fragmented")
    return tracks[0]


def _check_timing(packets: list[tuple[int, bool]], gop: int) -> int:
    """Check times and key frames of packets in display order, and return the ticks per frame (0 for a single frame)."""
    times = [pts for pts, _ in packets]
    gaps = {later - earlier for earlier, later in itertools.pairwise(times)}
    if not times or times[0] != 0 or len(gaps) > 1 or 0 in gaps:
        raise _not_canonical(f"the rate is not constant from 0: {len(gaps)} different gaps, first frame at {times[:1]}")
    keys = [number for number, (_, is_key) in enumerate(packets) if is_key]
    longest = max((b - a for a, b in itertools.pairwise([*keys, len(packets)])), default=0)
    if not keys or keys[0] != 0 or longest > gop:
        raise _not_canonical(f"{longest or len(packets)} frames between key frames, expected at most {gop}")
    return gaps.pop() if gaps else 0


def _is_rotated(data: bytes, track: list[tuple[str, int, int]]) -> bool:
    """Tell whether the matrix in a track's header differs from the identity (ISO/IEC 14496-12, section 8.3.2)."""
    start, end = next(((start, end) for name, start, end in track if name == "tkhd"), (0, 0))
    matrix = data[end - 44 : end - 8]  # nine numbers, followed by width and height at the end of the box
    identity = b"".join(n.to_bytes(4) for n in (0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000))
    return start == end or matrix != identity
