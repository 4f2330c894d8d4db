"""Evaluation clips of video files, without shards or the canonical form.

This is slower than a corpus, since decoding starts at the preceding key frame, and meant for features rather than for
training. Clips are deterministic: evenly spaced in time, and the whole frame scaled to a square or several squares.

Untrusted files are opened in child processes that can be killed (`vjepa_data.media.pool`). A file that hangs or crashes
its decoder gives a `Refused` and affects no other file.
"""

import itertools
import math
import os
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

from vjepa_data.decoding.orientation import upright
from vjepa_data.evaluation.clips import Short, square_views, start_times, too_many
from vjepa_data.media.frames import read_frames
from vjepa_data.media.pool import WorkerPool
from vjepa_data.media.probe import probe
from vjepa_data.media.transcode import resample_frames
from vjepa_data.media.video import SUFFIXES, Reason, Refused, VideoInfo
from vjepa_data.settings import BadInput

TIMEOUT_S = 120.0


@dataclass(frozen=True)
class FileClip:
    """A clip of a file."""

    frames: UInt8[Tensor, "T px px C"]
    start_s: float
    """Time since the first frame of the file."""
    view: int = 0
    """Number of the view, counted from the left or the top of the picture."""


def find_videos(paths: Sequence[Path]) -> list[Path]:
    """List the given video files and all videos below the given folders, in order.

    Raises:
        BadInput: a path does not exist, or no file has the name of a video.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise BadInput(f"{path}: no such file or folder; give videos, folders of videos, or a corpus")
        if path.is_dir():
            found += [file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES and file.is_file()]
        else:
            found.append(path)
    if not found:
        raise BadInput(
            f"{', '.join(map(str, paths))}: no file there has the name of a video (.mp4, .mkv, ...); for pictures, "
            "make a corpus first: vjepa shard DIR --out CORPUS media=images"
        )
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class FileClipRequest:
    """Arguments of `file_clips`, sent to a child process."""

    path: Path
    px: int
    frames: int
    fps: float
    per_video: int
    views: int
    short: Short
    every_s: float | None


def work(request: FileClipRequest) -> list[tuple[UInt8[np.ndarray, "T px px C"], float, int]]:
    """Decode the clips of a file in a child process. Arrays are pickled faster than tensors."""
    return [(clip.frames.numpy(), clip.start_s, clip.view) for clip in file_clips(**vars(request))]


class FileVideos:
    """The clips of several files, decoded ahead by child processes."""

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        px: int,
        frames: int,
        fps: float,
        per_video: int = 1,
        views: int = 1,
        short: Short = "leave_out",
        every_s: float | None = None,
        workers: int = 2,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """Args:
        paths: paths of the files.
        px, frames, fps, per_video, views, short, every_s: as in `file_clips`.
        workers: number of child processes.
        timeout_s: time budget for opening and decoding a file, in seconds of work or sleep.
        """
        self.keys: Sequence[str] = [printable(path) for path in paths]
        self._requests = [FileClipRequest(path, px, frames, fps, per_video, views, short, every_s) for path in paths]
        self._pool: WorkerPool[FileClipRequest, list[tuple[np.ndarray, float, int]]] = WorkerPool(
            __name__, workers=workers, timeout_s=timeout_s
        )

    def __enter__(self) -> "FileVideos":
        return self

    def __exit__(self, *error: Any) -> None:
        self._pool.__exit__(*error)

    def read(self, videos: Sequence[int]) -> Iterator[list[FileClip] | Refused]:
        """Yield the clips of each video in order, or the reason why it has none."""
        for _, answer in self._pool.map(self._requests[video] for video in videos):
            if isinstance(answer, Refused):
                yield answer
            else:
                yield [FileClip(torch.from_numpy(frames), start_s, view) for frames, start_s, view in answer]


def printable(path: Path) -> str:
    """Return a path as text that can be written as UTF-8: other bytes of a name are escaped (`caf\\xe9.mp4`)."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def file_clips(
    path: Path,
    *,
    px: int,
    frames: int,
    fps: float,
    per_video: int = 1,
    views: int = 1,
    short: Short = "leave_out",
    every_s: float | None = None,
) -> list[FileClip]:
    """Decode the evaluation clips of a file in this process.

    Args:
        path: path of the video.
        px: height and width of the clips, in pixels.
        frames, fps: length and frame rate of the clips, in video time.
        per_video: number of clips, evenly spaced from the first frame to the last start that fits.
        views: views per clip. 1 is the whole frame, more are squares.
        short: whether a file that is shorter than a clip is refused, or its last frame held.
        every_s: seconds from the start of a clip to the next, instead of a number of clips.

    Raises:
        Refused: the file is not a video, is damaged, is shorter than a clip, or has more clips than fit into memory.
    """
    info = probe(path)
    last = max(0.0, info.duration_s - (frames - 1) / fps - 1 / info.fps)
    clips = []
    # A short file has one clip, from its start.
    starts_s = start_times(last, per_video=per_video, every_s=every_s)
    if reason := too_many(len(starts_s), px=px, frames=frames, views=views):
        raise Refused(Reason.TOO_LARGE, reason)
    for start_s in starts_s:
        pictures = _pictures(path, info, start_s=start_s, frames=frames, fps=fps, short=short)
        clips += [FileClip(view, start_s, number) for number, view in enumerate(square_views(pictures, px, views))]
    return clips


def _pictures(
    path: Path, info: VideoInfo, *, start_s: float, frames: int, fps: float, short: Short
) -> UInt8[np.ndarray, "T H W 3"]:
    """Decode the frames of a clip. The last frame serves times up to half a frame after it, as in a corpus."""
    rate = Fraction(fps).limit_denominator(1001)
    last_s = 0.0

    def noted(timed: Iterator[tuple[Fraction, av.VideoFrame]]) -> Iterator[tuple[Fraction, av.VideoFrame]]:
        nonlocal last_s
        for time, frame in timed:
            last_s = float(time)
            yield time, frame

    timed = noted(read_frames(path, info, start_s=start_s))
    resampled = resample_frames(timed, start_s=start_s, seconds=frames / fps, rate=rate)
    pictures = [upright(frame) for frame in itertools.islice(resampled, frames)]
    end_s = last_s + 0.5 / info.fps
    if start_s + (frames - 1) / fps + 1e-6 >= end_s:
        pictures = pictures[: max(1, math.ceil((end_s - start_s) * fps - 1e-6))]
    if pictures and short == "hold":
        pictures += [pictures[-1]] * (frames - len(pictures))
    if len(pictures) < frames:
        raise Refused(Reason.TOO_SHORT, f"{len(pictures)} frames at {fps:g} per second, a clip has {frames}")
    return np.stack(pictures)
