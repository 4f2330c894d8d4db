"""Deterministic clips for evaluation.

In time, the starts of `per_video` clips are evenly spaced from the first frame to the last start that fits. Or a clip
starts every `every_s` seconds, so that clips may overlap. Videos that are shorter than a clip are left out, or their
last frame is held, as in training. A picture is a single clip of equal frames. In space, a single view is the whole
frame scaled to a square, so that nothing is cut off and positions in the token grid are positions in the picture.
Several views are squares of the short side's length, evenly spaced along the long side, as V-JEPA 2 evaluates.

A decode worker (`vjepa_data.decoding.decode_worker`) decodes the frames, so a file that hangs or crashes its decoder
affects only its own video.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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

Short = Literal["leave_out", "hold"]
"""Treatment of videos shorter than a clip, as in `data.clip.short`."""


MOST_BYTES = 2 << 30
"""Largest size of the clips of a video, which are in memory together."""


def start_times(last_s: float, *, per_video: int, every_s: float | None) -> list[float]:
    """Return the start of each clip of a video, in seconds.

    Args:
        last_s: last start that fits.
        per_video: number of clips, evenly spaced from the first frame to the last start. A single clip is the middle.
        every_s: seconds from a start to the next, instead of a number of clips.
    """
    if every_s is not None:
        return [number * every_s for number in range(1 + int(last_s / every_s + 1e-6))]
    return [last_s / 2] if per_video == 1 else sorted(set(np.linspace(0, last_s, per_video).tolist()))


def too_many(clips: int, *, px: int, frames: int, views: int) -> str | None:
    """Return the reason why so many clips of a video are refused, or None."""
    most = MOST_BYTES // (px * px * 3 * frames * views)
    return (
        f"{clips} clips of one video, at most {most} fit into memory; give a longer --every-s" if clips > most else None
    )


@dataclass(frozen=True)
class EvalClip:
    """A clip of a video."""

    key: str
    video: int
    """Position of the sample in the index."""
    frames: UInt8[Tensor, "T px px C"]
    numbers: tuple[int, ...]
    """Numbers of the frames in the stored video, of which the sample may be a part."""
    fps: float
    """Frames per second of the video file."""
    labels: Mapping[str, Any]
    view: int = 0
    """Number of the view, counted from the left or the top of the picture."""

    @property
    def start_s(self) -> float:
        return self.numbers[0] / self.fps


class EvalClips:
    """The evaluation clips of a split, decoded on demand."""

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
        short: Short = "leave_out",
        every_s: float | None = None,
    ) -> None:
        """Args:
        shards: folder of the corpus.
        split: split of the corpus.
        px: height and width of the clips, in pixels.
        frames, fps: length and frame rate of the clips, in video time.
        per_video: clips per video. Short videos have fewer different clips.
        views: views per clip. 1 is the whole frame, more are squares.
        max_videos: largest number of videos, taken from a shuffle that never changes.
        short: whether a video shorter than a clip is left out or its last frame held, see `data.clip.short`.
        every_s: seconds from the start of a clip to the next, instead of a number of clips.

        Raises:
            BadInput: the corpus or split does not exist, or none of its videos is long enough.
        """
        self.index, self.px, self.frames, self.rate = Index(shards, split), px, frames, fps
        self.per_video, self.views, self.short, self.every_s = per_video, views, short, every_s
        self._decode_worker: DecodeWorker | None = None
        fit = np.flatnonzero(self._is_long_enough(slice(None)))
        if not len(fit):
            raise BadInput(
                f"{shards}: none of the {len(self.index)} videos of split {split!r} has {frames} frames at {fps:g} "
                "per second. Give another split, a model with shorter clips, or --short hold."
            )
        self.left_out = len(self.index) - len(fit)
        """Number of videos that are too short or too slow for a clip."""
        if self.left_out:
            keys = [self.index.key(int(video)) for video in np.flatnonzero(~self._is_long_enough(slice(None)))[:3]]
            log.warning(
                "%s: %d of %d videos are left out, since they are too short or too slow for %d frames at %g per second "
                "(%s%s); --short hold repeats the last frame of short ones",
                *(shards, self.left_out, len(self.index), frames, fps, ", ".join(keys)),
                ", ..." if self.left_out > len(keys) else "",
            )
        if max_videos is not None and len(fit) > max_videos:
            fit = np.sort(generator(0, "evaluation videos").permutation(fit)[:max_videos])
        self.chosen = [(int(video), start) for video in fit for start in self.starts(int(video))]
        self.videos = len(fit)
        self.skipped = 0
        """Number of clips so far that could not be read or decoded."""

    @property
    def short_videos(self) -> str:
        """Number of videos that are shorter than a clip, and their treatment, for the record."""
        return "held" if self.short == "hold" else f"{self.left_out} left out"

    def __len__(self) -> int:
        return len(self.chosen) * self.views

    def __iter__(self) -> Iterator[EvalClip]:
        for video, chosen in itertools.groupby(self.chosen, key=lambda pair: pair[0]):
            starts = [start for _, start in chosen]
            try:
                yield from self.read(video, starts)
            except Unreadable as error:
                self.skipped += len(starts) * self.views
                log.warning("skipping %s: %s", self.index.key(video), error.detail)

    def read(self, video: int, starts: Sequence[int] | None = None) -> list[EvalClip]:
        """Decode clips of a video, by default all its evaluation clips.

        Raises:
            Unreadable: the video cannot be read or decoded.
        """
        starts = self.starts(video) if starts is None else starts
        if reason := too_many(len(starts), px=self.px, frames=self.frames, views=self.views):
            raise Unreadable("memory", reason)
        sample = self.index.read(video)
        return [clip for start in starts for clip in self._clips(video, start, sample, sample.labels)]

    def starts(self, video: int) -> list[int]:
        """Return the first frames of a video's clips. The list is empty if it is too short or too slow."""
        if not self._is_long_enough(slice(video, video + 1))[0]:
            return []
        last = max(0, int(self.index.frames[video]) - 1 - int(self._frame_offsets(video)[-1]))
        if self.every_s is None and self.per_video == 1:
            return [last // 2]
        step = None if self.every_s is None else self.every_s * float(self.index.fps[video])  # in frames
        return sorted(set(np.rint(start_times(last, per_video=self.per_video, every_s=step)).astype(int).tolist()))

    def _is_long_enough(self, videos: slice) -> np.ndarray:
        """Say of each video whether it has enough frames and rate for a clip. A picture always has."""
        frames, fps = self.index.frames[videos], self.index.fps[videos]
        held = self.short == "hold"
        return can_serve(frames, fps, frames=self.frames, fps=self.rate, hold=held) | (frames == 1)

    def _frame_offsets(self, video: int) -> Int[np.ndarray, " T"]:
        return offsets(frames=self.frames, fps=self.rate, file_fps=float(self.index.fps[video]))

    def _clips(self, video: int, start: int, sample: Sample, labels: Mapping[str, Any]) -> list[EvalClip]:
        index = self.index
        numbers = np.minimum(start + self._frame_offsets(video), index.frames[video] - 1).tolist()
        expect = Expect(int(index.frames[video]), int(index.width[video]), int(index.height[video]))
        if self._decode_worker is None:
            self._decode_worker = DecodeWorker("pyav")
        frames = self._decode_worker.decode(sample.video, numbers, expect, suffix=sample.suffix)
        fps, first = float(index.fps[video]), index.first_frame(video)
        in_video = tuple(first + number for number in numbers)
        return [
            EvalClip(sample.key, video, picture, in_video, fps, labels, view)
            for view, picture in enumerate(square_views(frames, self.px, self.views))
        ]


def square_views(frames: UInt8[np.ndarray, "T H W C"], px: int, views: int) -> list[UInt8[Tensor, "T px px C"]]:
    """Return the whole frame scaled to a square, or `views` squares of the short side's length along the long side.

    Source: several crops of each clip, V-JEPA 2 (arXiv:2506.09985), frozen evaluation: 3.
    """
    if views == 1:
        return [whole_view(frames, px)]
    height, width = frames.shape[1:3]
    short = min(height, width)
    corners = np.linspace(0, max(height, width) - short, views).round().astype(int).tolist()
    boxes = [
        CropBox(0, at, short, short, flip=False) if width >= height else CropBox(at, 0, short, short, flip=False)
        for at in corners
    ]
    return [_crop_copy(frames, box, px) for box in boxes]


def whole_view(frames: UInt8[np.ndarray, "T H W C"], px: int) -> UInt8[Tensor, "T px px C"]:
    """Scale whole frames to a square."""
    return _crop_copy(frames, CropBox(0, 0, frames.shape[1], frames.shape[2], flip=False), px)


def _crop_copy(frames: UInt8[np.ndarray, "T H W C"], box: CropBox, px: int) -> UInt8[Tensor, "T px px C"]:
    """Crop into new memory, since the decode worker overwrites its frames."""
    return cut_out(frames, box, px).clone(memory_format=torch.contiguous_format)


def centre_view(frames: UInt8[Tensor, "T H W C"], px: int) -> UInt8[Tensor, "T px px C"]:
    """Resize the short side to px * 256 / 224 and crop the centre, byte for byte as Hugging Face's video processor."""
    height, width = frames.shape[1:3]
    short = int(px * 256 / 224)
    scale = short / min(height, width)
    size = (short, int(width * scale)) if height <= width else (int(height * scale), short)
    pictures = torch.nn.functional.interpolate(frames.permute(0, 3, 1, 2), size, mode="bilinear", antialias=True)
    top, left = (size[0] - px) // 2, (size[1] - px) // 2
    return pictures[:, :, top : top + px, left : left + px].permute(0, 2, 3, 1)
