"""Open video files, and name the reasons for rejecting them."""

import stat
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
import av.container
import av.video.stream
from av.error import FFmpegError

FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,gif,mxf,dv,rm,h264,hevc,ivf,nut,y4m"
    ",yuv4mpegpipe,av1,obu,wtv"
)
"""Accepted containers. Playlists (HLS, DASH, concat) are excluded because they refer to other files."""

SUFFIXES = frozenset(
    """.mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .m2v .ts .m2ts .mts .vob .flv .wmv .asf .ogv .ogg .gif .3gp .3g2 .mxf
    .dv .ivf .y4m .h264 .264 .h265 .hevc .265 .divx .rm .rmvb .f4v .qt .mpe .m1v .m2p .mp2v .mpv .m2t .tp .trp .tod .mod
    .3gpp .3gpp2 .ogm .ogx .nut .wtv .obu .av1 .mj2 .xvid""".split()  # noqa: SIM905
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
    ODD_ROTATION = "odd_rotation"
    """The video is to be displayed at an angle that is not a multiple of 90 degrees."""
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
    SKIPPED = "skipped"
    """A file or folder that is not read: a link to a folder, a compressed tar, a member of a tar with holes."""
    CHANGED = "changed"
    """The size of the file has changed since the analysis."""
    BAD_RANGE = "bad_range"
    """The requested time range lies outside the video."""
    NOT_CANONICAL = "not_canonical"
    """The encoded clip does not have the canonical form, which is a bug."""
    CHECK_FAILED = "check_failed"
    """The stored clip differs from its source, or the training decoder does not reproduce it."""
    DECODERS_DIFFER = "decoders_differ"
    """The decoders of a run show different pictures of a foreign clip, or only one of them is right."""
    TIMED_OUT = "timed_out"
    """Reading, encoding or checking made no progress for `timeout_s`, twice."""
    CRASHED = "crashed"
    """Reading, encoding or checking raised an unexpected exception, or killed its process twice."""


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


class SeekPoint(NamedTuple):
    """A key frame and its place in a file that has no index of its own."""

    time_s: float
    """Its time in seconds from the first frame."""
    ticks: int
    """Its time on the continuous time line (`timeline.PacketClock`), in the stream's time base."""
    position: int
    """Offset of its first byte in the file."""
    offset: int
    """Ticks from the times stored there to the continuous time line."""


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
    """Time stamp of the first frame."""
    audio: bool
    stream: int = 0
    """Number of the video stream in the file."""
    video_streams: int = 1
    """Number of video streams, without cover art."""
    dense_rate: tuple[int, int] | None = None
    """Frames per second of the densest part, if the rate varies."""
    transfer: str = ""
    """Transfer function of an HDR video: `smpte2084` (PQ) or `arib-std-b67` (HLG)."""
    is_joined: bool = False
    """The clock jumps, as where recordings were joined. The parts count as one video."""
    delay: int = 0
    """Frames that the decoder holds back, in containers without presentation times."""
    seek_points: tuple["SeekPoint", ...] = ()
    """Key frames, a few seconds apart, in files without an index of their own."""
    turn: tuple[str | None, bool, bool] | None = None
    """Orientation, as in `decoding.orientation`, that only a message (SEI) with the first frame states. It holds for
    the whole video. A matrix of the container comes with every frame instead."""

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


def video_stream(container: av.container.InputContainer, index: int) -> av.video.stream.VideoStream:
    """Return a video stream by its number in the file, set to decode in one thread and to report damage."""
    stream = container.streams[index]
    assert isinstance(stream, av.video.stream.VideoStream)
    stream.thread_count = 1
    stream.thread_type = "NONE"
    stream.codec_context.options = {"err_detect": "explode"}
    return stream
