"""Read the boxes of an MP4, without a decoder."""

import struct

IDENTITY = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
"""The display matrix of an upright movie or track (ISO/IEC 14496-12, sections 8.2.2 and 8.3.2)."""


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


def is_turned(data: bytes) -> bool:
    """Tell whether a display matrix of an MP4, of the movie or of a track, asks for a rotation or a mirroring.

    The matrix lies before the last 28 bytes of a movie header and before the last 8 bytes of a track header. FFmpeg
    multiplies the two, and ignores a matrix of zeros.
    """
    movie = next(((start, end) for name, start, end in boxes(data) if name == "moov"), (0, 0))
    inside = boxes(data, *movie)
    tracks = [box for name, start, end in inside if name == "trak" for box in boxes(data, start, end)]
    ends = [end - 28 for name, _, end in inside if name == "mvhd"]
    ends += [end - 8 for name, _, end in tracks if name == "tkhd"]
    return any(data[end - len(IDENTITY) : end] not in (IDENTITY, bytes(len(IDENTITY))) for end in ends)
