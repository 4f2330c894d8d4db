"""Clips of any video file, where it lies: no shards, no canonical form, nothing written.

Slower than a corpus (a file is decoded from its last key frame on), and for features, not for training. The same clips
every time: evenly spaced, the whole frame scaled to a square, or several squares of it.

A stranger's file is opened in a child process that may be killed (`vjepa_data.media.pool`): one that hangs or crashes
its decoder is a `Refused` of its own and nothing else.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from vjepa_data.evaluation.clips import square_views
from vjepa_data.media.pool import WorkerPool
from vjepa_data.media.transcode import decode, shown_at
from vjepa_data.media.video import SUFFIXES, Reason, Refused, open_video, probe, video_stream
from vjepa_data.settings import BadInput

TIMEOUT_S = 120.0


@dataclass(frozen=True)
class FileClip:
    """One clip of a file."""

    frames: UInt8[Tensor, "T px px C"]
    start_s: float
    """From the first frame of the file."""
    view: int = 0
    """Which square of the picture, from its left or its top."""


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
        raise BadInput(
            f"{', '.join(map(str, places))}: no file in there is called like a video (.mp4, .mkv, ...); of pictures "
            "make a corpus first: vjepa shard DIR --out CORPUS media=images"
        )
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Wanted:
    """What a child is asked for."""

    path: Path
    px: int
    frames: int
    fps: float
    per_video: int
    views: int


def work(wanted: Wanted) -> list[tuple[UInt8[np.ndarray, "T px px C"], float, int]]:
    """What a child does; its answers hold arrays, which are sent as they are."""
    clips = file_clips(
        wanted.path,
        px=wanted.px,
        frames=wanted.frames,
        fps=wanted.fps,
        per_video=wanted.per_video,
        views=wanted.views,
    )
    return [(clip.frames.numpy(), clip.start_s, clip.view) for clip in clips]


class FileVideos:
    """The clips of some files, decoded ahead by children while something else is done with those before."""

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        px: int,
        frames: int,
        fps: float,
        per_video: int = 1,
        views: int = 1,
        workers: int = 2,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """Args:
        paths: of the files.
        px, frames, fps, per_video, views: as in `file_clips`.
        workers: children.
        timeout_s: seconds that a file may take, opening and decoding, before its child is killed.
        """
        self.keys: Sequence[str] = [str(path) for path in paths]
        self._wanted = [Wanted(path, px, frames, fps, per_video, views) for path in paths]
        self._pool: WorkerPool[Wanted, list[tuple[np.ndarray, float, int]]] = WorkerPool(
            __name__, workers=workers, timeout_s=timeout_s
        )

    def __enter__(self) -> "FileVideos":
        return self

    def __exit__(self, *error: Any) -> None:
        self._pool.__exit__(*error)

    def read(self, videos: Sequence[int]) -> Iterator[list[FileClip] | Refused]:
        """The clips of each video, or why there are none, in order."""
        for _, answer in self._pool.map(self._wanted[video] for video in videos):
            if isinstance(answer, Refused):
                yield answer
            else:
                yield [FileClip(torch.from_numpy(frames), start_s, view) for frames, start_s, view in answer]


def file_clips(path: Path, *, px: int, frames: int, fps: float, per_video: int = 1, views: int = 1) -> list[FileClip]:
    """Decode the evaluation clips of one file, in this process.

    Args:
        path: of the video.
        px: height and width of the clips.
        frames, fps: of the clips, in video time.
        per_video: clips, evenly spaced from the first frame to the last start that fits.
        views: of each clip: 1 is the whole frame, more are squares of it.

    Raises:
        Refused: it is no video, damaged, or shorter than a clip.
    """
    facts = probe(path)
    last = facts.duration_s - (frames - 1) / fps - 1 / facts.fps
    starts = [max(0.0, last) / 2] if per_video == 1 else np.linspace(0, max(0.0, last), per_video).tolist()
    return [
        FileClip(picture, start, view)
        for start in starts
        for view, picture in enumerate(
            square_views(_pictures(path, start_s=start, origin_s=facts.start_s, frames=frames, fps=fps), px, views)
        )
    ]


def _pictures(path: Path, *, start_s: float, origin_s: float, frames: int, fps: float) -> UInt8[np.ndarray, "T H W 3"]:
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
    return np.stack(pictures)


def _upright(frame: av.VideoFrame) -> UInt8[np.ndarray, "H W 3"]:
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4))
