"""Analyze the content of videos: scene starts, black bars and perceptual hashes."""

from fractions import Fraction
from pathlib import Path

import av
import av.filter
import numpy as np
from av.error import BlockingIOError, EOFError

from vjepa_data.media.display import orientation_in
from vjepa_data.media.frames import read_frames
from vjepa_data.media.transcode import PictureBox
from vjepa_data.media.video import Reason, Refused, VideoInfo

HASH_POSITIONS = (0.2, 0.5, 0.8)
"""Positions of the hashed frames, as fractions of the length."""

BAR_FRAMES = 8
"""Frames, spread over a video, in which bars must be black."""

BLACK = 24
"""Largest mean of a row or column of a bar, in grey levels of 255."""

BAR_TOLERANCE = 0.02
"""Largest difference between opposite bars, as a fraction of the frame. A dark corner of a scene is not a bar."""

MIN_SCENE_S = 0.5
"""Shortest scene, in seconds. A second change within this time belongs to the first (flashes, dissolves)."""


def scene_starts(path: Path, info: VideoInfo, *, threshold: float) -> tuple[float, ...]:
    """Find the start times of scenes, in seconds from the first frame. The first scene is not listed.

    Args:
        path: a local file.
        info: its declared properties.
        threshold: smallest change from frame to frame, in percent.

    Raises:
        Refused: the video cannot be decoded from start to end.

    Source: FFmpeg's `scdet` filter, at 160 pixels of width.
    """
    starts: list[float] = []
    graph: av.filter.Graph | None = None
    for number, (time, frame) in enumerate(read_frames(path, info)):
        graph = graph or _detector(frame, threshold)
        frame.pts, frame.time_base = number, Fraction(1, 1000)
        graph.vpush(frame)
        try:
            changed = float(graph.vpull().metadata.get("lavfi.scd.score", "0")) >= threshold
        except (BlockingIOError, EOFError):
            continue
        at = float(time)
        if number and changed and at - (starts[-1] if starts else 0.0) >= MIN_SCENE_S:
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


def picture_box(path: Path, info: VideoInfo) -> PictureBox | None:
    """Find the picture inside black bars, or None if there are no bars.

    Raises:
        Refused: a frame cannot be decoded, or frames differ in size.

    Source: the rule of FFmpeg's `cropdetect` (GPL, so not in PyAV's build): a line is black if its mean is below 24.
    """
    rows = columns = np.zeros(0, np.float32)
    for number in range(BAR_FRAMES):
        frame = frame_at(path, info, (number + 0.5) / BAR_FRAMES)
        grey = orientation_in(info, frame).apply(frame.to_ndarray(format="gray"))
        rows, columns = (_brightest(*pair) for pair in ((rows, grey.mean(axis=1)), (columns, grey.mean(axis=0))))
    down, across = np.flatnonzero(rows > BLACK), np.flatnonzero(columns > BLACK)
    if not len(down) or not len(across):
        return None
    wide, high = info.width / len(columns), info.height / len(rows)  # displayed pixels per stored pixel
    left, top = round(across[0] * wide), round(down[0] * high)
    box = PictureBox(left, top, round((across[-1] + 1) * wide) - left, round((down[-1] + 1) * high) - top)
    return box if _is_framed(box, info) else None


def _brightest(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    if len(before) not in (0, len(now)):
        raise Refused(Reason.SIZE_CHANGES, f"{len(before)} pixels, then {len(now)}")
    return np.maximum(before, now) if len(before) else now


def _is_framed(box: PictureBox, info: VideoInfo) -> bool:
    """Tell whether the margins of a box are bars: symmetric, wider than a blurred edge, below half of the frame."""
    margins = (
        (box.left, info.width - box.left - box.width, info.width),
        (box.top, info.height - box.top - box.height, info.height),
    )
    if any(abs(a - b) > BAR_TOLERANCE * side or a + b > side / 2 for a, b, side in margins):
        return False
    return any(a + b > BAR_TOLERANCE * side for a, b, side in margins)


def perceptual_hashes(path: Path, info: VideoInfo) -> tuple[int, ...]:
    """Hash three frames to 64 bits each. Hashes change little when a video is re-encoded or resized.

    A bit tells whether an image of 9 x 8 grey levels gets brighter between neighbouring columns.

    Raises:
        Refused: a frame cannot be decoded.

    Source: the difference hash, Krawetz, "Kind of like that" (2013).
    """
    frames = (frame_at(path, info, share) for share in HASH_POSITIONS)
    return tuple(difference_hash(frame.to_ndarray(format="gray")) for frame in frames)


def frame_at(path: Path, info: VideoInfo, share: float) -> av.VideoFrame:
    """Decode the frame on display after a fraction of a video's length.

    Raises:
        Refused: the frame cannot be decoded.
    """
    at = share * info.duration_s
    last: av.VideoFrame | None = None
    for time, frame in read_frames(path, info, start_s=at):
        if last is not None and time > at + 1e-3:
            break
        last = frame
        if time >= at:
            break
    if last is None:
        raise Refused(Reason.DAMAGED, f"no frame near {at:.1f} s")
    return last


def difference_hash(grey: np.ndarray) -> int:
    """Hash a grey image, uint8 [H W], to 64 bits: signs of the differences between adjacent means of 8 rows of 9."""
    rows = np.array_split(grey.astype(np.float32), 8, axis=0)
    means = np.array([[block.mean() for block in np.array_split(row, 9, axis=1)] for row in rows])
    bits = (means[:, 1:] > means[:, :-1]).ravel()
    return int("".join("1" if bit else "0" for bit in bits), 2)
