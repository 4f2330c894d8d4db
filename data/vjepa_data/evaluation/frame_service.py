"""The child process behind `FileFrames`: decode a video in order, a few frames at a time. Imports no torch."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8

from vjepa_data.decoding.orientation import upright
from vjepa_data.media.frames import read_frames, read_pipe
from vjepa_data.media.pool import guarded
from vjepa_data.media.probe import probe
from vjepa_data.media.transcode import resample_frames
from vjepa_data.media.video import Refused

MAX_BYTES = 64 << 20
"""Bytes of an answer, about: fewer frames at once where frames are large."""

Pictures = UInt8[np.ndarray, "T H W 3"]


@dataclass(frozen=True)
class FrameRequest:
    """The beginning of a stream. Requests for its next frames are None."""

    path: Path
    skip: int
    """Frames to leave out."""
    at_once: int
    """Frames of an answer, at most."""
    is_piped: bool


def frame_service(rate: str, tubelet_frames: int) -> Callable[[FrameRequest | None], Pictures | Exception | None]:
    """Make the function that answers with the next frames of a video, or None at its end.

    Args:
        rate: frames per second of video time, as a fraction.
        tubelet_frames: frames that are never parted.
    """
    frames: Iterator[Pictures] = iter(())

    def next_frames(request: FrameRequest | None) -> Pictures | None:
        nonlocal frames
        if request is not None:
            frames = _grouped(_decoded(request, Fraction(rate)), request.at_once, tubelet_frames)
        return next(frames, None)

    return guarded(next_frames)


def _grouped(pictures: Iterator[av.VideoFrame], at_once: int, tubelet_frames: int) -> Iterator[Pictures]:
    """Convert and group frames. The frames before a damaged frame come before its reason."""
    found: list[np.ndarray] = []
    broken: Refused | None = None
    try:
        for frame in pictures:
            found.append(upright(frame))
            is_whole = len(found) % tubelet_frames == 0
            if is_whole and (len(found) >= at_once or len(found) * found[0].nbytes >= MAX_BYTES):
                yield np.stack(found)
                found = []
    except Refused as refusal:
        broken = refusal
    if found:
        yield np.stack(found)
    if broken is not None:
        raise broken


def _decoded(request: FrameRequest, rate: Fraction) -> Iterator[av.VideoFrame]:
    """Decode a video at a constant rate, from frame number `skip` on."""
    path, skip = request.path, request.skip
    if request.is_piped:
        with path.open("rb") as file:
            pictures = resample_frames(read_pipe(file), start_s=0, seconds=None, rate=rate)
            yield from itertools.islice(pictures, skip, None)
        return
    start_s = float(skip / rate)
    timed = read_frames(path, probe(path), start_s=start_s)
    yield from resample_frames(timed, start_s=start_s, seconds=None, rate=rate)
