"""Check that the bytes of an MP4 have the canonical form of a stored clip, without decoding them."""

import io
import itertools
from dataclasses import dataclass
from fractions import Fraction

import av
from av.error import FFmpegError

from vjepa_data.media.video import Reason, Refused


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
