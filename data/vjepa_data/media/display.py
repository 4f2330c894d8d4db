"""The form in which a frame is displayed: size and dynamic range."""

from fractions import Fraction

import av
import av.video.stream

from vjepa_data.decoding.orientation import OddRotation, orientation
from vjepa_data.media.video import Reason, Refused

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


def hdr_transfer(frame: av.VideoFrame) -> str:
    """Return the name of a frame's HDR transfer function, or an empty string."""
    return HDR_TRANSFERS.get(int(frame.color_trc), "")
