"""An interface to three video decoders and Pillow: bytes and frame numbers in, uint8 frames out.

All three decoders return identical pixels for the canonical form that `vjepa shard` writes (H.264, yuv420p, constant
rate, closed groups of pictures). Imports no torch itself, so that a decode worker with decord or PyAV starts fast and
uses little memory.
"""

import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vjepa_data.decoding.mp4_boxes import is_turned
from vjepa_data.errors import Unreadable


@dataclass(frozen=True)
class Expect:
    """The index entry of a video. A decoder that finds something else has the wrong bytes or miscounts."""

    frames: int
    width: int
    height: int


def decode(video: bytes, frames: Sequence[int], *, backend: str, expect: Expect) -> np.ndarray:
    """Decode some frames of a video.

    Args:
        video: the file's bytes.
        frames: frame numbers in ascending order. A number may repeat.
        backend: "decord", "torchcodec", "pyav", or "image" for a picture, which counts as a video of a single frame.
        expect: the index entry of the video.

    Returns:
        uint8 [len(frames) H W 3], RGB.

    Raises:
        Unreadable: the bytes are damaged or differ from the index entry.
    """
    unique, back = np.unique(np.asarray(frames, dtype=np.int64), return_inverse=True)
    if len(unique) == 0 or unique[0] < 0 or unique[-1] >= expect.frames:
        raise Unreadable("frames", f"requested frames {list(frames)[:3]}... of a video of {expect.frames} frames")
    pictures = BACKENDS[backend](video, unique, expect)
    if pictures.shape != (len(unique), expect.height, expect.width, 3) or pictures.dtype != np.uint8:
        want = f"{len(unique)}x{expect.height}x{expect.width}x3"
        raise Unreadable("frames", f"{backend} returned {'x'.join(map(str, pictures.shape))}, expected {want}")
    return pictures if len(back) == len(unique) else pictures[back]


def _check_length(backend: str, found: int | None, expect: Expect) -> None:
    if found is not None and found != expect.frames:
        raise Unreadable("frames", f"{backend} counts {found} frames, the index {expect.frames}")


def _decord(video: bytes, frames: np.ndarray, expect: Expect) -> np.ndarray:
    import decord

    try:
        # fault_tol=1 raises at the first frame that cannot be decoded; 0 and -1 would repeat another frame.
        reader = decord.VideoReader(io.BytesIO(video), ctx=decord.cpu(0), num_threads=1, fault_tol=1)
        _check_length("decord", len(reader), expect)
        if expect.width in PADDED_WIDTHS:
            pictures = np.stack([unpadded(reader[number].asnumpy()) for number in frames.tolist()])
        else:
            pictures = np.from_dlpack(_Frames(reader.get_batch(frames)))  # pyright: ignore[reportArgumentType]
    except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, IndexError) as e:
        raise Unreadable("error", f"decord: {e}") from e
    return _mirrored(video, pictures) if is_turned(video) else pictures


def _mirrored(video: bytes, pictures: np.ndarray) -> np.ndarray:
    """Mirror the pictures of decord, which rotates as the display matrix asks but leaves out the mirroring."""
    from av.error import FFmpegError

    from vjepa_data.decoding.orientation import file_orientation

    try:
        return file_orientation(video).mirror(pictures)
    except (FFmpegError, ValueError) as e:
        raise Unreadable("error", f"decord: no display matrix: {e}") from e


PADDED_WIDTHS = (16, 24, 48, 72)
"""Widths at which decord 0.6 takes the padding of rows, to a multiple of 32 pixels, for additional channels."""


def unpadded(picture: np.ndarray) -> np.ndarray:
    """Remove the padding of rows from a picture of decord, uint8 [H W C], if it was taken for channels."""
    height, width, channels = picture.shape
    if channels <= 3:
        return picture
    return picture.reshape(height, width * channels)[:, : 3 * width].reshape(height, width, 3)


class _Frames:
    """Pass decord's array to numpy without the copy that `asnumpy` makes. The array lives as long as the result."""

    def __init__(self, array) -> None:
        self.array = array

    def __dlpack__(self, **_: object):
        return self.array.to_dlpack()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # the CPU


