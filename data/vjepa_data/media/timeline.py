"""Times, key frames and rate of a video, from its packets alone, without decoding.

Headers may lack the length of a video, give that of another track, or be wrong. The packets tell it:

    packets --> PacketClock --> one continuous time line, also over joined recordings --> Track
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import av.container
import av.video.stream
from av.error import FFmpegError
from av.stream import Disposition

from vjepa_data.child_process import heartbeat
from vjepa_data.media.video import MAX_PIXELS, Reason, Refused, SeekPoint, open_video

RAW = frozenset(["h264", "hevc", "mpegvideo", "m4v", "av1", "obu", "yuv4mpegpipe"])
"""Streams without a container, which store no times."""

SLOTTED = RAW | {"avi"}
"""Formats whose packets have a place in the order of decoding, but no presentation time."""

BROADCAST = frozenset(["mpegts", "mpeg"])
"""Formats of recordings, which may begin and end anywhere and whose clock may jump."""

MAX_JUMP_S = 10
"""A larger step forward in a broadcast format is a jump of its clock (FFmpeg's `-dts_delta_threshold`)."""

MAX_BACKSTEP_S = 0.5
"""A larger step back is a jump of the clock, as where recordings were joined. Smaller steps are errors of muxers."""

SEEK_POINT_S = 5
"""Smallest distance of seek points, in seconds. It bounds the size of a stored analysis."""

VARYING = 1.15
"""Ratio of densest to mean rate above which the rate counts as varying."""


class PacketClock:
    """Puts the packets of a stream on one continuous time line, in the order of decoding.

    Args:
        container: format name of the container.
        time_base: of the stream.
        rate: frames per second, for packets without a duration.
        point: where reading begins, if not at the start.
    """

    def __init__(self, container: str, time_base: Fraction, rate: Fraction, point: SeekPoint | None = None) -> None:
        self._is_raw, self._is_broadcast = container in RAW, container in BROADCAST
        self._time_base = time_base
        self.period = max(1, round(1 / (rate * time_base)))
        """Ticks per frame."""
        self.offset = point.offset if point else 0
        self.is_late = False
        """In a broadcast format, more than a frame is missing before the last packet, without a jump of the clock."""
        self._next: int | None = (point.ticks if point else 0) if self._is_raw else None

    def stamp(self, packet: av.Packet) -> bool:
        """Write continuous times into a packet, and tell whether the clock jumped before it."""
        step = packet.duration or self.period
        if self._is_raw:
            assert self._next is not None
            packet.dts, self._next = self._next, self._next + step
        if not self._is_broadcast:
            return False
        dts = packet.dts if packet.dts is not None else packet.pts
        if dts is None:
            dts = 0 if self._next is None else self._next - self.offset
        gap = 0 if self._next is None else dts + self.offset - self._next
        jumps = not -MAX_BACKSTEP_S <= gap * self._time_base <= MAX_JUMP_S
        self.is_late = not jumps and gap > self.period
        self.offset -= gap if jumps else 0
        packet.dts = dts + self.offset
        packet.pts = None if packet.pts is None else packet.pts + self.offset
        self._next = packet.dts + step
        return jumps


def is_flush(packet: av.Packet) -> bool:
    """Tell whether a packet only marks the end of its stream."""
    return packet.size == 0 and packet.dts is None and packet.pts is None


def read_packets(demux: Callable[[], Iterator[av.Packet]]) -> Iterator[av.Packet]:
    """Yield packets, and skip those of streams that appear after the header.

    PyAV raises IndexError for some of these. The next call reads on at the next packet.

    Args:
        demux: starts or continues to read the packets of a container.

    Raises:
        FFmpegError: the file cannot be read further.
    """
    while True:
        try:
            yield from demux()
        except IndexError:
            continue
        return


@dataclass
class Track:
    """The packets of a video stream that can be displayed, in the order of decoding."""

    index: int
    """Number of the stream in its file."""
    time_base: Fraction
    rate: Fraction
    """Declared frames per second."""
    width: int
    height: int
    is_default: bool
    times: list[int] = field(default_factory=list)
    """Display times in ticks. For slotted formats the times of decoding, which are the same times in another order."""
    latest: int = 0
    """Largest display time."""
    last_ticks: int = 0
    """Duration of the packet that is displayed last. Only there, orders of decoding and display agree."""
    points: list[SeekPoint] = field(default_factory=list)
    is_cut: bool = False
    """The last packet is incomplete, or could not be read."""
    jumps: int = 0
    """Number of jumps of the clock."""
    has_key: bool = False
    """A key frame was read. It may lie before the part that an edit list shows, as after trimming."""

    @property
    def end(self) -> int:
        """Display time at which the last frame ends."""
        return self.latest + self.last_ticks

    @property
    def length_s(self) -> float:
        return float((self.end - min(self.times, default=0)) * self.time_base)

    def after(self, origin: int) -> list[int]:
        """Return the display times from `origin` on, in order."""
        return sorted({time for time in self.times if time >= origin})


def scan(path: Path) -> list[Track]:
    """Read all packets of all video streams of a file, except cover art.

    Raises:
        Refused: the file has no video stream, or none with a known codec.
    """
    with open_video(path) as container:
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise Refused(Reason.NO_VIDEO_STREAM, f"none of {len(container.streams)} streams is a video")
        usable = [stream for stream in streams if stream.codec_context is not None]
        if not usable:
            raise Refused(Reason.NO_DECODER, "unknown codec")
        tracks = {stream.index: _track(stream) for stream in usable}
        name = container.format.name
        clocks = {index: PacketClock(name, track.time_base, track.rate) for index, track in tracks.items()}
        try:
            for packet in read_packets(lambda: container.demux(usable)):
                heartbeat()
                if not is_flush(packet):
                    _add(tracks[packet.stream_index], packet, clocks[packet.stream_index], name)
        except FFmpegError:
            for track in tracks.values():
                track.is_cut = True
    return list(tracks.values())


def _track(stream: av.video.stream.VideoStream) -> Track:
    context = stream.codec_context
    is_default = bool(stream.disposition & Disposition.default)
    base = stream.time_base or Fraction(1, 1000)
    return Track(stream.index, base, declared_rate(stream), context.width, context.height, is_default)


def _add(track: Track, packet: av.Packet, clock: PacketClock, container: str) -> None:
    track.jumps += clock.stamp(packet)
    track.is_cut = packet.is_corrupt and container not in BROADCAST
    time = packet.dts if packet.pts is None or container in SLOTTED else packet.pts
    if time is None:
        return
    track.has_key = track.has_key or packet.is_keyframe
    if packet.is_discard or not track.has_key:
        return
    if not track.times or time >= track.latest:
        track.latest, track.last_ticks = time, packet.duration or clock.period
    track.times.append(time)
    is_far = not track.points or (time - track.points[-1].ticks) * track.time_base >= SEEK_POINT_S
    if container not in BROADCAST | RAW or not packet.is_keyframe or packet.pos is None or not is_far:
        return
    if container not in ("h264", "hevc") or _is_idr(packet, container):
        track.points.append(SeekPoint(float(time * track.time_base), time, packet.pos, clock.offset))


def _is_idr(packet: av.Packet, codec: str) -> bool:
    """Tell whether a picture of raw H.264 or HEVC lets the decoder forget all before it."""
    data, at = bytes(packet), -1
    while (at := data.find(b"\x00\x00\x01", at + 1)) >= 0 and at + 3 < len(data):
        kind = data[at + 3] & 31 if codec == "h264" else data[at + 3] >> 1 & 63
        if (1 <= kind <= 5) if codec == "h264" else kind <= 31:  # the first slice
            return kind == 5 if codec == "h264" else kind in (16, 17, 18, 19, 20)
    return False


def choose(tracks: list[Track]) -> Track:
    """Choose a video among the tracks of about full length: the default track if marked, else the largest.

    Covers and previews often come first, are not marked as such, and are shorter or smaller.

    Raises:
        Refused: its frames are too large.
    """
    longest = max(track.length_s for track in tracks)
    whole = [track for track in tracks if track.length_s >= longest / 2]
    chosen = max([track for track in whole if track.is_default] or whole, key=lambda track: track.width * track.height)
    if chosen.width * chosen.height > MAX_PIXELS:
        raise Refused(Reason.TOO_LARGE, f"{chosen.width}x{chosen.height}")
    return chosen


def declared_rate(stream: av.video.stream.VideoStream) -> Fraction:
    """Return the frames per second that the header declares, or 25."""
    rate = stream.average_rate or stream.guessed_rate or Fraction(0)
    if not 0 < rate <= 1000:
        rate = stream.guessed_rate if stream.guessed_rate and 0 < stream.guessed_rate <= 1000 else Fraction(25)
    return simple(Fraction(rate))


def simple(rate: Fraction) -> Fraction:
    """Round a rate to a fraction of small numbers. A rate below 1 does not become 0."""
    return rate.limit_denominator(1001) if rate >= 1 else 1 / (1 / rate).limit_denominator(1001)


def mean_rate(times: list[int], time_base: Fraction, declared: Fraction) -> Fraction:
    """Return the mean rate: the declared one, unless the packets differ from it by more than 2 %."""
    if len(times) < 2:
        return declared
    found = Fraction(len(times) - 1) / ((times[-1] - times[0]) * time_base)
    if abs(found - declared) <= declared / 50 or not 0 < found <= 1000:
        return declared
    usual = [round(found), Fraction(1000, 1001) * round(found * Fraction(1001, 1000))]
    nearest = min(usual, key=lambda rate: abs(rate - found))
    return Fraction(nearest) if abs(nearest - found) <= found / 1000 else simple(found)


def dense_rate(times: list[int], time_base: Fraction, mean: Fraction) -> Fraction | None:
    """Return the rate of the densest half second (at least 9 frames), or None if the rate is about constant."""
    count = max(8, round(mean / 2))
    spans = [later - earlier for earlier, later in zip(times, itertools.islice(times, count, None), strict=False)]
    if not spans:
        return None
    densest = min(Fraction(1000), count / (max(1, min(spans)) * time_base))
    if densest <= VARYING * mean:
        return None
    return Fraction(round(densest)) if densest >= 1 else simple(densest)


def ends_early(path: Path, container: str) -> bool | None:
    """Tell whether a file is shorter than its structure says, or None if the structure does not tell."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4096)
    if "mp4" in container:
        return any(end > size for end in _box_ends(path, size))
    if "matroska" in container:
        at = head.find(b"\x18\x53\x80\x67")  # the Segment, RFC 8794 and RFC 9559
        if at < 0 or not head[at + 4]:
            return None
        length = 9 - head[at + 4].bit_length()
        content = int.from_bytes(head[at + 4 : at + 4 + length]) & ((1 << 7 * length) - 1)
        is_unknown = content == (1 << 7 * length) - 1  # a live recording
        return not is_unknown and at + 4 + length + content > size
    if container == "avi":
        content = int.from_bytes(head[4:8], "little")  # 0 in a recording that was not closed
        return content + 8 > size
    if container in BROADCAST | RAW | {"flv", "live_flv", "gif"}:
        return False
    return None


def _box_ends(path: Path, size: int) -> Iterator[int]:
    """Yield the ends of the boxes of an MP4 at its top level (ISO/IEC 14496-12, section 4.2)."""
    at = 0
    with path.open("rb") as file:
        while at + 8 <= size:
            file.seek(at)
            head = file.read(16)
            length = int.from_bytes(head[:4])
            length = int.from_bytes(head[8:16]) if length == 1 else size - at if length == 0 else length
            if length < 8:
                return
            at += length
            yield at
