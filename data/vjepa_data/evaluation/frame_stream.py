"""The frames of whole videos in order, a few at a time: files, pipes and samples of a corpus.

    for frames in reader.frames(video, skip=0):       uint8 [T px px C], the next frames at a constant rate

Nothing is kept of the frames before, so a video may be as long as it likes. A file or pipe is decoded by a child
process that can be killed. It decodes the next frames while the consumer works on the previous frames.
"""

import itertools
import math
import os
import signal
import stat
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from vjepa_data.child_process import ChildFailed, ChildProcess
from vjepa_data.corpus.index import Index, Sample
from vjepa_data.decoding.backends import Expect
from vjepa_data.decoding.decode_worker import DecodeWorker
from vjepa_data.errors import BadInput
from vjepa_data.evaluation import frame_service
from vjepa_data.evaluation.clips import whole_view
from vjepa_data.evaluation.video_files import TIMEOUT_S, find_videos, printable
from vjepa_data.media.pool import MEMORY_GIB
from vjepa_data.media.video import Reason, Refused
from vjepa_data.reader.clip_times import offsets

AHEAD = 16
"""Frames of a file that the child sends at once. Frames of a pipe come tubelet by tubelet, as they arrive."""

STDIN = Path("-")


def is_pipe(path: Path) -> bool:
    """Tell whether a path is standard input, a pipe, a socket or a device: it has no end and is read once."""
    if path == STDIN:
        return True
    mode = path.stat().st_mode if path.exists() else stat.S_IFREG
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def find_streams(paths: Sequence[Path]) -> list[Path]:
    """List video files, videos below folders, and pipes, in order.

    Raises:
        BadInput: a path does not exist, or no file has the name of a video.
    """
    return list(itertools.chain.from_iterable([path] if is_pipe(path) else find_videos([path]) for path in paths))


class FileFrames:
    """Frames of files and pipes."""

    def __init__(
        self, paths: Sequence[Path], *, px: int, fps: float, tubelet_frames: int, timeout_s: float = TIMEOUT_S
    ) -> None:
        """Args:
        paths: files and pipes, with `-` for standard input.
        px: height and width to which the whole frame is scaled.
        fps: frames per second of video time.
        tubelet_frames: frames that come together, at least.
        timeout_s: time budget of a file between two frames, in seconds of work or sleep. A pipe may wait forever.
        """
        self.keys: Sequence[str] = [printable(path) for path in paths]
        self._paths, self._px, self._tubelet, self._timeout_s = paths, px, tubelet_frames, timeout_s
        self._rate = Fraction(fps).limit_denominator(1001)
        self._child: ChildProcess | None = None

    def frames(self, video: int, skip: int = 0) -> Iterator[UInt8[Tensor, "T px px C"]]:
        """Yield the frames of a video from frame number `skip` on, in whole tubelets except perhaps at its end.

        Raises:
            Refused: the file is not a video, or is damaged at this point.
        """
        path, piped = self._paths[video], is_pipe(self._paths[video])
        if path == STDIN:
            path = Path(f"/proc/{os.getpid()}/fd/0")
        at_once = self._tubelet * (1 if piped else max(1, AHEAD // self._tubelet))
        if self._child is None:
            target = f"{frame_service.__name__}:frame_service"
            self._child = ChildProcess(target, str(self._rate), self._tubelet, memory_bytes=MEMORY_GIB << 30)
        request = frame_service.FrameRequest(path, skip, at_once, piped)
        try:
            self._child.send(request)
            while (found := self._answer(self._child, math.inf if piped else self._timeout_s)) is not None:
                self._child.send(None)
                yield whole_view(found, self._px)
        except BaseException:  # it may be busy with frames that are not needed any more
            self.close()
            raise

    def close(self) -> None:
        """End the child process."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def _answer(self, child: ChildProcess, limit_s: float) -> np.ndarray | None:
        try:
            answer = child.wait(limit_s)
        except ChildFailed as failure:
            if failure.reason == "timeout":
                raise Refused(Reason.TIMED_OUT, f"no progress for {limit_s:g} s") from None
            code = child.exit_code()
            if code == 1 and not child.is_ready:
                raise RuntimeError(f"{__name__} does not start:\n{child.output()}") from None
            how = "was killed" if code == -signal.SIGKILL else "crashed"
            raise Refused(Reason.CRASHED, f"the decoder {how}") from None
        if isinstance(answer, ImportError):
            raise RuntimeError(f"{__name__} lacks a package: {answer}; run `vjepa doctor`")
        if isinstance(answer, Refused):
            raise answer
        return answer


class CorpusFrames:
    """Frames of the samples of a corpus."""

    def __init__(self, shards: Path, *, split: str, px: int, fps: float) -> None:
        """Args:
        shards: folder of the corpus.
        split: split of the corpus.
        px: height and width to which the whole frame is scaled.
        fps: frames per second of video time.

        Raises:
            BadInput: the corpus or split does not exist.
        """
        self.index = Index(shards, split)
        self._px, self._fps = px, fps
        firsts = [sample for sample in range(len(self.index)) if self.index.first_frame(sample) == 0]
        self._parts = [range(a, b) for a, b in itertools.pairwise([*firsts, len(self.index)])]
        self.keys: Sequence[str] = [self.index.video_key(sample) for sample in firsts]
        self._worker: DecodeWorker | None = None
        self._stored: tuple[int, Sample] | None = None

    def frames(self, video: int, skip: int = 0) -> Iterator[UInt8[Tensor, "T px px C"]]:
        """Yield the frames of a video from frame number `skip` on. Of virtual parts, one is in memory at a time.

        Raises:
            Unreadable: the video cannot be read or decoded.
        """
        index, parts = self.index, self._parts[video]
        rate = float(index.fps[parts[0]])
        frames = sum(int(index.frames[sample]) for sample in parts)
        count = max(1, math.floor((frames - 0.5) * self._fps / rate + 1e-6) + 1)
        numbers = offsets(frames=count, fps=self._fps, file_fps=rate)
        numbers = numbers[numbers < frames][skip:]
        for chunk in (numbers[at : at + AHEAD] for at in range(0, len(numbers), AHEAD)):
            yield whole_view(self._decode(parts, chunk), self._px)

    def _decode(self, parts: range, numbers: np.ndarray) -> np.ndarray:
        """Decode frames of a video, which may lie in several parts."""
        index, found = self.index, []
        for sample in parts:
            own = numbers - index.first_frame(sample)
            own = own[(own >= 0) & (own < index.frames[sample])]
            if not len(own):
                continue
            if self._stored is None or self._stored[0] != sample:
                self._stored = sample, index.read(sample)
            if self._worker is None:
                self._worker = DecodeWorker("pyav")
            stored = self._stored[1]
            expect = Expect(int(index.frames[sample]), int(index.width[sample]), int(index.height[sample]))
            frames = self._worker.decode(stored.video, own.tolist(), expect, suffix=stored.suffix)
            if len(own) == len(numbers):
                return frames
            found.append(frames.copy())  # the worker reuses its memory
        return np.concatenate(found)


def check_streams(paths: Sequence[Path]) -> None:
    """Reject the same pipe twice, and standard input that is a terminal.

    Raises:
        BadInput: see above.
    """
    pipes = [path for path in paths if is_pipe(path)]
    if len(pipes) > 1:
        raise BadInput(f"{len(pipes)} pipes are given ({', '.join(map(str, pipes))}), and one can be read at a time")
    if pipes == [STDIN] and os.isatty(0):
        raise BadInput("- is standard input, which is a terminal here; pipe a video in: ffmpeg ... | vjepa embed ... -")
