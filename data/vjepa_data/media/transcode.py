"""Convert any video to the canonical form, with the libraries inside PyAV and no separate FFmpeg.

The same frames and settings give the same bytes on every x86-64 machine. To that end, swscale runs in its bit-exact
mode, and x264 runs in one thread without its macroblock tree, which in this build is not reproducible on AVX-512 and
differs between CPU generations. This costs about 8 % more bytes at equal PSNR.
"""

import io
import itertools
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import av
import av.container
import av.filter
import av.video.stream
import numpy as np
from av.error import BlockingIOError, EOFError, FFmpegError
from av.video.frame import PictureType

from vjepa_data.media.video import (
    ClipFormat,
    Reason,
    Refused,
    open_video,
    probe,
    read_canonical,
    shown_size,
    video_stream,
)
from vjepa_data.spec import Encode, Filter

ROTATION_FILTERS = {
    0: (),
    90: (("transpose", "cclock"),),
    180: (("hflip", None), ("vflip", None)),
    270: (("transpose", "clock"),),
}
"""FFmpeg filters that rotate a frame counter-clockwise by a number of degrees."""

UNTIMED = frozenset(["avi", "h264", "hevc", "mpegvideo", "m4v", "av1", "obu", "yuv4mpegpipe"])
"""Containers without presentation times."""

MAX_GAP_S = 60
"""Longest time between two frames, in seconds. A longer gap means damaged time stamps."""

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


def stored_rate(rate: Fraction, *, encode: Encode) -> Fraction:
    """Compute the frame rate of the stored clip from that of the video.

    A rate above `max_fps` is divided by an integer, so that 60 becomes 30 and 50 becomes 25.
    """
    if encode.fps is not None:
        return Fraction(encode.fps).limit_denominator(1001)
    return rate / max(1, math.ceil(rate / Fraction(encode.max_fps).limit_denominator(1001) - Fraction(1, 100)))


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
) -> StoredClip:
    """Encode a video, or a part of it, in the canonical form.

    Args:
        path: a local file.
        start_s, end_s: the part to use, in seconds from the first frame (default: the entire video).
        encode: size, rate and quality.
        accept: limits of motion and brightness.
        box: the part of each frame to use (default: the entire frame).

    Raises:
        Refused: the video cannot be decoded from start to end, ends early, or is below the limits.
    """
    info = probe(path)
    rate = stored_rate(Fraction(*info.rate), encode=encode)
    seconds = None if end_s is None else end_s - (start_s or 0.0)
    with open_video(path) as source:
        stream = video_stream(source)
        begin = None if not start_s else info.start_s + start_s
        frames = resample_frames(
            decode(source, stream, begin, Fraction(*info.rate)), start_s=begin, seconds=seconds, rate=rate
        )
        clip = _encode(frames, stream, rate=rate, encode=encode, accept=accept, box=box)
    # Without a frame count, the declared duration may be that of the audio.
    is_declared = seconds is not None or not info.audio or info.frames
    expected = seconds if seconds is not None else info.duration_s - (start_s or 0.0)
    actual = clip.stored.frames / float(rate)
    if is_declared and expected - actual > max(0.5, 0.02 * expected, 2 / info.fps):
        raise Refused(Reason.TRUNCATED, f"{actual:.2f} s of video, but {expected:.2f} s declared")
    return clip


def decode(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, begin: float | None, rate: Fraction
) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Decode from the key frame at or before a time of the stream, and reject damage instead of concealing it.

    Yields the time of each frame in seconds, and the frame. If the container stores no presentation times (AVI, raw
    streams), times are computed from `rate`.

    Raises:
        Refused: a frame is damaged, or differs from the first in size or pixel format.
    """
    stream.codec_context.options = {"err_detect": "explode"}
    is_timed = container.format.name not in UNTIMED
    if begin is not None and stream.time_base and is_timed:
        container.seek(int(begin / stream.time_base), stream=stream)
    number, size = 0, None
    try:
        for number, frame in enumerate(container.decode(stream), start=1):
            if frame.is_corrupt:
                raise Refused(Reason.DAMAGED, f"frame {number} is damaged")
            if size not in (None, (frame.width, frame.height, frame.format.name)):
                raise Refused(Reason.SIZE_CHANGES, f"frame {number} is {frame.width}x{frame.height}, previously {size}")
            size = (frame.width, frame.height, frame.format.name)
            if is_timed and frame.pts is not None and frame.time_base is not None:
                yield frame.pts * frame.time_base, frame
            else:
                yield (number - 1) / rate, frame
    except FFmpegError as error:
        raise Refused(Reason.DAMAGED, f"after {number} frames: {error.strerror}") from None


def _encode(
    frames: Iterator[av.VideoFrame],
    stream: av.video.stream.VideoStream,
    *,
    rate: Fraction,
    encode: Encode,
    accept: Filter,
    box: PictureBox | None,
) -> StoredClip:
    first = next(frames, None)
    if first is None:
        raise Refused(Reason.DAMAGED, "no frame in the requested time range")
    shown = shown_size(first, stream)
    width, height = stored_size(*((box.width, box.height) if box else shown), encode=encode)
    graph = _graph(first, width, height, crop=_crop(first, shown, box) if box else None)
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
        for count, frame in enumerate(_filtered(graph, itertools.chain([first], frames)), start=1):
            stats.add(frame)
            frame.pts, frame.time_base, frame.pict_type = count - 1, 1 / rate, PictureType.NONE
            target.mux(output.encode(frame))
        target.mux(output.encode(None))
        target.close()
        file.seek(0)
        data = file.read()
    stats.check(accept)
    return StoredClip(data, ClipFormat(count, (rate.numerator, rate.denominator), width, height))


def _filtered(graph: av.filter.Graph, frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Yield the output of the filters. A filter may delay frames, so output is not aligned with input."""
    for frame in itertools.chain(frames, [None]):
        graph.vpush(frame)
        while True:
            try:
                filtered = graph.vpull()
            except (BlockingIOError, EOFError):
                break
            yield filtered


