"""Virtual parts: a long video is one member of its shard, and a run draws and reads short parts of it.

    KEY.mp4         head | GOP 0 | GOP 1 | GOP 2 | GOP 3 | GOP 4 | ...      one video, an hour long
    KEY.gops.bin    a row for each GOP: its place, the sizes and the order of its frames, a hash
    a part                         [ GOP 2 | GOP 3 ]                        whole GOPs: one range of bytes
    as it is read   [ new head | GOP 2 | GOP 3 ]                            an mp4 of its own, with the same frames

Every GOP of a stored video is closed and has the same number of frames, so a part decodes to the frames of the whole.
All decoders of a run see an ordinary short mp4. Nothing outside the part is read, apart from 1 KiB of the head.
"""

import struct
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import xxhash

MEMBER = "gops.bin"
"""Suffix of the member that holds the table of GOPs. No signal or text has this suffix."""

HEAD_BYTES = 1024
"""Bytes of a stored video that are read for the description of its codec, which begins near byte 400."""

KEY_SUFFIX = "-f"
"""A part is named after its video and its first frame, such as `kitchen-0123456789abcdef-f9000`."""


def gop_type(gop: int) -> np.dtype:
    """Return the type of a row of the table of GOPs, little-endian.

    Args:
        gop: frames of every GOP but the last of a video, where sizes of missing frames are 0.
    """
    fields = [("offset", "<i8"), ("xxh64", "<u8"), ("bytes", "<u4", (gop,)), ("shift", "i1", (gop,))]
    return np.dtype(fields)


def hash_of_gop(description: bytes, row: np.void, data: bytes | memoryview) -> int:
    """Return the hash of everything that a GOP is decoded from: codec, sizes and order of frames, and their bytes."""
    digest = xxhash.xxh64(description)
    digest.update(row["bytes"].tobytes() + row["shift"].tobytes())
    digest.update(data)
    return digest.intdigest()


def codec_description(head: bytes) -> bytes | None:
    """Return the sample description (`stsd`) from the first bytes of a stored video, or None if it is not there.

    Source: ISO/IEC 14496-12, section 8.5.2.
    """
    start, end = 0, len(head)
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd"):
        while start + 8 <= end and head[start + 4 : start + 8] != name:
            start += max(8, int.from_bytes(head[start : start + 4]))
        size = int.from_bytes(head[start : start + 4])
        if name == b"stsd" and start + 8 <= end and start + size <= end:
            return head[start : start + size]
        start += 8
    return None


def parts_of(frames: np.ndarray, fps: np.ndarray, *, part_s: float, gop: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide videos into parts of whole GOPs.

    The last part of a video takes the rest, so that it has between half and one and a half times the length of a part.

    Args:
        frames, fps: length and rate of each video, [N].
        part_s: length of a part in seconds, rounded to GOPs of each video.
        gop: frames of a GOP.

    Returns:
        The video of each part, and its first frame, int64 [P], in order of video and time.
    """
    length = np.maximum(1, np.floor(np.minimum(part_s * fps, frames) / gop + 0.5)).astype(np.int64) * gop
    counts = np.maximum(1, np.floor(frames / length + 0.5)).astype(np.int64)
    video = np.repeat(np.arange(len(frames)), counts)
    number = np.arange(len(video)) - np.repeat(np.cumsum(counts) - counts, counts)
    return video, number * length[video]


def part_as_mp4(
    description: bytes, rows: np.ndarray, data: bytes, *, width: int, height: int, fps: float, gop: int
) -> bytes:
    """Return some GOPs of a video as an mp4.

    Args:
        description: of the codec, from the video.
        rows: of the table of GOPs.
        data: bytes of the GOPs.
        width, height, fps: of the video.
        gop: frames of a GOP.

    Source: ISO/IEC 14496-12, sections 4.3 and 8.2 to 8.8.
    """
    sizes = rows["bytes"].reshape(-1)
    shifts = rows["shift"].reshape(-1)[sizes > 0].astype(np.int64)
    sizes = sizes[sizes > 0]
    rate = Fraction(fps).limit_denominator(1001)
    keys = np.arange(1, len(sizes) + 1, gop)
    offsets = np.stack([np.ones_like(shifts), shifts * rate.denominator], axis=1)
    duration = len(sizes) * rate.denominator
    video_entry = _box(b"url ", struct.pack(">I", 1))
    upright = _numbers([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30])  # the display matrix

    def head(at: int) -> bytes:
        table = _box(
            b"stbl",
            description,
            _table(b"stts", 1, _numbers([len(sizes), rate.denominator])),
            _box(b"ctts", struct.pack(">II", 1 << 24, len(sizes)), offsets.astype(">i4").tobytes()),
            _table(b"stss", len(keys), _numbers(keys)),
            _table(b"stsc", 1, _numbers([1, len(sizes), 1])),
            _box(b"stsz", struct.pack(">III", 0, 0, len(sizes)), _numbers(sizes)),
            _table(b"stco", 1, _numbers([at])),
        )
        media = _box(
            b"minf",
            _box(b"vmhd", struct.pack(">I8x", 1)),
            _box(b"dinf", _table(b"dref", 1, video_entry)),
            table,
        )
        track = _box(
            b"trak",
            _box(b"tkhd", struct.pack(">I8xI4xI16x", 3, 1, duration), upright, _numbers([width << 16, height << 16])),
            _box(
                b"mdia",
                _box(b"mdhd", struct.pack(">12xIIHH", rate.numerator, duration, 0x55C4, 0)),
                _box(b"hdlr", struct.pack(">8x4s13x", b"vide")),
                media,
            ),
        )
        times = struct.pack(">12xIIIH10x", rate.numerator, duration, 1 << 16, 1 << 8)
        movie = _box(b"moov", _box(b"mvhd", times, upright, struct.pack(">24xI", 2)), track)
        kind = _box(b"ftyp", b"isom", struct.pack(">I", 512), b"isomiso2avc1mp41")
        return kind + movie + struct.pack(">I4sQ", 1, b"mdat", 16 + len(data))

    return head(len(head(0))) + data


def _box(name: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return struct.pack(">I4s", 8 + len(body), name) + body


def _table(name: bytes, entries: int, content: bytes) -> bytes:
    return _box(name, struct.pack(">II", 0, entries), content)


def _numbers(values: Sequence[int] | np.ndarray) -> bytes:
    return np.asarray(values, dtype=">u4").tobytes()
