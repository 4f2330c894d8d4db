"""What a video file is, and why it is refused."""

import io
import itertools
import json
import stat
from dataclasses import asdict, dataclass
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
"""Containers of pictures. Playlists (HLS, DASH, concat), which name other files, are not among them."""

SUFFIXES = frozenset(
    """.mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .m2v .ts .m2ts .mts .vob .flv .wmv .asf .ogv .ogg .gif .3gp .3g2 .mxf
    .dv .ivf .y4m .h264 .264 .hevc .265 .divx .rm .rmvb""".split()  # noqa: SIM905
)
"""File names that are taken for videos when a folder is searched; what such a file is, its content decides."""

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
"""File names that are taken for images when the corpus is one of images."""

MAX_PIXELS = 8192 * 8192


class Reason(StrEnum):
    """Why a source or clip was refused. The names are part of the format of `rejects.parquet`."""

    MISSING = "missing"
    """There is no such file, or it cannot be read."""
    EMPTY = "empty"
    """The file has no bytes."""
    UNREACHABLE = "unreachable"
    """The URL did not give the file, after retries."""
    BAD_LABELS = "bad_labels"
    """The labels beside the video are no JSON object."""
    BAD_SIGNAL = "bad_signal"
    """A signal or text beside the video is missing, damaged, or does not cover the video."""
    NOT_VIDEO = "not_video"
    """No known container: a text, a web page, a playlist, noise."""
    NO_INDEX = "no_index"
    """An MP4 without its index (`moov`): a download or recording that was cut off."""
    NOT_IMAGE = "not_image"
    """No image of a known kind, or a damaged one."""
    NO_VIDEO_STREAM = "no_video_stream"
    """A container without moving pictures: sound only."""
    NO_DECODER = "no_decoder"
    """Pictures in a format that cannot be decoded."""
    TOO_LARGE = "too_large"
    """A declared picture size beyond 8192 x 8192."""
    DAMAGED = "damaged"
    """The pictures cannot be decoded from start to end."""
    TRUNCATED = "truncated"
    """The pictures end before the file says that they do."""
    SIZE_CHANGES = "size_changes"
    """The picture size changes in the middle."""
    DUPLICATE = "duplicate"
    """The same bytes as an earlier source."""
    NEAR_DUPLICATE = "near_duplicate"
    """Looks the same as an earlier clip."""
    DENIED = "denied"
    """On the deny-list."""
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    TOO_SMALL = "too_small"
    TOO_NARROW = "too_narrow"
    TOO_SLOW = "too_slow"
    CODEC = "codec"
    STILL = "still"
    DARK = "dark"
    CHANGED = "changed"
    """The file has another size than when it was looked at."""
    BAD_RANGE = "bad_range"
    """The part to use does not lie in the video."""
    NOT_CANONICAL = "not_canonical"
    """What we stored is not the canonical form: an encoder at fault."""
    CHECK_FAILED = "check_failed"
    """The training decoder does not give back what was stored."""
    TIMED_OUT = "timed_out"
    """Reading, encoding or checking took longer than `timeout_s`, twice."""
    CRASHED = "crashed"
    """Reading, encoding or checking killed its process, twice."""


class Refused(Exception):
    """A video, clip or sample that does not enter the corpus.

    Args:
        reason: the code that is counted.
        detail: one line for a reader; no times, paths of this machine or process numbers, so that a second build
            says the same.
    """

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = " ".join("".join(c if c.isprintable() else " " for c in detail).split())[:200]


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says of itself."""

    bytes: int
    container: str
    codec: str
    pixel_format: str
    width: int
    """Pixels as shown: after rotation, with square pixels."""
    height: int
    rate: tuple[int, int]
    """Average frames per second, as a fraction."""
    duration_s: float
    frames: int
    """Frames as declared, 0 if the container does not say."""
    start_s: float
    audio: bool

    @property
    def fps(self) -> float:
        return self.rate[0] / self.rate[1]

    def as_json(self) -> str:
        return json.dumps(asdict(self))


def open_video(path: Path) -> av.container.InputContainer:
    """Open a local file for reading; only containers of pictures, never another file or address that it names.

    Raises:
        Refused: the file is missing, empty, or no container of pictures.
    """
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):  # a pipe would be waited for, a device has no end
            raise Refused(Reason.MISSING, "not a file")
        size = facts.st_size
        with path.open("rb") as file:
            head = file.read(12)
            is_mp4 = head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip")
            has_index = is_mp4 and _has_index(file, size)
    except OSError as error:
        raise Refused(Reason.MISSING, error.strerror or "cannot be read") from None
    if not size:
        raise Refused(Reason.EMPTY, "0 bytes")
    if is_mp4 and not has_index:
        raise Refused(Reason.NO_INDEX, "an MP4 without a whole moov box")
    try:
        return av.open(
            f"file:{path.absolute()}",
            options={"format_whitelist": FORMATS, "protocol_whitelist": "file"},
            metadata_errors="replace",
        )
    except FFmpegError as error:
        raise Refused(Reason.DAMAGED if is_mp4 else Reason.NOT_VIDEO, error.strerror or "") from None


def _has_index(file: BinaryIO, size: int) -> bool:
    """Whether an MP4 holds the whole of its index."""
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
    """The stream of moving pictures (not the cover art), one thread, ready to decode.

    Raises:
        Refused: there is none, or none that can be decoded.
    """
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise Refused(Reason.NO_VIDEO_STREAM, f"{len(container.streams)} streams, none with moving pictures")
    stream = streams[0]
    if stream.codec_context is None:
        raise Refused(Reason.NO_DECODER, "unknown codec")
    if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
        raise Refused(Reason.TOO_LARGE, f"{stream.codec_context.width}x{stream.codec_context.height}")
    stream.thread_count = 1
    stream.thread_type = "NONE"
    return stream


def probe(path: Path) -> VideoInfo:
    """Read what a file says of itself, and decode one frame to learn what it shows.

    Raises:
        Refused: it is no video that can be decoded.
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
    """Seconds of moving pictures as declared: by the stream, else by its count of frames, else by the container."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if stream.frames:
        return float(stream.frames / rate)
    return (container.duration or 0) / av.time_base


def shown_size(frame: av.VideoFrame, stream: av.video.stream.VideoStream) -> tuple[int, int]:
    """Width and height in square pixels after rotation: what a player would show."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    width, height = frame.width, frame.height
    if aspect > 0 and aspect != 1:
        width = max(1, round(width * aspect))
    return (height, width) if frame.rotation % 180 else (width, height)


