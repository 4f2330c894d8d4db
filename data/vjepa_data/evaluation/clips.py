"""Clips to evaluate on: the same ones every time, nothing random about where or when they look.

In time, `per_video` clips whose starts are evenly spaced from the first frame to the last start that fits; a picture
is one clip of equal frames. In space, the whole frame scaled to a square, so that nothing is cut off and a place in the
grid is a place in the picture; or, with several views, squares of the short side's length, evenly spaced along the long
side, as V-JEPA 2 evaluates.

Frames are decoded in a decode worker (`vjepa_data.decoding.decode_worker`): a file that hangs or crashes its decoder
costs only its own video.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from vjepa_data.corpus.index import Index, Sample
from vjepa_data.decoding.backends import Expect
from vjepa_data.decoding.decode_worker import DecodeWorker
from vjepa_data.errors import Unreadable
from vjepa_data.reader.clip_times import can_serve, offsets
from vjepa_data.reader.crops import CropBox, cut_out
from vjepa_data.rng import generator
from vjepa_data.settings import BadInput

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalClip:
    """One clip of one video."""

    key: str
    video: int
    """Number of the sample in the index."""
    frames: UInt8[Tensor, "T px px C"]
    numbers: tuple[int, ...]
    """Of the frames in the video file."""
    fps: float
    """Frames per second of the video file."""
    labels: Mapping[str, Any]
    view: int = 0
    """Which square of the picture, from its left or its top."""

    @property
    def start_s(self) -> float:
        return self.numbers[0] / self.fps


class EvalClips:
    """The evaluation clips of one split, decoded as they are asked for."""

    def __init__(
        self,
        shards: Path,
        *,
        split: str,
        px: int,
        frames: int,
        fps: float,
        per_video: int = 1,
        views: int = 1,
        max_videos: int | None = None,
    ) -> None:
        """Args:
        shards: a corpus.
        split: which part of it.
        px: height and width of the clips.
        frames, fps: of the clips, in video time.
        per_video: clips of each video, fewer where it is too short for so many different ones.
        views: of each clip: 1 is the whole frame, more are squares of it.
        max_videos: at most so many, the first ones of a shuffle that is always the same.

        Raises:
            BadInput: no corpus, no such split, or no video in it that is long enough.
        """
        self.index, self.px, self.frames, self.rate = Index(shards, split), px, frames, fps
        self.per_video, self.views = per_video, views
        self._servant: DecodeWorker | None = None
        fit = np.flatnonzero(self._serves(slice(None)))
        if not len(fit):
            raise BadInput(
                f"{shards}: none of the {len(self.index)} videos of split {split!r} holds {frames} frames at {fps:g} "
                "per second; give another split, or a model of shorter clips"
            )
        if len(fit) < len(self.index):
            log.info("%s: %d videos are too short or too slow and left out", shards, len(self.index) - len(fit))
        if max_videos is not None and len(fit) > max_videos:
            fit = np.sort(generator(0, "evaluation videos").permutation(fit)[:max_videos])
        self.chosen = [(int(video), start) for video in fit for start in self.starts(int(video))]
        self.videos = len(fit)
        self.skipped = 0
        """Clips that could not be read or decoded so far."""

    def __len__(self) -> int:
        return len(self.chosen) * self.views

    def __iter__(self) -> Iterator[EvalClip]:
        for video, chosen in itertools.groupby(self.chosen, key=lambda pair: pair[0]):
            starts = [start for _, start in chosen]
            try:
                yield from self.read(video, starts)
            except Unreadable as error:
                self.skipped += len(starts) * self.views
                log.warning("%s is left out: %s", self.index.key(video), error.detail)

    def read(self, video: int, starts: Sequence[int] | None = None) -> list[EvalClip]:
        """Decode clips of one video; by default all that are evaluated.

        Raises:
            Unreadable: it cannot be had.
        """
        starts = self.starts(video) if starts is None else starts
        sample = self.index.read(video)
        return [clip for start in starts for clip in self._clips(video, start, sample, sample.labels)]

    def starts(self, video: int) -> list[int]:
        """First frames of the clips of one video; none if it is too short or too slow."""
        if not self._serves(slice(video, video + 1))[0]:
            return []
        last = max(0, int(self.index.frames[video]) - 1 - int(self._ahead(video)[-1]))
        if self.per_video == 1:
            return [last // 2]
        return sorted(set(np.linspace(0, last, self.per_video).round().astype(int).tolist()))

    def _serves(self, videos: slice) -> np.ndarray:
        """Which are long and fast enough for a clip; a picture is, for one that stands still."""
        frames, fps = self.index.frames[videos], self.index.fps[videos]
        return can_serve(frames, fps, frames=self.frames, fps=self.rate) | (frames == 1)

    def _ahead(self, video: int) -> Int[np.ndarray, " T"]:
        return offsets(frames=self.frames, fps=self.rate, file_fps=float(self.index.fps[video]))

    def _clips(self, video: int, start: int, sample: Sample, labels: Mapping[str, Any]) -> list[EvalClip]:
        index = self.index
        numbers = np.minimum(start + self._ahead(video), index.frames[video] - 1).tolist()
        expect = Expect(int(index.frames[video]), int(index.width[video]), int(index.height[video]))
        if self._servant is None:
            self._servant = DecodeWorker("pyav")
        frames = self._servant.decode(sample.video, numbers, expect, suffix=sample.suffix)
        fps = float(index.fps[video])
        return [
            EvalClip(sample.key, video, picture, tuple(numbers), fps, labels, view)
            for view, picture in enumerate(square_views(frames, self.px, self.views))
        ]


def square_views(frames: UInt8[np.ndarray, "T H W C"], px: int, views: int) -> list[UInt8[Tensor, "T px px C"]]:
    """The whole frame scaled to a square; or `views` squares of the short side's length, evenly along the long side.

    Source: several crops of each clip, V-JEPA 2 (arXiv:2506.09985), frozen evaluation: 3.
    """
    if views == 1:
        return [whole_view(frames, px)]
    height, width = frames.shape[1:3]
    short = min(height, width)
    places = np.linspace(0, max(height, width) - short, views).round().astype(int).tolist()
    boxes = [
        CropBox(0, place, short, short, flip=False) if width >= height else CropBox(place, 0, short, short, flip=False)
        for place in places
    ]
    return [_own(frames, box, px) for box in boxes]


def whole_view(frames: UInt8[np.ndarray, "T H W C"], px: int) -> UInt8[Tensor, "T px px C"]:
    """Scale whole frames to a square."""
    return _own(frames, CropBox(0, 0, frames.shape[1], frames.shape[2], flip=False), px)


def _own(frames: UInt8[np.ndarray, "T H W C"], box: CropBox, px: int) -> UInt8[Tensor, "T px px C"]:
    """Cut out into memory of its own: frames of a servant are overwritten by those to come."""
    return cut_out(frames, box, px).clone(memory_format=torch.contiguous_format)


def centre_view(frames: UInt8[Tensor, "T H W C"], px: int) -> UInt8[Tensor, "T px px C"]:
    """Short side to px * 256 / 224, then the centre: what Hugging Face's video processor does, byte for byte."""
    height, width = frames.shape[1:3]
    short = int(px * 256 / 224)
    scale = short / min(height, width)
    size = (short, int(width * scale)) if height <= width else (int(height * scale), short)
    pictures = torch.nn.functional.interpolate(frames.permute(0, 3, 1, 2), size, mode="bilinear", antialias=True)
    top, left = (size[0] - px) // 2, (size[1] - px) // 2
    return pictures[:, :, top : top + px, left : left + px].permute(0, 2, 3, 1)
