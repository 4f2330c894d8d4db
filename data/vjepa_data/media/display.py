"""The form in which a frame is displayed: size and dynamic range."""

import contextlib
from collections.abc import Iterator
from fractions import Fraction

import av
import av.video.stream

from vjepa_data.decoding.orientation import OddRotation, Orientation, display_matrix, orientation
from vjepa_data.media.frames import Timed
from vjepa_data.media.video import Reason, Refused, VideoInfo

HDR_TRANSFERS = {16: "smpte2084", 18: "arib-std-b67"}
"""Transfer functions of HDR, by their number in ITU-T H.273: PQ and HLG."""

TONE_MAP = "out_transfer=bt709:out_primaries=bt709:out_color_matrix=bt709"
"""Options of FFmpeg's `scale` filter that map HDR to BT.709. Diffuse white (203 cd/m2, ITU-R BT.2408) becomes white."""


def displayed_size(frame: av.VideoFrame, stream: av.video.stream.VideoStream) -> tuple[int, int]:
    """Return the displayed width and height: after rotation, in square pixels.

    Raises:
        Refused: the frame is to be displayed at an odd angle.
    """
    aspect = stream.sample_aspect_ratio or Fraction(1)
    width, height = frame.width, frame.height
    if aspect > 0 and aspect != 1:
        width = max(1, round(width * aspect))
    try:
        return orientation(frame).size(width, height)
    except OddRotation as error:
        raise Refused(Reason.ODD_ROTATION, str(error)) from None


def orientation_in(info: VideoInfo, frame: av.VideoFrame) -> Orientation:
    """Return the orientation of a frame of a video: its own, else that of a message at the start of the video.

    FFmpeg gives a message to one frame. H.264 and HEVC let it persist, and encoders repeat it at key frames.

    Raises:
        OddRotation: the angle is not a multiple of 90 degrees, within one degree.

    Source: display orientation SEI message, ITU-T H.264 (08/2021), D.2.27; ITU-T H.265 (08/2021), D.3.17.
    """
    if info.turn is None or display_matrix(frame) is not None:
        return orientation(frame)
    return Orientation(*info.turn)


def turn_of_message(first: av.VideoFrame, others: Iterator[Timed]) -> tuple[str | None, bool, bool] | None:
    """Return the orientation of the first frame of a video if it does not come from the container."""
    turn, second = orientation(first), None
    if turn != Orientation():
        with contextlib.suppress(Refused):  # damage counts when the video is stored
            second = next(others, (None, None))[1]
    if second is None or display_matrix(second) is not None:
        return None
    return turn.transpose, turn.hflip, turn.vflip


def hdr_transfer(frame: av.VideoFrame) -> str:
    """Return the name of a frame's HDR transfer function, or an empty string."""
    return HDR_TRANSFERS.get(int(frame.color_trc), "")
