"""Decode the frames of any video with their times, from its start or from the middle.

    read_frames --> pass from the key frame before `start_s` --> is its first frame late? --> pass from an earlier one

Seeking lands late in some containers. Frames that are missing at the start of a part are never filled in: each pass
shows the time of its first frame, and an earlier pass replaces a pass that begins too late.
"""

from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import av.container
from av.error import FFmpegError
from av.video.stream import VideoStream

from vjepa_data.child_process import heartbeat
from vjepa_data.media.timeline import BROADCAST, RAW, SLOTTED, PacketClock, declared_rate, is_flush, read_packets
from vjepa_data.media.video import FORMATS, Reason, Refused, SeekPoint, VideoInfo, open_video, video_stream

STEPS_BACK_S = (0, 1, 2, 4, 8, 16, 32)
"""Seconds to seek back, in turn, until a pass begins early enough. The last attempt begins at the start."""

TRUSTED = 16
"""Frames after missing frames count once so many packets gave no error. Tuned by hand on joined recordings."""

NUMBERED = ("h264", "hevc")
"""Codecs that number their pictures, so that the decoder notices missing pictures. Others show a wrong picture."""

Timed = tuple[Fraction, av.VideoFrame]


def read_frames(path: Path, info: VideoInfo, *, start_s: float = 0.0, skip: int = 0) -> Iterator[Timed]:
    """Decode a video from the key frame at or before a time, and reject damage instead of concealing it.

    A recording that begins or ends inside a group of pictures is read from its first to its last whole picture.

    Args:
        path: a local file.
        info: its properties.
        start_s: time of the first frame that is needed, in seconds from the first frame.
        skip: number of suitable places to begin that are passed over, to read the same frames by another way.

    Yields:
        The time of each frame in seconds from the first frame of the video, and the frame.

    Raises:
        Refused: a frame is damaged, or differs from the first in size or pixel format.
    """
    slack = 1 / (4 * info.fps)
    for start in _starts(info, start_s):
        frames = Pass(path, info, start).frames()
        try:
            first = next(frames, None)
        except Refused:
            if start is None:
                raise
            continue
        if start is None or (first is not None and first[0] <= start_s + slack):
            if start is not None and skip:
                skip -= 1
                continue
            if first is not None:
                yield first
                yield from frames
            return


def read_pipe(file: BinaryIO) -> Iterator[Timed]:
    """Decode a video that is read once from its start, such as standard input, as its bytes arrive.

    Its properties come from its header alone. A container that can be cut anywhere (MPEG-TS, Matroska) is best. An MP4
    must be fragmented or have its index in front.

    Args:
        file: a pipe, opened for reading bytes.

    Yields:
        The time of each frame in seconds from the first frame, and the frame.

    Raises:
        Refused: the bytes are not a video, or are damaged.
    """
    try:
        container = av.open(file, "r", options={"format_whitelist": FORMATS}, metadata_errors="replace")
    except FFmpegError as error:
        raise Refused(Reason.NOT_VIDEO, error.strerror or "") from None
    with container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream):
            raise Refused(Reason.NO_VIDEO_STREAM, f"none of {len(container.streams)} streams is a video")
        rate = declared_rate(stream)
        header = VideoInfo(
            bytes=0, container=container.format.name, codec=stream.codec_context.name, pixel_format="", width=0,
            height=0, rate=(rate.numerator, rate.denominator), duration_s=0.0, frames=0, start_s=0.0, audio=False,
            stream=stream.index,
        )  # fmt: skip
        start: Fraction | None = None
        for time, frame in Pass(Path(), header, None).frames_of(container):
            start = time if start is None else start
            yield time - start, frame


def _starts(info: VideoInfo, start_s: float) -> Iterator[SeekPoint | float | None]:
    """Yield places where a pass may begin, from the latest to the start of the file (None)."""
    if info.container in BROADCAST | RAW:
        yield from (point for point in reversed(info.seek_points) if 0 < point.time_s <= start_s + 1e-6)
    elif not info.is_joined:
        yield from (start_s - back for back in STEPS_BACK_S if start_s - back > 0)
    yield None


