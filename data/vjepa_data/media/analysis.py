"""What a video shows, as far as a builder needs to know: where its scenes begin, and what it looks like at a glance."""

import math
from fractions import Fraction
from pathlib import Path

import av
import av.filter
import numpy as np
from av.error import BlockingIOError, EOFError, FFmpegError

from vjepa_data.media.transcode import PictureBox, decode
from vjepa_data.media.video import Reason, Refused, VideoInfo, open_video, video_stream

GLANCES = (0.2, 0.5, 0.8)
"""Where in a video its perceptual hashes are taken, as shares of its length."""

MOMENTS = 8
"""Frames, spread over a video, in none of which a bar may hold anything."""

BLACK = 24
"""Grey levels of 255 up to which a row or column is part of a bar, on average."""

UNEVEN = 0.02
"""Bars on both sides may differ by this share of the frame; a dark corner of a scene makes no bar."""

SHORT_S = 0.5
"""Shortest scene; a second change within this time belongs to the first (flashes, dissolves)."""


def scene_starts(path: Path, facts: VideoInfo, *, threshold: float) -> tuple[float, ...]:
    """Say when scenes begin, in seconds from the first frame, which is not named itself.

    Args:
        path: a local file.
        facts: what the file says of itself.
        threshold: smallest change from frame to frame, in percent.

    Raises:
        Refused: the video cannot be decoded from start to end.

    Source: FFmpeg's `scdet` filter, at 160 pixels of width.
    """
    starts: list[float] = []
    rate = Fraction(*facts.rate)
    with open_video(path) as container:
        stream = video_stream(container)
        graph: av.filter.Graph | None = None
        first = Fraction(0)
        for number, (time, frame) in enumerate(decode(container, stream, None, rate)):
            if graph is None:
                graph, first = _detector(frame, threshold), time
            frame.pts, frame.time_base = number, Fraction(1, 1000)
            graph.vpush(frame)
            try:
                changed = float(graph.vpull().metadata.get("lavfi.scd.score", "0")) >= threshold
            except (BlockingIOError, EOFError):
                continue
            at = float(time - first)
            if number and changed and at - (starts[-1] if starts else 0.0) >= SHORT_S:
                starts.append(round(at, 6))
    return tuple(starts)


def _detector(frame: av.VideoFrame, threshold: float) -> av.filter.Graph:
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000))
    small = graph.add("scale", "160:-2:flags=fast_bilinear+bitexact")
    pixels = graph.add("format", "pix_fmts=yuv420p")
    detector = graph.add("scdet", f"threshold={threshold}")
    sink = graph.add("buffersink")
    graph.link_nodes(source, small, pixels, detector, sink).configure()
    return graph


def picture_box(path: Path, facts: VideoInfo) -> PictureBox | None:
    """Say where in its frames a video's picture lies, or None if there are no black bars around it.

    Raises:
        Refused: a frame cannot be decoded, or frames differ in size.

    Source: the rule of FFmpeg's `cropdetect` (GPL, so not in PyAV's build): a line is black if its mean is below 24.
    """
    rows = columns = np.zeros(0, np.float32)
    for number in range(MOMENTS):
        frame = frame_at(path, facts, (number + 0.5) / MOMENTS)
        grey = np.rot90(frame.to_ndarray(format="gray"), frame.rotation // 90)
        rows, columns = (_brightest(*pair) for pair in ((rows, grey.mean(axis=1)), (columns, grey.mean(axis=0))))
    down, across = np.flatnonzero(rows > BLACK), np.flatnonzero(columns > BLACK)
    if not len(down) or not len(across):
        return None
    wide, high = facts.width / len(columns), facts.height / len(rows)  # shown pixels, of those that are stored
    left, top = round(across[0] * wide), round(down[0] * high)
    box = PictureBox(left, top, round((across[-1] + 1) * wide) - left, round((down[-1] + 1) * high) - top)
    return box if _is_framed(box, facts) else None


def _brightest(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    if len(before) not in (0, len(now)):
        raise Refused(Reason.SIZE_CHANGES, f"{len(before)} pixels, then {len(now)}")
    return np.maximum(before, now) if len(before) else now


def _is_framed(box: PictureBox, facts: VideoInfo) -> bool:
    """Whether what surrounds a box is bars: even, more than a blurred edge, and less than half of the frame."""
    margins = (
        (box.left, facts.width - box.left - box.width, facts.width),
        (box.top, facts.height - box.top - box.height, facts.height),
    )
    if any(abs(one - other) > UNEVEN * side or one + other > side / 2 for one, other, side in margins):
        return False
    return any(one + other > UNEVEN * side for one, other, side in margins)


def perceptual_hashes(path: Path, facts: VideoInfo) -> tuple[int, ...]:
    """Hash what a video shows at three moments, 64 bits each: equal or nearly so after re-encoding or resizing.

    A bit says whether a picture of 9 x 8 grey levels grows brighter from one column to the next.

    Raises:
        Refused: a frame cannot be decoded.

    Source: the difference hash, Krawetz, "Kind of like that" (2013).
    """
    frames = (frame_at(path, facts, share) for share in GLANCES)
    return tuple(difference_hash(frame.to_ndarray(format="gray")) for frame in frames)


def frame_at(path: Path, facts: VideoInfo, share: float) -> av.VideoFrame:
    """Decode the frame that is on the screen after a share of a video's length.

    Raises:
        Refused: it cannot be decoded.
    """
    at = facts.start_s + share * facts.duration_s
    frame = _frame_at(path, at, seeks=True) or _frame_at(path, at, seeks=False)  # some files cannot be sought in
    if frame is None:
        raise Refused(Reason.DAMAGED, f"no frame near {at:.1f} s")
    return frame


def _frame_at(path: Path, at: float, *, seeks: bool) -> av.VideoFrame | None:
    last: av.VideoFrame | None = None
    with open_video(path) as container:
        stream = video_stream(container)
        try:
            if seeks and stream.time_base is not None:
                container.seek(int(at / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                last = frame if last is None or (frame.time or 0.0) <= at + 1e-3 else last
                if (frame.time or math.inf) >= at:
                    break
        except FFmpegError as error:
            if seeks:
                return None
            raise Refused(Reason.DAMAGED, f"near {at:.1f} s: {error.strerror}") from None
    return last


def difference_hash(grey: np.ndarray) -> int:
    """64 bits of a grey picture, uint8 [H W]: the signs of the differences between the columns of 8 rows of 9 means."""
    rows = np.array_split(grey.astype(np.float32), 8, axis=0)
    means = np.array([[block.mean() for block in np.array_split(row, 9, axis=1)] for row in rows])
    bits = (means[:, 1:] > means[:, :-1]).ravel()
    return int("".join("1" if bit else "0" for bit in bits), 2)
