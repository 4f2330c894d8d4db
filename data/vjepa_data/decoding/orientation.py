"""Turn frames upright as the display matrix of their video asks for."""

import io
import math
from dataclasses import dataclass
from typing import Any

import av
import numpy as np


class OddRotation(ValueError):
    """Raised for a display matrix whose angle is not a multiple of 90 degrees."""


@dataclass(frozen=True)
class Orientation:
    """Operations that turn a stored frame upright: first the transposition, then the flips. Names follow FFmpeg."""

    transpose: str | None = None
    """A value of the `transpose` filter."""
    hflip: bool = False
    vflip: bool = False

    @property
    def filters(self) -> list[tuple[str, str | None]]:
        """Filters and their options."""
        flips: list[tuple[str, str | None]] = [(name, None) for name in ("hflip", "vflip") if getattr(self, name)]
        return [("transpose", self.transpose), *flips] if self.transpose else flips

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height after turning."""
        return (height, width) if self.transpose else (width, height)

    @property
    def is_mirrored(self) -> bool:
        """True if the frame needs a mirror image, since a rotation alone cannot turn it upright."""
        return self.transpose.endswith("_flip") if self.transpose else self.hflip != self.vflip

    def mirror(self, rotated: np.ndarray) -> np.ndarray:
        """Mirror arrays [T H W ...] of a decoder that applied only the rotation of the matrix, as decord does."""
        if not self.is_mirrored:
            return rotated
        return np.ascontiguousarray(rotated[:, :, ::-1] if self.transpose else rotated[:, ::-1])

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """Turn an array [H W ...] upright."""
        if self.transpose:
            picture = np.rot90(picture, -1 if self.transpose.startswith("clock") else 1)
            picture = picture[::-1] if self.transpose.endswith("_flip") else picture
        picture = picture[:, ::-1] if self.hflip else picture
        return picture[::-1] if self.vflip else picture


def display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int] | None:
    """Return a, b, c and d of the display matrix of a frame, or None if it has none.

    PyAV cannot list the side data of frames of MV-HEVC (spatial videos), since it lacks names for some of it. The
    rotation of these frames is known, and a mirroring is not.
    """
    try:
        data: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        angle = math.radians(-frame.rotation)
        cos, sin = (round(65536 * value) for value in (math.cos(angle), math.sin(angle)))
        return (cos, sin, -sin, cos) if frame.rotation else None
    if data is None:
        return None
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    return a, b, c, d


def orientation(frame: av.VideoFrame) -> Orientation:
    """Return the orientation that the display matrix of a frame asks for, including mirroring.

    Raises:
        OddRotation: the angle is not a multiple of 90 degrees, within one degree.

    Source: `configure_input_video_filter` in FFmpeg's fftools/ffmpeg_filter.c.
    """
    matrix = display_matrix(frame)
    if matrix is None:
        return Orientation()
    a, b, c, d = matrix
    if not math.hypot(a, c) or not math.hypot(b, d):
        return Orientation()  # not a rotation at all; FFmpeg ignores it
    angle = math.degrees(math.atan2(b / math.hypot(b, d), a / math.hypot(a, c))) % 360
    if abs(angle - 90) < 1:
        return Orientation(transpose="cclock_flip" if c > 0 else "clock")
    if abs(angle - 180) < 1:
        return Orientation(hflip=a < 0, vflip=d < 0)
    if abs(angle - 270) < 1:
        return Orientation(transpose="clock_flip" if c < 0 else "cclock")
    if min(angle, 360 - angle) < 1:
        return Orientation(vflip=d < 0)
    raise OddRotation(f"it is to be displayed at an angle of {angle:.0f} degrees; turn it with ffmpeg first")


def file_orientation(video: bytes) -> Orientation:
    """Return the orientation of a video in memory, by its first frame.

    Raises:
        OddRotation: the angle is not a multiple of 90 degrees, within one degree.
        FFmpegError: the file cannot be read.
    """
    with av.open(io.BytesIO(video), "r", metadata_errors="replace") as container:
        stream = container.streams.best("video")
        frame = next(container.decode(stream), None) if stream else None
        return orientation(frame) if isinstance(frame, av.VideoFrame) else Orientation()


def upright(frame: av.VideoFrame) -> np.ndarray:
    """Convert a decoded frame to RGB [H W 3] as it is displayed."""
    return np.ascontiguousarray(orientation(frame).apply(frame.to_ndarray(format="rgb24")))