def _crop(frame: av.VideoFrame, shown: tuple[int, int], box: PictureBox) -> str:
    """Return the options of the crop filter, whose input is upright, but may have non-square pixels."""
    size = (frame.height, frame.width) if frame.rotation % 180 else (frame.width, frame.height)
    across, down = (Fraction(now, side) for now, side in zip(size, shown, strict=True))
    width, left, height, top = (
        2 * int(number * scale / 2)
        for number, scale in ((box.width, across), (box.left, across), (box.height, down), (box.top, down))
    )
    return f"{width}:{height}:{left}:{top}"


def _graph(frame: av.VideoFrame, width: int, height: int, *, crop: str | None) -> av.filter.Graph:
    """Build the filters that deinterlace, rotate, crop and scale a frame to the stored form."""
    graph = av.filter.Graph()
    graph.threads = 1
    chain = [
        graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1000)
        )
    ]
    if frame.interlaced_frame:
        chain.append(graph.add("bwdif", "mode=send_frame:deint=interlaced"))
    chain.extend(graph.add(name, options) for name, options in ROTATION_FILTERS[frame.rotation % 360])
    if crop is not None:
        chain.append(graph.add("crop", crop))
    chain.append(graph.add("scale", f"{width}:{height}:flags=bicubic+accurate_rnd+bitexact:out_range=tv"))
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
            raise Refused(Reason.DARK, f"mean luma {brightness:.1f}; minimum: {accept.min_brightness:g}")
        if change < accept.min_motion:
            raise Refused(Reason.STILL, f"frames differ by {change:.2f}; minimum: {accept.min_motion:g}")


def check(data: bytes, stored: ClipFormat, *, gop: int) -> None:
    """Check that the bytes of a clip have the canonical form and that the training decoder returns every frame.

    Raises:
        Refused: it is not canonical, or decord fails or returns a different number or size of frames.
    """
    found = read_canonical(data, gop=gop)
    if found != stored:
        raise Refused(Reason.NOT_CANONICAL, f"{found} in the file, but {stored} encoded")
    decode_all(data, frames=stored.frames, width=stored.width, height=stored.height)


def decode_all(data: bytes, *, frames: int, width: int, height: int) -> None:
    """Decode every frame of a stored clip with the training decoder.

    Raises:
        Refused: decord fails, or returns a different number or size of frames.
    """
    reader, decord = open_decord(data)
    try:
        shapes = {reader.next().shape for _ in range(len(reader))}
    except decord.DECORDError as error:
        raise Refused(Reason.CHECK_FAILED, f"decord: {decord_message(error)}") from None
    if len(reader) != frames or shapes != {(height, width, 3)}:
        raise Refused(
            Reason.CHECK_FAILED,
            f"decord returns {len(reader)} frames of {sorted(shapes)}, expected {frames} of {width}x{height}",
        )


def open_decord(data: bytes) -> tuple[Any, Any]:
    """Open a clip with decord, and return the reader and the library.

    decord loads a second FFmpeg, which only a child process should do.
    """
    import decord

    try:
        return decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), num_threads=1, fault_tol=1), decord
    except decord.DECORDError as error:
        raise Refused(Reason.CHECK_FAILED, f"decord: {decord_message(error)}") from None


def decord_message(error: Exception) -> str:
    """Extract decord's message without time and code location, so that builds are reproducible."""
    return re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", str(error).splitlines()[-1])
