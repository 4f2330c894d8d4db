"""Clips of any video file, where it lies: no shards, no canonical form, nothing written.

Slower than a corpus (a file is decoded from its last key frame on), and for features, not for training. The same clips
every time: evenly spaced, the whole frame scaled to a square.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from vjepa.evals.clips import whole_view
from vjepa_data.settings import BadInput
from vjepa_data.transcode import decode, shown_at
from vjepa_data.video import SUFFIXES, Reason, Refused, open_video, probe, video_stream


@dataclass(frozen=True)
class FileClip:
    """One clip of a file."""

    frames: UInt8[Tensor, "T px px C"]
    start_s: float
    """From the first frame of the file."""


def find_videos(places: Sequence[Path]) -> list[Path]:
    """Every video in some files and folders, in order; a folder is searched through and through.

    Raises:
        BadInput: a place does not exist, or nothing in all of them looks like a video.
    """
    found: list[Path] = []
    for place in places:
        if not place.exists():
            raise BadInput(f"{place}: no such file or folder; give videos, folders of videos, or a corpus")
        inside = sorted(place.rglob("*")) if place.is_dir() else [place]
        found += [one for one in inside if not place.is_dir() or (one.suffix.lower() in SUFFIXES and one.is_file())]
    if not found:
        raise BadInput(f"{', '.join(map(str, places))}: no file in there is called like a video (.mp4, .mkv, ...)")
    return list(dict.fromkeys(found))


def file_clips(path: Path, *, px: int, frames: int, fps: float, per_video: int = 1) -> list[FileClip]:
    """Decode the evaluation clips of one file.

    Args:
        path: of the video.
        px: height and width of the clips.
        frames, fps: of the clips, in video time.
        per_video: clips, evenly spaced from the first frame to the last start that fits.

    Raises:
        Refused: it is no video, damaged, or shorter than a clip.
    """
    facts = probe(path)
    last = facts.duration_s - (frames - 1) / fps - 1 / facts.fps
    starts = [max(0.0, last) / 2] if per_video == 1 else np.linspace(0, max(0.0, last), per_video).tolist()
    return [_clip(path, start_s=start, origin_s=facts.start_s, px=px, frames=frames, fps=fps) for start in starts]


def _clip(path: Path, *, start_s: float, origin_s: float, px: int, frames: int, fps: float) -> FileClip:
    rate = Fraction(fps).limit_denominator(1001)
    with open_video(path) as container:
        stream = video_stream(container)
        own = Fraction(stream.average_rate or stream.guessed_rate or 25)
        # A little early: a seek by rounded times may miss the key frame that it is meant for.
        timed = decode(container, stream, origin_s + start_s if start_s > 0 else None, own)
        pictures: list[np.ndarray] = []
        for frame in shown_at(timed, start_s=origin_s + start_s, seconds=frames / fps, rate=rate):
            pictures.append(_upright(frame))
            if len(pictures) == frames:
                break
    if len(pictures) < frames:
        raise Refused(Reason.TOO_SHORT, f"{len(pictures)} frames at {fps:g} per second, a clip has {frames}")
    return FileClip(whole_view(np.stack(pictures), px), start_s)


def _upright(frame: av.VideoFrame) -> UInt8[np.ndarray, "H W 3"]:
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4))
