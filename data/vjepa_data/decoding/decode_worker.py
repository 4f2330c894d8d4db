"""Decode videos in a child process that can be killed.

decord hangs on some ordinary files, and any decoder may crash or allocate without bound on damaged bytes. So each
loader worker has one decode worker:

    loader worker                                   decode worker (one process, one thread, imports no torch)
      encoded bytes -> shared memory A
      "decode frames 0 8 15 ... with decord"  --->    decodes
      crops the previous clip, in memory B            frames -> shared memory A
      uint8 frames in memory A                <---    "done"     (of each frame only the requested part)

A decode worker that exits or exceeds its time budget is replaced. The clip is then tried once more, so that a stray
signal does not change the stream. A clip that fails twice is `Unreadable`. The budget counts time spent computing or
sleeping (`child_process.ActiveTimeBudget`), so overloaded machines and suspended jobs do not use it up. data/README.md
has the measured cost.
"""

import logging
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from vjepa_data.child_process import ChildFailed, ChildProcess, SharedMemory
from vjepa_data.decoding.backends import Expect
from vjepa_data.decoding.decode_worker_main import ADDRESS_SPACE_BYTES, Decoded, DecodeRequest, one_line
from vjepa_data.errors import BadInput, Unreadable

log = logging.getLogger(__name__)

SLOWEST_PIXELS_PER_S = 25e6  # half of decord's speed on a slow core
LONGEST_GOP = 300  # the most frames that must be decoded before the first requested one
OUTPUT_BYTES = 1 << 20  # decord prints whole files to stderr when it cannot open them
RECYCLE_CLIPS = 5000  # decord leaks up to 160 kB for each file it cannot open
RECYCLE_RSS_BYTES = 1_500_000_000


class DecodeWorker:
    """A decoding process and two pieces of memory shared with it."""

    def __init__(self, decoder: str = "decord", *, timeout_s: float = 20.0, fallback: str | None = "pyav") -> None:
        """Args:
        decoder: backend of `vjepa_data.decoding.backends`.
        timeout_s: time budget of a clip, in seconds of work or sleep. Large videos get more.
        fallback: backend that tries clips on which `decoder` fails.
        """
        self.decoder, self.timeout_s = decoder, timeout_s
        self.fallback = fallback if fallback != decoder else None
        self.counts: Counter[str] = Counter()
        """Number of events: "clips", "fallback", "timeout", "crash", "error", "frames", "memory", "recycled"."""
        self.fell_back: str | None = None
        """Reason why the last clip was decoded by the fallback; None if it was not."""
        self._memory = [SharedMemory(), SharedMemory()]
        self._turn = 0
        self._request: DecodeRequest | None = None
        self._video, self._limit_s = b"", timeout_s
        self._child = self._start()

    def decode(self, video: bytes, frames: Sequence[int], expect: Expect, *, suffix: str = "mp4") -> np.ndarray:
        """Decode some frames of a video: `begin`, then `finish`."""
        self.begin(video, frames, expect, suffix=suffix)
        return self.finish()

    def begin(
        self,
        video: bytes,
        frames: Sequence[int],
        expect: Expect,
        *,
        suffix: str = "mp4",
        part: tuple[int, int, int, int] | None = None,
    ) -> None:
        """Start decoding. Frames returned by the previous `finish` stay valid until the next `finish`.

        Args:
            video: the file's bytes.
            frames: frame numbers in ascending order.
            expect: the index entry of the video.
            suffix: "mp4" or, for a picture, "jpg".
            part: top, left, height and width of the part of each frame to return. By default the whole frame.
        """
        assert self._request is None, "the decode worker is busy; call finish() first"
        self._turn = 1 - self._turn
        part = part or (0, 0, expect.height, expect.width)
        is_image = suffix in ("jpg", "jpeg", "png", "webp")
        self._request = DecodeRequest(
            memory=self._turn,
            memory_bytes=self._memory[self._turn].reserve(max(len(video), len(frames) * math.prod(part[2:]) * 3)),
            video_bytes=len(video),
            frames=tuple(int(frame) for frame in frames),
            expect=expect,
            part=part,
            backends=("image",) if is_image else tuple(filter(None, (self.decoder, self.fallback))),
        )
        self._video, self._limit_s = video, max(self.timeout_s, _cost_s(frames, expect))
        self._send()

    def finish(self) -> np.ndarray:
        """Wait for the frames.

        Returns:
            uint8 [T h w 3], the requested part, in shared memory. They are valid until the second `begin` from now.

        Raises:
            Unreadable: the video cannot be decoded. The decode worker can be used again.
            BadInput: the decoder cannot be imported, or the process does not start.
        """
        request = self._request
        assert request is not None, "nothing to finish; call begin() first"
        try:
            reply = self._reply()
        finally:
            self._request = None
        if self._child.served >= RECYCLE_CLIPS or self._child.resident_bytes() > RECYCLE_RSS_BYTES:
            self.counts["recycled"] += 1
            self._child.close()
            self._child = self._start()
        if isinstance(reply, Exception):
            if isinstance(reply, Unreadable):
                self.counts[reply.reason] += 1
            raise reply
        self.counts["clips"] += 1
        self.fell_back = None
        if reply.gave_up:
            self.counts["fallback"] += 1
            self.fell_back = reply.gave_up.reason
            log.debug("fell back to %s: %s", self.fallback, reply.gave_up.detail)
        shape = (len(request.frames), *request.part[2:], 3)
        return np.frombuffer(self._memory[self._turn].map, dtype=np.uint8, count=math.prod(shape)).reshape(shape)

    def close(self) -> None:
        """End the process."""
        self._child.close()

    @property
    def pid(self) -> int:
        """Process id of the current child."""
        return self._child.pid

    def _start(self) -> ChildProcess:
        return ChildProcess(
            "vjepa_data.decoding.decode_worker_main:decoder_service",
            self.decoder,
            memory_bytes=0 if self.decoder == "torchcodec" else ADDRESS_SPACE_BYTES,  # torch reserves more than it uses
            file_bytes=OUTPUT_BYTES,
            shared=self._memory,
        )

    def _send(self) -> None:
        self._memory[self._turn].map[: len(self._video)] = self._video
        self._child.send(self._request)

    def _reply(self) -> Decoded | Unreadable | BadInput:
        """Wait for the reply, in a second process if the first process fails."""
        for is_last in (False, True):
            try:
                return self._child.wait(self._limit_s)
            except ChildFailed as failure:
                reason = failure.reason
            self._replace_failed(reason)
            if not is_last:
                self._send()
        happened = f"exceeded {self._limit_s:.3g} s" if reason == "timeout" else "crashed"
        return Unreadable(reason, f"{self.decoder} {happened}, twice")

    def _replace_failed(self, reason: str) -> None:
        failed = self._child
        output = one_line(failed.output()[-160:])
        failed.close()
        if not failed.is_ready:
            raise BadInput(f"the decode worker does not start ({output}); run `vjepa doctor`")
        self.counts[reason] += 1
        self._child = self._start()


def _cost_s(frames: Sequence[int], expect: Expect) -> float:
    """Estimate the decoding time on a slow core, from the preceding key frame to the last requested frame, in s."""
    last, first = max(frames, default=0), min(frames, default=0)
    return (last + 1 - max(0, first - LONGEST_GOP)) * expect.width * expect.height / SLOWEST_PIXELS_PER_S
