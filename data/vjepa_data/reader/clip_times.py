"""Where in time to look: which frames of a video make a clip.

A clip is asked for in seconds: `frames` pictures, 1 / fps apart. It starts on a frame of the file drawn at random; each
picture is the frame nearest to its exact time, so a 29.97 fps video sampled at 4 fps keeps its speed (steps of 7 and 8
frames) instead of running 7 % fast (steps of 7).
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vjepa_data.rng import generator
from vjepa_data.settings import BadInput

if TYPE_CHECKING:
    from vjepa_data.corpus.index import Index

# A file at 29.97 frames a second may serve 30: one repeated frame in a thousand is no lie.
RATE_TOLERANCE = 1.001


@dataclass(frozen=True)
class FrameSelection:
    """The frames of one clip."""

    frames: tuple[int, ...]
    """Numbers of the frames in the file, rising."""

    start_s: float
    """Time of the first, seconds from the start of the stored video."""


def offsets(*, frames: int, fps: float, file_fps: float) -> np.ndarray:
    """Say how many frames of the file after the first each frame of a clip lies.

    Args:
        frames: frames of the clip.
        fps: frames per second of video time asked for.
        file_fps: frames per second of the file.

    Returns:
        int64 [frames], from 0; frame `k` is the one nearest to k / fps seconds (of two equally near, the later).
    """
    return np.floor(np.arange(frames) * (file_fps / fps) + 0.5).astype(np.int64)


def can_serve(
    file_frames: np.ndarray, file_fps: np.ndarray, *, frames: int, fps: float | np.ndarray, hold: bool = False
) -> np.ndarray:
    """Say which videos are long enough and fast enough for a clip.

    Args:
        file_frames: frames of each video, int [N].
        file_fps: rate of each video, float [N].
        frames: of the clip asked for.
        fps: its frames per second of video time, one for all or float [N].
        hold: short videos serve too, see `choose`.

    Returns:
        bool [N]. A clip of one frame has no rate, nor has a picture: any rate is good.
    """
    fast = (file_fps * RATE_TOLERANCE >= fps) | (file_frames == 1) | (frames == 1)
    if hold:
        return fast
    reach = np.floor((frames - 1) * (file_fps / fps) + 0.5)
    return fast & (reach < file_frames)


def choose(
    *, file_frames: int, file_fps: float, frames: int, fps: float, seed: int, step: int, slot: int, attempt: int = 0
) -> FrameSelection:
    """Draw the clip that fills a slot: every start that leaves room for the whole clip is equally likely.

    A video that ends before the clip does is shown from its start, and its last frame is held; whether such videos are
    drawn at all is `data.clip.short`.

    Args:
        file_frames, file_fps: length and rate of the video.
        frames, fps: the clip asked for.
        seed, step, slot, attempt: all that the draw depends on.

    Returns:
        The frames to decode.
    """
    ahead = offsets(frames=frames, fps=fps, file_fps=file_fps)
    starts = max(1, file_frames - int(ahead[-1]))
    first = int(generator(seed, "clip", step, slot, attempt).integers(starts))
    return FrameSelection(
        tuple(int(i) for i in np.minimum(first + ahead, file_frames - 1)), first / file_fps if first else 0.0
    )


@dataclass(frozen=True)
class Pace:
    """How fast a clip goes: so many frames a second of video time, or every so many frames of the file."""

    fps: float | None = None
    frame_step: int | None = None

    def rate(self, file_fps: np.ndarray) -> np.ndarray:
        """Give the frames per second of video time that this is in files of some rates, float [N]."""
        return np.full(len(file_fps), self.fps) if self.frame_step is None else file_fps / self.frame_step

    def __str__(self) -> str:
        return f"at {self.fps:g} fps" if self.frame_step is None else f"{self.frame_step} frames apart"


class EligibleSamples:
    """The samples of one source that can serve its clips: what the plan draws from."""

    def __init__(
        self, index: "Index", *, frames: int, pace: Pace, hold: bool = False, without: Iterable[str] = ()
    ) -> None:
        """Args:
        index: the corpus.
        frames, pace: the clips asked for.
        hold: short videos serve too.
        without: keys never to draw.

        Raises:
            BadInput: no sample can serve them.
        """
        self.index, self.frames, self.pace, self.hold = index, frames, pace, hold
        unwanted = sorted(without)
        self._denied = index.find(unwanted)
        good = self._serves(slice(None))
        self.too_short = len(good) - int(good.sum())
        """Samples that are too short or too slow, and never drawn."""
        good[self._denied] = False
        self.left_out = len(good) - int(good.sum())
        """Those, and the ones whose keys are not wanted."""
        if not good.any():
            longest_s = float(np.max(index.frames / np.maximum(index.fps, 1e-9), initial=0, where=index.frames > 1))
            fastest = float(np.max(index.fps, initial=0))
            if longest_s == 0 and frames > 1:
                raise BadInput(
                    f"all {len(index)} {index.split} samples of {index.place} are pictures, clips of one frame; "
                    "set frames: 1 for this source (data.sources[].frames), or data.clip.short=hold"
                )
            lasting = f", which last {(frames - 1) / pace.fps:.2f} s" if pace.fps else ""
            raise BadInput(
                f"none of the {len(index)} {index.split} samples of {index.place} can serve {frames} frames {pace}"
                f"{lasting}; the longest has {longest_s:.2f} s, the fastest {fastest:g} fps; ask for "
                "fewer frames or another rate (data.clip, data.sources[]), or set data.clip.short=hold"
            )
        sums = np.concatenate([[0], np.cumsum(good)])
        self.counts = np.diff(sums[index.first])
        denied = hashlib.sha256("\n".join(unwanted).encode()).hexdigest()[:16] if unwanted else "all"
        self.name = f"{index.hash}/{index.split}/{frames} {pace}{'+' if hold else ''}/{denied}"

    def members(self, shard: int) -> np.ndarray:
        """Give the ids of the samples that a shard offers."""
        a, b = int(self.index.first[shard]), int(self.index.first[shard + 1])
        good = self._serves(slice(a, b))
        denied = self._denied[np.searchsorted(self._denied, a) : np.searchsorted(self._denied, b)]
        good[denied - a] = False
        return a + np.flatnonzero(good)

    def _serves(self, rows: slice) -> np.ndarray:
        index = self.index
        file_fps = index.fps[rows]
        fps = self.pace.rate(file_fps)
        return can_serve(index.frames[rows], file_fps, frames=self.frames, fps=fps, hold=self.hold)


def read_keys(path: Path) -> set[str]:
    """Read a list of keys: one a line, or the `key` of each line of a `rejected.jsonl`.

    Raises:
        BadInput: the file cannot be read.
    """
    try:
        lines = path.read_text().split("\n")
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror}; data.sources[].without must name a file of keys") from e
    return {json.loads(line)["key"] if line.startswith("{") else line.strip() for line in lines if line.strip()}
