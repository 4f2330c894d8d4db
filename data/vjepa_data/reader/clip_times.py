"""Choose the frames of a video that make a clip.

A clip is defined in seconds: `frames` frames, 1 / fps apart. It starts on a random frame of the file. Each frame is the
file frame nearest to its exact time. A 29.97 fps video sampled at 4 fps therefore keeps its speed (steps of 7 and 8
frames) instead of running 7 % fast (steps of 7).

    sequence: 3      |--clip 0--|  gap  |--clip 1--|  gap  |--clip 2--|      one video, one slot, one crop
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vjepa_data.errors import BadInput
from vjepa_data.rng import generator
from vjepa_data.settings import Clip, Source

if TYPE_CHECKING:
    from vjepa_data.corpus.index import Index

RATE_TOLERANCE = 1.001  # a 29.97 fps file may serve 30 fps: one frame in a thousand is repeated


@dataclass(frozen=True)
class FrameSelection:
    """The frames of a slot, from its clip or from all clips of its sequence in order."""

    frames: tuple[int, ...]
    """Frame numbers in the file, ascending: `sequence` times as many as a clip has."""

    starts: tuple[int, ...]
    """First frame number of each clip."""

    file_fps: float

    @property
    def start_s(self) -> tuple[float, ...]:
        """Time of the first frame of each clip, seconds from the start of the stored video."""
        return tuple(first / self.file_fps if first else 0.0 for first in self.starts)

    @property
    def times_s(self) -> np.ndarray:
        """Time of each frame in the stored video, seconds, float64 [sequence, frames]."""
        return np.array(self.frames).reshape(len(self.starts), -1) / self.file_fps


def offsets(*, frames: int, fps: float, file_fps: float, sequence: int = 1, gap_s: float = 0.0) -> np.ndarray:
    """Return how many frames of the file after the first each frame of a clip lies.

    Args:
        frames: frames of a clip.
        fps: frames per second of video time asked for.
        file_fps: frames per second of the file.
        sequence: number of consecutive clips.
        gap_s: video time between the end of a clip and the start of the next, seconds. A frame lasts 1 / fps seconds.

    Returns:
        int64 [sequence * frames], from 0. Frame `k` of the first clip is the nearest to k / fps seconds, or the
        later of two equally near frames.
    """
    return np.floor(_frame_times(frames, fps, sequence, gap_s) * (file_fps / fps) + 0.5).astype(np.int64)


def _frame_times(frames: int, fps: float | np.ndarray, sequence: int, gap_s: float) -> np.ndarray:
    """Return the exact time of each frame of a slot, in units of 1 / fps."""
    clips = np.arange(sequence)[:, None] * (frames + gap_s * fps)
    return (clips + np.arange(frames)).reshape(-1)


def can_serve(
    file_frames: np.ndarray,
    file_fps: np.ndarray,
    *,
    frames: int,
    fps: float | np.ndarray,
    hold: bool = False,
    sequence: int = 1,
    gap_s: float = 0.0,
) -> np.ndarray:
    """Return which videos are long enough and fast enough for a clip.

    Args:
        file_frames: frames of each video, int [N].
        file_fps: rate of each video, float [N].
        frames: frames of the clip.
        fps: frames per second of video time, a number or float [N].
        hold: accept short videos too, see `choose`.
        sequence, gap_s: as of `offsets`.

    Returns:
        bool [N]. Any rate is accepted for single frames and for images.
    """
    fast = (file_fps * RATE_TOLERANCE >= fps) | (file_frames == 1) | (frames == 1)
    if hold:
        return fast
    last = (sequence - 1) * (frames + gap_s * fps) + (frames - 1)
    reach = np.floor(last * (file_fps / fps) + 0.5)
    return fast & (reach < file_frames)


def choose(
    *,
    file_frames: int,
    file_fps: float,
    frames: int,
    fps: float,
    seed: int,
    step: int,
    slot: int,
    attempt: int = 0,
    sequence: int = 1,
    gap_s: float = 0.0,
) -> FrameSelection:
    """Draw the clip, or the sequence of clips, that fills a slot. All starts that leave room for it are equally likely.

    A video that is shorter is shown from its start, and its last frame is held. `data.clip.short` decides whether such
    videos are drawn.

    Args:
        file_frames, file_fps: length and rate of the video.
        frames, fps: length and rate of the clip.
        seed, step, slot, attempt: the numbers that determine the draw.
        sequence, gap_s: as of `offsets`.

    Returns:
        The frames to decode.
    """
    ahead = offsets(frames=frames, fps=fps, file_fps=file_fps, sequence=sequence, gap_s=gap_s)
    starts = max(1, file_frames - int(ahead[-1]))
    first = int(generator(seed, "clip", step, slot, attempt).integers(starts))
    numbers = np.minimum(first + ahead, file_frames - 1).tolist()
    return FrameSelection(tuple(numbers), tuple(numbers[::frames]), file_fps)


@dataclass(frozen=True)
class Pace:
    """The rate of a clip: in frames per second of video time, or as every n-th frame of the file."""

    fps: float | None = None
    frame_step: int | None = None

    def rate(self, file_fps: np.ndarray) -> np.ndarray:
        """Return the frames per second of video time in files of these rates, float [N]."""
        return np.full(len(file_fps), self.fps) if self.frame_step is None else file_fps / self.frame_step

    def __str__(self) -> str:
        return f"at {self.fps:g} fps" if self.frame_step is None else f"{self.frame_step} frames apart"


def pace_of(source: Source, clip: Clip) -> Pace:
    """Return the rate of the clips of a source."""
    if source.frame_step:
        return Pace(frame_step=source.frame_step)
    if source.duration_s:
        return Pace(fps=(source.frames or clip.frames) / source.duration_s)
    return Pace(fps=source.fps or clip.fps)


class EligibleSamples:
    """The samples of a source that are long and fast enough for its clips. The plan draws from them."""

    def __init__(
        self,
        index: "Index",
        *,
        frames: int,
        pace: Pace,
        hold: bool = False,
        without: Iterable[str] = (),
        sequence: int = 1,
        gap_s: float = 0.0,
    ) -> None:
        """Select the samples.

        Args:
            index: the corpus.
            frames, pace: length and rate of the clips.
            hold: accept short videos too.
            without: keys to leave out.
            sequence, gap_s: as of `offsets`.

        Raises:
            BadInput: no sample is eligible.
        """
        self.index, self.frames, self.pace, self.hold = index, frames, pace, hold
        self.sequence, self.gap_s = sequence, gap_s
        unwanted = sorted(without)
        self._denied = index.find(unwanted)
        good = self._serves(slice(None))
        self.too_short = len(good) - int(good.sum())
        """Number of samples that are too short or too slow."""
        good[self._denied] = False
        self.left_out = len(good) - int(good.sum())
        """Number of all samples that are never drawn."""
        if not good.any():
            raise BadInput(self._nothing_eligible())
        sums = np.concatenate([[0], np.cumsum(good)])
        self.counts = np.diff(sums[index.first])
        denied = hashlib.sha256("\n".join(unwanted).encode()).hexdigest()[:16] if unwanted else "all"
        self.name = f"{index.hash}/{index.split}/{frames} {pace}{'+' if hold else ''}/{denied}"
        if index.parts is not None and not index.parts.is_default:
            self.name += f"/parts of {index.parts.seconds:g} s"
        if sequence > 1:
            self.name += f"/{sequence} clips {gap_s:g} s apart"

    def members(self, shard: int) -> np.ndarray:
        """Return the ids of the eligible samples of a shard."""
        a, b = int(self.index.first[shard]), int(self.index.first[shard + 1])
        good = self._serves(slice(a, b))
        denied = self._denied[np.searchsorted(self._denied, a) : np.searchsorted(self._denied, b)]
        good[denied - a] = False
        return a + np.flatnonzero(good)

    def fps(self, sample: int) -> float:
        """Return the frames per second of video time of the clips of a sample."""
        return float(self.pace.rate(self.index.fps[sample : sample + 1])[0])

    def _serves(self, rows: slice) -> np.ndarray:
        index = self.index
        file_fps = index.fps[rows]
        shape = {"frames": self.frames, "sequence": self.sequence, "gap_s": self.gap_s, "hold": self.hold}
        return can_serve(index.frames[rows], file_fps, fps=self.pace.rate(file_fps), **shape)

    def _nothing_eligible(self) -> str:
        index, pace, clips = self.index, self.pace, f" x {self.sequence} clips" if self.sequence > 1 else ""
        longest_s = float(np.max(index.frames / np.maximum(index.fps, 1e-9), initial=0, where=index.frames > 1))
        if longest_s == 0 and self.frames > 1:
            return (
                f"all {len(index)} {index.split} samples of {index.place} are images, which are clips of one frame; "
                "set data.sources[].frames=1, or data.clip.short=hold"
            )
        seconds_s = (self.sequence - 1) * (self.frames / (pace.fps or 1) + self.gap_s) + (self.frames - 1) / (
            pace.fps or 1
        )
        return (
            f"none of the {len(index)} {index.split} samples of {index.place} has {self.frames} frames{clips} {pace}"
            f"{f' ({seconds_s:.2f} s)' if pace.fps else ''}; the longest has {longest_s:.2f} s, the fastest "
            f"{float(np.max(index.fps, initial=0)):g} fps; lower the frames or the rate (data.clip, data.sources[]), "
            "or set data.clip.short=hold"
        )


def read_keys(path: Path) -> set[str]:
    """Read a list of keys: each line is a key, or the `key` of each line of a `rejected.jsonl`.

    Raises:
        BadInput: the file cannot be read.
    """
    try:
        lines = path.read_text().split("\n")
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror}; set data.sources[].without to a file of keys") from e
    return {json.loads(line)["key"] if line.startswith("{") else line.strip() for line in lines if line.strip()}