def boxes(data: bytes, start: int = 0, end: int | None = None) -> list[tuple[str, int, int]]:
    """The boxes of an MP4 at one level: name, and where its content begins and ends, in bytes.

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
class Stored:
    """A stored clip's form, as its own bytes tell."""

    frames: int
    rate: tuple[int, int]
    width: int
    height: int

    @property
    def fps(self) -> float:
        return self.rate[0] / self.rate[1]


def read_canonical(data: bytes, *, gop: int) -> Stored:
    """Check that the bytes are an MP4 of the canonical form, without decoding it, and say what is in them.

    Canonical: index first, no edit list, one stream, H.264 yuv420p, square pixels, no rotation, a constant rate from 0,
    and a key frame at least every `gop` frames.

    Raises:
        Refused: it is not; the detail says in what.
    """

    def refuse(what: str) -> Refused:
        return Refused(Reason.NOT_CANONICAL, what)

    top = {name: (start, end) for name, start, end in reversed(boxes(data))}
    if not {"ftyp", "moov", "mdat"} <= top.keys():
        raise refuse("not a complete MP4")
    if top["moov"] > top["mdat"]:
        raise refuse("the index is not at the front")
    inside = boxes(data, *top["moov"])
    tracks = [boxes(data, start, end) for name, start, end in inside if name == "trak"]
    if len(tracks) != 1:
        raise refuse(f"{len(tracks)} tracks, expected one")
    if any(name == "edts" for name, _, _ in tracks[0]):
        raise refuse("it has an edit list")
    if any(name == "mvex" for name, _, _ in inside):
        raise refuse("it is fragmented")
    try:
        with av.open(io.BytesIO(data), "r", format="mp4") as container:
            stream = container.streams.video[0] if container.streams.video else None
            if stream is None or stream.codec_context is None or stream.codec_context.name != "h264":
                raise refuse("not H.264")
            context = stream.codec_context
            packets = sorted((p.pts, p.is_keyframe) for p in container.demux(stream) if p.pts is not None)
            if context.pix_fmt != "yuv420p":
                raise refuse(f"pixels are {context.pix_fmt}, not yuv420p")
            if (stream.sample_aspect_ratio or 1) != 1:
                raise refuse(f"pixels are not square ({stream.sample_aspect_ratio})")
            step = stream.time_base
    except FFmpegError as error:
        raise refuse(error.strerror or "cannot be read") from None
    if _is_turned(data, tracks[0]):
        raise refuse("it is shown turned")
    times = [pts for pts, _ in packets]
    gaps = {later - earlier for earlier, later in itertools.pairwise(times)}
    if not times or times[0] != 0 or len(gaps) > 1:
        raise refuse(f"the rate is not constant from 0: {len(gaps)} different gaps, first frame at {times[:1]}")
    keys = [number for number, (_, is_key) in enumerate(packets) if is_key]
    longest = max(later - earlier for earlier, later in itertools.pairwise([*keys, len(packets)])) if keys else 0
    if not keys or keys[0] != 0 or longest > gop:
        raise refuse(f"up to {longest or len(packets)} frames between key frames, at most {gop} wanted")
    assert step is not None
    rate = 1 / (step * gaps.pop()) if gaps else Fraction(stream.average_rate or 1)
    return Stored(len(times), (rate.numerator, rate.denominator), context.width, context.height)


def _is_turned(data: bytes, track: list[tuple[str, int, int]]) -> bool:
    """Whether a track's header holds another matrix than the identity (ISO/IEC 14496-12, section 8.3.2)."""
    start, end = next(((start, end) for name, start, end in track if name == "tkhd"), (0, 0))
    matrix = data[end - 44 : end - 8]  # the nine numbers before width and height, at the end of the box
    identity = b"".join(n.to_bytes(4) for n in (0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000))
    return start == end or matrix != identity
