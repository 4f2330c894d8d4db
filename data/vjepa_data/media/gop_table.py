"""Make the table of GOPs of a stored video, by which a run reads parts of it (`vjepa_data.corpus.parts`)."""

import io
import itertools

import av
import numpy as np

from vjepa_data.corpus.parts import HEAD_BYTES, codec_description, gop_type, hash_of_gop
from vjepa_data.media.video import Reason, Refused


def gop_table(video: bytes, *, gop: int) -> bytes:
    """Return the table of GOPs of a canonical video. Nothing is decoded.

    Raises:
        Refused: its GOPs have different lengths, or its frames do not follow each other in the file.
    """
    with av.open(io.BytesIO(video), "r", format="mp4") as container:
        packets = [packet for packet in container.demux(container.streams.video[0]) if packet.size]
    shown = {pts: number for number, pts in enumerate(sorted(packet.pts or 0 for packet in packets))}
    keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
    follows = all((a.pos or 0) + a.size == b.pos for a, b in itertools.pairwise(packets))
    if keys != list(range(0, len(packets), gop)) or not follows:
        raise Refused(Reason.NOT_CANONICAL, f"not every GOP has {gop} frames, one after the other")
    description = codec_description(video[:HEAD_BYTES])
    if description is None:
        raise Refused(Reason.NOT_CANONICAL, f"its first {HEAD_BYTES} bytes do not describe the codec")
    rows = np.zeros(len(keys), gop_type(gop))
    for row, key in zip(rows, keys, strict=True):
        members = packets[key : key + gop]
        order = [shown[packet.pts or 0] - key for packet in members]
        if sorted(order) != list(range(len(members))):
            raise Refused(Reason.NOT_CANONICAL, f"the GOP at frame {key} is not closed")
        row["offset"] = begin = members[0].pos or 0
        row["bytes"][: len(members)] = [packet.size for packet in members]
        row["shift"][: len(members)] = np.array(order) - np.arange(len(members))
        row["xxh64"] = hash_of_gop(description, row, memoryview(video)[begin : begin + int(row["bytes"].sum())])
    return rows.tobytes()
