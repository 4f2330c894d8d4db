"""Convert any video to the canonical form, with the libraries inside PyAV and no separate FFmpeg.

The same frames and settings give the same bytes on every x86-64 machine. To that end, swscale runs in its bit-exact
mode, and x264 runs in one thread without its macroblock tree, which in this build is not reproducible on AVX-512 and
differs between CPU generations. This costs about 8 % more bytes at equal PSNR.
"""

import dataclasses
import functools
import io
import itertools
import math
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import av
import av.container
import av.filter
import numpy as np
from av.error import BlockingIOError, EOFError, FFmpegError
from av.video.frame import PictureType

from vjepa_data.child_process import heartbeat
from vjepa_data.decoding.backends import unpadded
from vjepa_data.decoding.orientation import Orientation
from vjepa_data.media.canonical import ClipFormat, read_canonical
from vjepa_data.media.display import TONE_MAP, orientation_in
from vjepa_data.media.frames import Timed, read_frames
from vjepa_data.media.probe import probe
from vjepa_data.media.video import Reason, Refused, VideoInfo
from vjepa_data.spec import Encode, Filter

MAX_GAP_S = 4 * 3600
"""Longest display of a frame, in seconds. A longer gap means damaged time stamps."""

MAX_FRAMES = 5_000_000
"""Most frames of a stored clip: two days at 30 per second. A few altered bytes can make a video of any length."""

SLOWEST_FPS = Fraction(1, 60)
"""Slowest rate that is stored as it is. Slower videos are stored at 1 frame per second."""

MARGIN = Fraction(11, 10)
"""Factor by which a rate may exceed `max_fps` before frames are left out. Telephones record 30.5 where they mean 30."""

MAX_SIDE = 16384
"""Longest side of a frame that x264 encodes, in pixels."""

INDEXED = frozenset(["mov", "mp4", "matroska", "webm"])
"""Containers whose times do not depend on where decoding begins."""

MAX_DIFFERENCE = 16.0
"""Largest mean difference of 64 blocks of a stored frame from the blocks of its source, in grey levels of 255."""

Frame = TypeVar("Frame")