def _torchcodec(video: bytes, frames: np.ndarray, expect: Expect) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]

    try:
        reader = VideoDecoder(video, seek_mode="exact", num_ffmpeg_threads=1, dimension_order="NHWC")
        _check_length("torchcodec", reader.metadata.num_frames, expect)
        return reader.get_frames_at(frames.tolist()).data.numpy()
    except (RuntimeError, ValueError, IndexError) as e:
        raise Unreadable("error", f"torchcodec: {e}") from e


def _pyav(video: bytes, frames: np.ndarray, expect: Expect) -> np.ndarray:
    import av
    from av.error import FFmpegError
    from av.video.stream import VideoStream

    from vjepa_data.decoding.orientation import orientation

    try:
        with av.open(io.BytesIO(video), metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream):
                raise Unreadable("error", "pyav: no video stream")
            stream.thread_type = "NONE"
            _check_length("pyav", stream.frames or None, expect)
            found = _walk(container, stream, frames) if _is_even(stream) else _walk_by_rank(container, stream, frames)
    except (FFmpegError, ValueError, IndexError) as e:
        raise Unreadable("error", f"pyav: {e}") from e
    if len(found) != len(frames):
        raise Unreadable("frames", f"pyav found {len(found)} of {len(frames)} frames by their time stamps")
    turn = orientation(found[0])
    return np.stack([turn.apply(frame.to_ndarray(format="rgb24")) for frame in found])


def _is_even(stream) -> bool:
    """Tell whether the rate of an MP4 is constant, so that times tell the numbers of frames."""
    times = [entry.timestamp for entry in stream.index_entries]
    return len({later - earlier for earlier, later in itertools.pairwise(times)}) <= 1


def _walk_by_rank(container, stream, frames: np.ndarray) -> list:
    """Decode like `_walk` where the rate varies: frame n is that with the n-th smallest time stamp, as in decord."""
    times = sorted(p.pts for p in container.demux(stream) if p.pts is not None and not p.is_discard)
    wanted = {times[number] for number in frames.tolist()}
    container.seek(min(wanted), stream=stream, backward=True)
    found = []
    for frame in container.decode(stream):
        if frame.pts in wanted:
            found.append(frame)
        if frame.pts is None or frame.pts >= max(wanted):
            break
    return found


def _walk(container, stream, frames: np.ndarray) -> list:
    """Decode from the key frame before the first frame to the last, and convert only the requested frames.

    In H.264, frames from which no other frame is predicted are skipped unless requested. This gives the same pixels in
    a seventh less time. It is unsafe in AV1 and VP9, where a packet may contain frames of several times.
    """
    period = 1 / (stream.average_rate * stream.time_base)
    start = stream.start_time or 0
    container.seek(int(start + int(frames[0]) * period), stream=stream, backward=True)
    wanted = set(frames.tolist())
    may_skip = stream.codec_context.name == "h264"
    found = []
    for packet in container.demux(stream):
        if may_skip:
            is_wanted = packet.pts is None or round((packet.pts - start) / period) in wanted
            stream.codec_context.skip_frame = "DEFAULT" if is_wanted else "NONREF"
        for frame in packet.decode():
            number = round((frame.pts - start) / period)
            if number in wanted:
                found.append(frame)
            if number >= int(frames[-1]):
                break
        if len(found) == len(frames):
            break
    return found


def _image(image: bytes, frames: np.ndarray, expect: Expect) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    from vjepa_data.decoding.picture import upright_rgb

    try:
        picture = Image.open(io.BytesIO(image), formats=("JPEG", "PNG", "WEBP"))
        pixels = np.asarray(upright_rgb(picture))[None]
    except UnidentifiedImageError as e:
        raise Unreadable("error", "pillow: not a JPEG, PNG or WEBP") from e
    except (OSError, ValueError, Image.DecompressionBombError) as e:
        raise Unreadable("error", f"pillow: {e}") from e
    return pixels


BACKENDS: dict[str, Callable[[bytes, np.ndarray, Expect], np.ndarray]] = {
    "decord": _decord,
    "torchcodec": _torchcodec,
    "pyav": _pyav,
    "image": _image,
}
