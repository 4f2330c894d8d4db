"""The form in which a frame is displayed: orientation, pixel aspect and dynamic range."""

import math
from dataclasses import dataclass
from fractions import Fraction

import av
import av.video.stream
import numpy as np
from av.sidedata.sidedata import Type

from vjepa_data.media.video import Reason, Refused

HDR_TRANSFERS = {16: "smpte2084", 18: "arib-std-b67"}
"""Transfer functions of HDR, by their number in ITU-T H.273: PQ and HLG."""

TONE_MAP = "out_transfer=bt709:out_primaries=bt709:out_color_matrix=bt709"
"""Options of FFmpeg's `scale` filter that map HDR to BT.709. Diffuse white (203 cd/m2, ITU-R BT.2408) becomes white."""


@dataclass(frozen=True)
class Orientation:
    """How to turn a stored frame upright: first the transposition, then the flips. Names are those of FFmpeg."""

    transpose: str | None = None
    """A value of the `transpose` filter."""
    hflip: bool = False
    vflip: bool = False

    @property
    def filters(self) -> list[tuple[str, str | None]]:
        """Filters and their options."""
        flips = [(name, None) for name in ("hflip", "vflip") if getattr(self, name)]
        return [("transpose", self.transpose), *flips] if self.transpose else flips

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height after turning."""
        return (height, width) if self.transpose else (width, height)

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """Turn an array [H W ...] upright."""
        if self.transpose:
            picture = np.rot90(picture, -1 if self.transpose.startswith("clock") else 1)
            picture = picture[::-1] if self.transpose.endswith("_flip") else picture
        picture = picture[:, ::-1] if self.hflip else picture
        return picture[::-1] if self.vflip else picture


def orientation(frame: av.VideoFrame) -> Orientation:
    """Return the orientation that the display matrix of a frame asks for, including mirroring.

    Raises:
        Refused: the angle is not a multiple of 90 degrees, within one degree.

    Source: `configure_input_video_filter` in FFmpeg's fftools/ffmpeg_filter.c.
    """
    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return Orientation()
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
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
    raise Refused(Reason.ODD_ROTATION, f"it is displayed at an angle of {angle:.0f} degrees; turn it with ffmpeg first")


def displayed_size(frame: av.VideoFrame, stream: av.video.stream.VideoStream) -> tuple[int, int]:
    """Return the displayed width and height: after rotation, in square pixels."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    width, height = frame.width, frame.height
    if aspect > 0 and aspect != 1:
        width = max(1, round(width * aspect))
    return orientation(frame).size(width, height)


def hdr_transfer(frame: av.VideoFrame) -> str:
    """Return the name of a frame's HDR transfer function, or an empty string."""
    return HDR_TRANSFERS.get(int(frame.color_trc), "")