@dataclass(frozen=True)
class PictureBox:
    """A part of a frame, in displayed pixels."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class StoredClip:
    """Bytes and properties of a stored clip."""

    data: bytes
    stored: ClipFormat
    samples: tuple["SourceSample", ...] = ()
    """The first, middle and last frame, as they must look. Empty for clips that were not encoded."""


@dataclass(frozen=True)
class SourceSample:
    """The picture that a frame of a stored clip must show, reduced to a few pixels."""

    number: int
    """Number of the frame in the stored clip."""
    thumbnail: np.ndarray
    """From `thumbnail`."""


def stored_rate(rate: Fraction, *, encode: Encode) -> Fraction:
    """Compute the frame rate of the stored clip from that of the video, or of its densest part if the rate varies.

    A rate above `max_fps` is divided by an integer, so that 60 becomes 30 and 50 becomes 25.
    """
    if encode.fps is not None:
        return Fraction(encode.fps).limit_denominator(1001)
    if rate < SLOWEST_FPS:
        return Fraction(1)
    return rate / max(1, math.ceil(rate / Fraction(encode.max_fps).limit_denominator(1001) / MARGIN))


def stored_size(width: int, height: int, *, encode: Encode) -> tuple[int, int]:
    """Compute width and height of the stored clip. The longer side is rounded to an even number."""
    short = encode.short_side_px
    if width <= height:
        return short, 2 * max(1, round(height * short / width / 2))
    return 2 * max(1, round(width * short / height / 2)), short


def resample_frames(
    frames: Iterator[tuple[Fraction, Frame]], *, start_s: float | None, seconds: float | None, rate: Fraction
) -> Iterator[Frame]:
    """Resample frames to a constant rate by choosing the frame on display at each tick.

    Output frame k is the last input frame that starts at or before `start_s + k / rate`, with a tolerance of a quarter
    of a tick for rounded time stamps. A frame may be repeated or skipped.

    Args:
        frames: pairs of time in seconds and frame, in order.
        start_s: time of output frame 0 (default: that of the first input frame).
        seconds: length of the part to use (default: up to the last frame).
        rate: output frames per second.

    Raises:
        Refused: two times are more than `MAX_GAP_S` apart, or not in order.
    """
    ticks = None if seconds is None else max(1, round(Fraction(seconds) * rate))
    start = None if start_s is None else Fraction(start_s)
    slack = Fraction(1, 4) / rate
    last: Frame | None = None
    last_time, tick = Fraction(0), 0
    for time, frame in frames:
        start = time if start is None else start
        if last is not None and not 0 <= time - last_time <= MAX_GAP_S:
            raise Refused(Reason.DAMAGED, f"time stamps jump from {float(last_time):.3f} to {float(time):.3f} s")
        while last is not None and start + tick / rate + slack < time:
            yield last
            tick += 1
            if tick == ticks:
                return
        last, last_time = frame, time
    if last is not None and start is not None and start + tick / rate <= last_time + slack:
        yield last


def transcode(
    path: Path,
    *,
    start_s: float | None,
    end_s: float | None,
    encode: Encode,
    accept: Filter,
    box: PictureBox | None = None,
    info: VideoInfo | None = None,
) -> StoredClip:
    """Encode a video, or a part of it, in the canonical form.

    Args:
        path: a local file.
        start_s, end_s: the part to use, in seconds from the first frame (default: the entire video).
        encode: size, rate and quality.
        accept: limits of motion and brightness.
        box: the part of each frame to use (default: the entire frame).
        info: properties of the file, if they are known. Otherwise the whole file is read once more.

    Raises:
        Refused: the video cannot be decoded from start to end, ends early, or is below the limits.
    """
    info = info or probe(path)
    rate = stored_rate(Fraction(*(info.dense_rate or info.rate)), encode=encode)
    begin = start_s or 0.0
    seconds = None if end_s is None else end_s - begin
    expected = info.duration_s - begin if seconds is None else seconds
    if expected * rate > MAX_FRAMES:
        size = f"{expected * float(rate):.0f} frames at {float(rate):g} per second"
        raise Refused(Reason.TOO_LONG, f"{size}, maximum: {MAX_FRAMES}; cut it (cut.kind=fixed) or lower encode.fps")
    watch = _Watch(begin, rate, round(expected * rate) // 2)
    frames = resample_frames(
        watch.pass_on(read_frames(path, info, start_s=begin)), start_s=begin or None, seconds=seconds, rate=rate
    )
    first = next(frames, None)
    if first is None:
        raise Refused(Reason.DAMAGED, "no frame in the requested time range")
    width, height = stored_size(*((box.width, box.height) if box else (info.width, info.height)), encode=encode)
    if max(width, height) > MAX_SIDE:
        raise Refused(Reason.TOO_NARROW, f"would be stored as {width}x{height}, H.264 allows {MAX_SIDE}")
    make_graph = functools.partial(_graph, first, info=info, width=width, height=height, box=box)
    graph = make_graph(deinterlaces=True)
    pictures = _filtered(graph, itertools.chain([first], frames), delays=first.interlaced_frame)
    clip = _encode(pictures, width, height, rate=rate, encode=encode, accept=accept)
    actual = clip.stored.frames / float(rate)
    if expected - actual > max(0.5, 0.02 * expected, 2 / info.fps):
        ends = f"the video ends after {begin + actual:.2f} s, but {begin + expected:.2f} s are declared or requested"
        raise Refused(Reason.TRUNCATED, ends)
    seen = watch.sources(clip.stored.frames)
    if begin and not set(info.container.split(",")) & INDEXED:
        _check_start(path, info, begin, seen[0])
    if first.interlaced_frame:
        graph = make_graph(deinterlaces=False)
    numbers = sorted(seen)
    pictures = _filtered(graph, (seen[number] for number in numbers), delays=False)
    thumbnails = [thumbnail(picture.to_ndarray(format="rgb24")) for picture in pictures]
    return dataclasses.replace(clip, samples=tuple(map(SourceSample, numbers, thumbnails)))


class _Watch:
    """Remembers the source frames on display at the first, a middle and the last frame of a clip.

    It looks at the decoded frames before they are resampled, so that the stored clip can be compared with its source.
    """

    def __init__(self, begin: float, rate: Fraction, middle: int) -> None:
        self._begin, self._rate, self._middle = Fraction(begin), rate, middle
        self._found: dict[int, av.VideoFrame] = {}
        self._latest: deque[Timed] = deque(maxlen=2)

    def pass_on(self, frames: Iterator[Timed]) -> Iterator[Timed]:
        for time, frame in frames:
            for number in (0, self._middle):
                if number not in self._found or self._is_shown(time, number):
                    self._found[number] = frame
            self._latest.append((time, frame))
            yield time, frame

    def _is_shown(self, time: Fraction, number: int) -> bool:
        return time <= self._begin + (number + Fraction(1, 4)) / self._rate

    def sources(self, frames: int) -> dict[int, av.VideoFrame]:
        """Return the source frames by number in a clip of this many frames."""
        found = {number: frame for number, frame in self._found.items() if number < frames}
        shown = [frame for time, frame in self._latest if self._is_shown(time, frames - 1)]
        return {**found, frames - 1: shown[-1]} if shown else found


def _check_start(path: Path, info: VideoInfo, begin: float, first: av.VideoFrame) -> None:
    """Decode the first frame of a part once more, from an earlier place, since times may depend on the place.

    Raises:
        Refused: it is another picture.
    """
    slack = Fraction(1, 4) / Fraction(*info.rate)
    shown: av.VideoFrame | None = None
    for time, frame in read_frames(path, info, start_s=begin, skip=1):
        if shown is not None and time > begin + slack:
            break
        shown = frame
    if shown is None or not np.array_equal(shown.to_ndarray(format="gray"), first.to_ndarray(format="gray")):
        raise Refused(Reason.CHECK_FAILED, f"the picture at {begin:g} s depends on where decoding begins")


def thumbnail(rgb: np.ndarray) -> np.ndarray:
    """Reduce a picture, uint8 [H W 3], to the grey levels of 8 x 8 blocks, float32."""
    rows = np.array_split(rgb.mean(axis=2, dtype=np.float32), 8, axis=0)
    return np.array([[block.mean() for block in np.array_split(row, 8, axis=1)] for row in rows], np.float32)


def _encode(
    pictures: Iterator[av.VideoFrame], width: int, height: int, *, rate: Fraction, encode: Encode, accept: Filter
) -> StoredClip:
    """Encode pictures that have their final size and format."""
    # A file in memory, so that a killed process leaves nothing behind. FFmpeg needs its name, because a second pass
    # moves the index to the front.
    with os.fdopen(os.memfd_create("clip"), "w+b") as file:
        target = av.open(
            f"/proc/self/fd/{file.fileno()}",
            "w",
            format="mp4",
            options={"movflags": "+faststart+negative_cts_offsets", "use_editlist": "0", "fflags": "+bitexact"},
        )
        output = target.add_stream("libx264", rate=rate)
        output.width, output.height, output.pix_fmt = width, height, "yuv420p"
        output.time_base = 1 / rate
        output.thread_count = 1
        output.options = {
            "preset": encode.preset,
            "crf": str(encode.crf),
            "g": str(encode.gop),
            "keyint_min": str(encode.gop),
            "sc_threshold": "0",
            "tune": "fastdecode",
            "flags": "+bitexact+cgop",
            "x264-params": "mbtree=0",
        }
        stats = ContentStats(rate)
        count = 0
        for count, frame in enumerate(pictures, start=1):
            stats.add(frame)
            frame.pts, frame.time_base, frame.pict_type = count - 1, 1 / rate, PictureType.NONE
            target.mux(output.encode(frame))
        target.mux(output.encode(None))
        target.close()
        file.seek(0)
        data = file.read()
    stats.check(accept)
    return StoredClip(data, ClipFormat(count, (rate.numerator, rate.denominator), width, height))


def _filtered(graph: av.filter.Graph, frames: Iterator[av.VideoFrame], *, delays: bool) -> Iterator[av.VideoFrame]:
    """Yield the output of filters. If they delay frames, output is not aligned with input, and they are used up.

    Raises:
        Refused: the library cannot convert these pixels.
    """
    for frame in itertools.chain(frames, [None] if delays else []):
        graph.vpush(frame)
        while True:
            try:
                filtered = graph.vpull()
            except (BlockingIOError, EOFError):
                break
            except FFmpegError as error:
                raise Refused(Reason.NO_DECODER, f"its pixels cannot be converted: {error.strerror}") from None
            yield filtered


def _crop(frame: av.VideoFrame, turn: Orientation, info: VideoInfo, box: PictureBox) -> str:
    """Return the options of the crop filter, whose input is upright, but may have non-square pixels."""
    size = turn.size(frame.width, frame.height)
    across, down = (Fraction(now, side) for now, side in zip(size, (info.width, info.height), strict=True))
    width, left, height, top = (
        2 * int(number * scale / 2)
        for number, scale in ((box.width, across), (box.left, across), (box.height, down), (box.top, down))
    )
    return f"{width}:{height}:{left}:{top}"


def _graph(
    frame: av.VideoFrame,
    *,
    info: VideoInfo,
    width: int,
    height: int,
    box: PictureBox | None,
    deinterlaces: bool,
) -> av.filter.Graph:
    """Build the filters that deinterlace, turn, crop, scale and tone-map a frame to the stored form."""
    graph = av.filter.Graph()
    graph.threads = 1
    chain = [
        graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1000)
        )
    ]
    if frame.interlaced_frame and deinterlaces:
        chain.append(graph.add("bwdif", "mode=send_frame:deint=interlaced"))
    turn = orientation_in(info, frame)
    chain.extend(graph.add(name, options) for name, options in turn.filters)
    if box is not None:
        chain.append(graph.add("crop", _crop(frame, turn, info, box)))
    colour = f":{TONE_MAP}" if info.transfer else ""
    chain.append(graph.add("scale", f"{width}:{height}:flags=bicubic+accurate_rnd+bitexact:out_range=tv{colour}"))
    chain.append(graph.add("setsar", "1"))
    chain.append(graph.add("format", "pix_fmts=yuv420p"))
    chain.append(graph.add("buffersink"))
    for previous, following in itertools.pairwise(chain):
        previous.link_to(following)
    graph.configure()
    return graph


class ContentStats:
    """Brightness of a clip, and change between frames a second apart, in grey levels of 255."""

    def __init__(self, rate: Fraction) -> None:
        self._every = max(1, round(rate))
        self._seen = 0
        self._last: np.ndarray | None = None
        self._brightness: list[float] = []
        self._changes: list[float] = []

    def add(self, frame: av.VideoFrame) -> None:
        if self._seen % self._every == 0:
            plane = frame.planes[0]
            luma = (
                np.frombuffer(memoryview(plane), np.uint8)
                .reshape(-1, plane.line_size)[::4, : frame.width : 4]
                .astype(np.float32)
            )
            self._brightness.append(float(luma.mean()))
            if self._last is not None:
                self._changes.append(float(np.abs(luma - self._last).mean()))
            self._last = luma
        self._seen += 1

    def check(self, accept: Filter) -> None:
        """Reject a clip that is below the limits."""
        brightness = max(self._brightness, default=0.0)
        change = max(self._changes, default=math.inf)
        if brightness < accept.min_brightness:
            raise Refused(Reason.DARK, f"mean luma {brightness:.1f}, minimum: {accept.min_brightness:g}")
        if change < accept.min_motion:
            raise Refused(Reason.STILL, f"frames differ by {change:.2f}, minimum: {accept.min_motion:g}")


def check(clip: StoredClip, *, gop: int) -> None:
    """Check that a clip has the canonical form, that the training decoder returns every frame, and that it shows them.

    Raises:
        Refused: it is not canonical, decord fails or returns a different number or size of frames, or the first, middle
            or last frame differs from its source.
    """
    found = read_canonical(clip.data, gop=gop)
    if found != clip.stored:
        raise Refused(Reason.NOT_CANONICAL, f"{found} in the file, but {clip.stored} encoded")
    decode_all(clip.data, frames=found.frames, width=found.width, height=found.height, samples=clip.samples)


def decode_all(data: bytes, *, frames: int, width: int, height: int, samples: Sequence[SourceSample] = ()) -> None:
    """Decode every frame of a stored clip with the training decoder.

    Raises:
        Refused: decord fails, returns a different number or size of frames, or a frame differs from its sample.
    """
    reader, errors = open_decord(data)
    wanted = {sample.number: sample.thumbnail for sample in samples}
    shapes = set()
    try:
        for number in range(len(reader)):
            heartbeat()
            picture = unpadded(reader.next().asnumpy())
            shapes.add(picture.shape)
            if number in wanted and np.abs(thumbnail(picture) - wanted[number]).mean() > MAX_DIFFERENCE:
                raise Refused(Reason.CHECK_FAILED, f"frame {number} of {frames} differs from its source")
    except errors as error:
        raise Refused(Reason.CHECK_FAILED, f"decord: {decord_message(error)}") from None
    if len(reader) != frames or shapes != {(height, width, 3)}:
        raise Refused(
            Reason.CHECK_FAILED,
            f"decord returns {len(reader)} frames of {sorted(shapes)}, expected {frames} of {width}x{height}",
        )


def open_decord(data: bytes) -> tuple[Any, tuple[type[Exception], ...]]:
    """Open a clip with decord, and return the reader and the exceptions that it raises for damaged clips.

    decord loads a second FFmpeg, which only a child process should do.
    """
    import decord

    errors = (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError)
    try:
        return decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), num_threads=1, fault_tol=1), errors
    except errors as error:
        raise Refused(Reason.CHECK_FAILED, f"decord: {decord_message(error)}") from None


def decord_message(error: Exception) -> str:
    """Extract decord's message without time and code location, so that builds are reproducible."""
    return re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", str(error).splitlines()[-1])
