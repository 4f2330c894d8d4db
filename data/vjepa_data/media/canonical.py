"""Check that the bytes of an MP4 have the canonical form of a stored clip, without decoding them."""

import io
import itertools
from dataclasses import dataclass
from fractions import Fraction

import av
from av.error import FFmpegError

from vjepa_data.decoding.mp4_boxes import boxes, is_turned
from vjepa_data.media.video import Reason, Refused


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
        Refused: it has another form. The detail names the weightiest difference.
    """
    found, differences = compare(data, gop=gop)
    if differences or found is None:
        raise Refused(Reason.NOT_CANONICAL, differences[0])
    return found


def compare(data: bytes, *, gop: int) -> tuple[ClipFormat | None, list[str]]:
    """Compare an MP4 with the canonical form, without decoding it.

    Returns:
        Its properties, or None if it cannot be read, and all differences from the canonical form. Differences that may
        change the decoded pictures come first, then differences that make decoding slow.
    """
    top = {name: (start, end) for name, start, end in reversed(boxes(data))}
    if not {"ftyp", "moov", "mdat"} <= top.keys():
        return None, ["not a complete MP4"]
    inside = boxes(data, *top["moov"])
    tracks = [boxes(data, start, end) for name, start, end in inside if name == "trak"]
    weighty = {
        "it is rotated": is_turned(data),
        "it has an edit list": any(name == "edts" for track in tracks for name, _, _ in track),
    }
    slow = {
        f"{len(tracks)} tracks, expected 1": len(tracks) != 1,
        "it is fragmented": any(name == "mvex" for name, _, _ in inside),
        "the index is not at the front": top["moov"] > top["mdat"],
    }
    try:
        found, of_stream, of_keys = _compare_stream(data, gop)
    except FFmpegError as error:
        return None, [error.strerror or "cannot be read"]
    named = [difference for difference, applies in weighty.items() if applies]
    rest = [difference for difference, applies in slow.items() if applies]
    return found, [*of_stream, *named, *of_keys, *rest]


def _compare_stream(data: bytes, gop: int) -> tuple[ClipFormat | None, list[str], list[str]]:
    """Return the properties of the video stream, its serious differences, and the differences of its key frames."""
    with av.open(io.BytesIO(data), "r", format="mp4", metadata_errors="replace") as container:
        stream = container.streams.video[0] if container.streams.video else None
        if stream is None or stream.codec_context is None or stream.codec_context.name != "h264":
            return None, ["not H.264"], []
        context, step, aspect = stream.codec_context, stream.time_base, stream.sample_aspect_ratio or 1
        packets = sorted((p.pts, p.is_keyframe) for p in container.demux(stream) if p.pts is not None)
        times = [pts for pts, _ in packets]
        gaps = {later - earlier for earlier, later in itertools.pairwise(times)}
        is_even = bool(times) and times[0] == 0 and len(gaps) <= 1 and 0 not in gaps
        checks = {
            f"the rate is not constant from 0: {len(gaps)} different gaps, first frame at {times[:1]}": not is_even,
            f"pixel format {context.pix_fmt}, expected yuv420p": context.pix_fmt != "yuv420p",
            f"pixels are not square ({aspect})": aspect != 1,
        }
        rate = Fraction(stream.average_rate or 1)
        if is_even and gaps and step is not None:
            rate = 1 / (step * min(gaps))
        found = ClipFormat(len(packets), (rate.numerator, rate.denominator), context.width, context.height)
    keys = [number for number, (_, is_key) in enumerate(packets) if is_key]
    longest = max((b - a for a, b in itertools.pairwise([*keys, len(packets)])), default=0)
    is_dense = bool(keys) and keys[0] == 0 and longest <= gop
    apart = f"{longest or len(packets)} frames between key frames, expected at most {gop}"
    return found, [difference for difference, applies in checks.items() if applies], [] if is_dense else [apart]