class Pass:
    """A pass over the frames of a video.

    Args:
        path: a local file.
        info: its properties.
        start: where to begin: a seek point, a time in seconds from the first frame, or None for the start.
    """

    def __init__(self, path: Path, info: VideoInfo, start: SeekPoint | float | None) -> None:
        self._path, self._info, self._start = path, info, start
        self._is_recording = info.container in BROADCAST | RAW
        self._needs_key = True
        self._key_ticks = 0
        """Display time of the key frame where decoding began. Frames before it may refer to missing ones."""
        self._is_leading = self._drops_leading = False
        self._gap_ticks: int | None = None
        """Display time of the first picture after missing ones. They may be referred to up to the next key frame."""
        self._doubtful: list[av.VideoFrame] = []
        """Frames after missing ones. They count unless an error follows before `TRUSTED` packets or a key frame."""
        self._doubted = 0
        self._slots: deque[int] = deque()
        self._number, self._form = 0, None
        self._last_ticks = 0
        self._last: av.VideoFrame | None = None
        self.fed = 0
        """Packets given to the decoder so far."""

    def frames(self) -> Iterator[Timed]:
        """Decode to the end of the file."""
        with open_video(self._path) as container:
            yield from self.frames_of(container)
        if not self._number and self._start is None and self._needs_key:
            self._needs_key = False  # nothing is marked as a key frame
            with open_video(self._path) as container:
                yield from self.frames_of(container)

    def frames_of(self, container: av.container.InputContainer) -> Iterator[Timed]:
        """Decode an open container to its end."""
        self._open(container)
        yield from self._all(container)

    def _open(self, container: av.container.InputContainer) -> None:
        info = self._info
        self._stream = video_stream(container, info.stream)
        self._base = self._stream.time_base or Fraction(1, 1000)
        self._origin = round(Fraction(info.start_s) / self._base)
        start = self._start
        point = start if isinstance(start, SeekPoint) else None
        self._clock = PacketClock(info.container, self._base, Fraction(*info.rate), point)
        if start is None:
            return
        target = start.position if isinstance(start, SeekPoint) else int((start + info.start_s) / self._base)
        try:
            container.seek(target, stream=self._stream, unsupported_byte_offset=point is not None)
        except FFmpegError as error:
            raise Refused(Reason.DAMAGED, f"cannot be searched: {error.strerror}") from None

    def _all(self, container: av.container.InputContainer) -> Iterator[Timed]:
        held: av.Packet | None = None  # one behind, to know the last packet before a jump or the end
        for packet in self._packets(container):
            heartbeat()
            is_end = is_flush(packet)
            jumps = not is_end and self._clock.stamp(packet)
            is_late = not is_end and self._clock.is_late
            if held is not None:
                yield from self._decode(held, is_last=is_end or jumps or is_late)
            if is_late and self._gap_ticks is None:
                self._gap_ticks = packet.dts if packet.pts is None else packet.pts
            if jumps or (is_late and self._stream.codec_context.name not in NUMBERED):
                yield from self._wait_for_key()
            held = None if is_end else packet
        if held is not None:
            yield from self._decode(held, is_last=True)
        yield from self._trust()
        yield from self._drain()
        yield from self._hold()

    def _hold(self) -> Iterator[Timed]:
        """Repeat the last frame where its display ends, if it is displayed for longer than other frames."""
        period = min(Fraction(1), 1 / Fraction(*(self._info.dense_rate or self._info.rate)))
        if self._last is not None and self._last.duration:
            held = self._last.duration * self._base
            if held > period * 3 / 2:
                yield (self._last_ticks - self._origin) * self._base + held - period, self._last

    def _packets(self, container: av.container.InputContainer) -> Iterator[av.Packet]:
        try:
            yield from read_packets(lambda: container.demux(self._stream))
        except FFmpegError as error:
            raise self._damaged(error) from None

    def _damaged(self, error: FFmpegError) -> Refused:
        return Refused(Reason.DAMAGED, f"after {self._number} frames: {error.strerror}")

    def _decode(self, packet: av.Packet, *, is_last: bool) -> Iterator[Timed]:
        if self._needs_key and not self._begin(packet):
            return
        is_ahead = packet.pts is not None and packet.pts < self._key_ticks and self._info.container not in SLOTTED
        self._is_leading = self._is_leading and (is_ahead or packet.is_keyframe)
        is_broken = self._is_recording and (is_last or self._gap_ticks is not None)
        if is_broken and packet.is_corrupt:
            yield from self._wait_for_key()
            return
        if self._gap_ticks is not None:
            self._doubted += 1
            if packet.is_keyframe or self._doubted > TRUSTED:
                yield from self._trust()
        if packet.dts is not None and self._info.container in SLOTTED:
            self._slots.append(packet.dts)
        self.fed += 1
        try:
            frames = self._stream.codec_context.decode(packet)
        except FFmpegError as error:
            is_first = not self._number and self._info.container in SLOTTED
            if is_broken:
                yield from self._wait_for_key()
            elif packet.has_sidedata("encryption_info"):
                raise Refused(Reason.DAMAGED, f"encrypted after {self._number} frames; decrypt it first") from None
            elif not (self._is_leading or is_first):
                raise self._damaged(error) from None
            return
        if any(frame.is_corrupt and _is_from(frame, self._gap_ticks) for frame in frames):
            yield from self._wait_for_key()
        else:
            yield from self._timed(frames)

    def _wait_for_key(self) -> Iterator[Timed]:
        """Yield the frames before a gap, if any, and leave out all packets up to the next key frame."""
        yield from self._drain(end=self._gap_ticks)
        self._doubtful, self._doubted, self._gap_ticks = [], 0, None
        self._stream.codec_context.flush_buffers()
        self._needs_key = True

    def _trust(self) -> Iterator[Timed]:
        """Yield the frames after missing frames, since no error followed."""
        frames, self._doubtful, self._doubted, self._gap_ticks = self._doubtful, [], 0, None
        yield from self._timed(frames)

    def _begin(self, packet: av.Packet) -> bool:
        """Begin at the first key frame, and return whether this packet is that."""
        if not packet.is_keyframe:
            return False
        self._needs_key, self._is_leading = False, True
        self._drops_leading = self._start is not None or self._number > 0
        self._key_ticks = (packet.dts if packet.pts is None else packet.pts) or 0
        if isinstance(self._start, SeekPoint) and not self._number:
            is_there = (
                packet.dts == self._start.ticks if self._info.container in RAW else packet.pts == self._start.ticks
            )
            if not is_there:
                raise Refused(Reason.DAMAGED, "the seek point is not where it was")
        return True

    def _drain(self, end: int | None = None) -> Iterator[Timed]:
        """Yield the frames that the decoder holds back, as far as they are displayed before `end`."""
        try:
            frames = self._stream.codec_context.decode(None)
        except FFmpegError as error:
            if self._is_recording:
                return
            raise self._damaged(error) from None
        yield from self._timed([f for f in frames if not _is_from(f, end)], is_drained=True)

    def _timed(self, frames: list[av.VideoFrame], *, is_drained: bool = False) -> Iterator[Timed]:
        for frame in frames:
            if _is_from(frame, self._gap_ticks):
                self._doubtful.append(frame)
                continue
            ticks = self._ticks(frame)
            is_before_key = ticks < self._key_ticks and self._info.container not in SLOTTED
            if is_before_key and (frame.is_corrupt or self._drops_leading):
                continue
            self._number += 1
            if frame.is_corrupt:
                if is_drained and self._is_recording:
                    continue
                raise Refused(Reason.DAMAGED, f"frame {self._number} is damaged")
            form = (frame.width, frame.height, frame.format.name)
            if self._form not in (None, form):
                size = f"{frame.width}x{frame.height}"
                raise Refused(Reason.SIZE_CHANGES, f"frame {self._number} is {size}, previously {self._form}")
            self._form, self._last_ticks, self._last = form, ticks, frame
            yield (ticks - self._origin) * self._base, frame
        if self._stream.codec_context.name not in ("h264", "hevc"):
            while len(self._slots) > self._info.delay:  # packets that gave no frame
                self._slots.popleft()

    def _ticks(self, frame: av.VideoFrame) -> int:
        if self._info.container in SLOTTED:
            return self._slots.popleft() if self._slots else self._last_ticks + self._clock.period
        if frame.pts is not None:
            return frame.pts
        return self._last_ticks + (frame.duration or self._clock.period)


def _is_from(frame: av.VideoFrame, ticks: int | None) -> bool:
    """Tell whether a frame is displayed at a time or later. No time is later than all."""
    return ticks is not None and frame.pts is not None and frame.pts >= ticks
