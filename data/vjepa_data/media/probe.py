"""Learn the properties of a video from its packets and its first frame."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import av.container
import av.video.stream

from vjepa_data.media.display import displayed_size, hdr_transfer, turn_of_message
from vjepa_data.media.frames import Pass
from vjepa_data.media.timeline import SLOTTED, Track, choose, dense_rate, ends_early, mean_rate, scan
from vjepa_data.media.video import Reason, Refused, VideoInfo, open_video

UNKNOWN_DELAY = 1000
"""More frames than any decoder holds back."""


def probe(path: Path) -> VideoInfo:
    """Read the packets of a video, and decode a frame to learn its displayed size.

    Raises:
        Refused: the file is not a video, or cannot be decoded.
    """
    tracks = scan(path)
    track = choose(tracks)
    with open_video(path) as container:
        stream = container.streams.video[[s.index for s in container.streams.video].index(track.index)]
        info = VideoInfo(
            bytes=path.stat().st_size,
            container=container.format.name,
            codec=stream.codec_context.name,
            pixel_format=stream.codec_context.pix_fmt or "",
            width=0,
            height=0,
            rate=(track.rate.numerator, track.rate.denominator),
            duration_s=0.0,
            frames=stream.frames,
            start_s=0.0,
            audio=bool(container.streams.audio),
            stream=track.index,
            video_streams=len(tracks),
            is_joined=track.jumps > 0,
            delay=UNKNOWN_DELAY,
        )
        first = Pass(path, info, None)
        frames = first.frames()
        try:
            at, frame = next(frames, (Fraction(0), None))
        except Refused as refusal:
            raise Refused(refusal.reason, f"first frame: {refusal.detail}") from None
        if frame is None:
            raise Refused(Reason.DAMAGED, "no frame can be decoded")
        width, height = displayed_size(frame, stream)
        delay = first.fed - 1 if info.container in SLOTTED else 0
        origin = round(at / track.time_base)
        times = track.after(origin)
        rate = mean_rate(times, track.time_base, track.rate)
        dense = dense_rate(times, track.time_base, rate)
        return replace(
            info,
            width=width,
            height=height,
            rate=(rate.numerator, rate.denominator),
            duration_s=round(_duration(path, container, stream, track, origin, rate), 6),
            start_s=round(float(at), 6),
            dense_rate=dense and (dense.numerator, dense.denominator),
            transfer=hdr_transfer(frame),
            delay=delay,
            turn=turn_of_message(frame, frames),
            seek_points=tuple(p._replace(time_s=round(p.time_s - float(at), 6)) for p in track.points),
        )


def _duration(
    path: Path,
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
    track: Track,
    origin: int,
    rate: Fraction,
) -> float:
    """Return the length in seconds: that of the packets, unless the file ends before the length that it declares."""
    found = float((track.end - origin) * track.time_base)
    declared = _declared(container, stream, rate)
    if abs(declared - found) <= max(0.1, 2 / rate):
        return declared
    ends = ends_early(path, container.format.name)
    is_unclear = ends is None and len(container.streams) == 1  # otherwise it may be the length of another stream
    return declared if declared > found and (track.is_cut or ends or is_unclear) else found


def _declared(container: av.container.InputContainer, stream: av.video.stream.VideoStream, rate: Fraction) -> float:
    """Return the declared length in seconds: of the stream, else from its frame count, else of the container."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if stream.frames:
        return float(stream.frames / rate)
    return (container.duration or 0) / av.time_base
