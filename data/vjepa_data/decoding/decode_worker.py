"""Decoding in a process of its own, which may be killed.

decord hangs for ever on some ordinary files, and a decoder fed damaged bytes may crash or grow without bound. So each
loader worker keeps one servant:

    worker                                          servant (one process, one thread, imports no torch)
      encoded bytes -> shared memory A
      "decode frames 0 8 15 ... with decord"  --->    decodes
      crops the clip before, in memory B              frames -> shared memory A
      uint8 frames in memory A                <---    "done"     (of each frame only the part that is wanted)

If no answer comes in time it is killed and another is started; if it dies, so too. Both are tried once more, so that a
stray signal changes nothing of the stream; what fails twice is `Unreadable`. Its time is what it slept or computed
(`process.Patience`): neither an overloaded machine nor a job that is suspended uses it up. The servant dies with its
worker. What it prints goes to a file of bounded size. Measured cost of the detour: see data/README.md.
"""

import contextlib
import logging
import math
import mmap
import os
import re
import select
import socket
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vjepa_data.decoding.backends import Expect
from vjepa_data.decoding.decode_worker_main import ADDRESS_SPACE_BYTES, read, write
from vjepa_data.errors import Unreadable
from vjepa_data.process import Patience, deaf_from_birth
from vjepa_data.settings import BadInput

log = logging.getLogger(__name__)

SLOWEST_PIXELS_PER_S = 25e6  # half of what decord does on a slow core
LONGEST_GOP = 300  # frames; what must be decoded before the first one that is wanted, at worst
RECYCLE_CLIPS = 5000  # decord leaks up to 160 kB for each file it cannot open
RECYCLE_RSS_BYTES = 1_500_000_000
START_TIMEOUT_S = 180


class DecodeWorker:
    """One decoding process and the two pieces of memory shared with it."""

    def __init__(self, decoder: str = "decord", *, timeout_s: float = 20.0, fallback: str | None = "pyav") -> None:
        """Args:
        decoder: backend of `vjepa_data.decoding.backends`.
        timeout_s: seconds, asleep or at work, after which a servant that does not answer is killed; a video that may
            well cost more gets more.
        fallback: backend that tries what the first gave up on.
        """
        self.decoder, self.timeout_s = decoder, timeout_s
        self.fallback = fallback if fallback != decoder else None
        self.counts: Counter[str] = Counter()
        """How often what happened: "clips", "fallback", "timeout", "crash", "error", "frames", "recycled"."""
        self.fell_back: str | None = None
        """Why the last clip was decoded by the fallback: the reason of an `Unreadable`; None if it was not."""
        self._memory = [_Memory(), _Memory()]
        self._turn = 0
        self._request: dict | None = None
        self._served = 0
        self._start()

    def decode(self, video: bytes, frames: Sequence[int], expect: Expect, *, suffix: str = "mp4") -> np.ndarray:
        """Decode some frames of a video: `begin` and `finish` in one."""
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
        """Hand over a video; the frames of the `finish` before stay valid until the `finish` after.

        Args:
            video: the file's bytes.
            frames: numbers of the frames, not falling.
            expect: what the index says of the video.
            suffix: "mp4" or, for a picture, "jpg".
            part: top, left, height and width of the part of the picture that is wanted; by default all of it.
        """
        assert self._request is None, "the servant is busy; call finish() first"
        self._turn = 1 - self._turn
        is_video = suffix not in ("jpg", "jpeg", "png", "webp")
        self._request = {
            "video": video,
            "frames": [int(f) for f in frames],
            "expect": expect,
            "part": part or (0, 0, expect.height, expect.width),
            "backend": self.decoder if is_video else "image",
            "fallback": self.fallback if is_video else None,
            "limit_s": max(self.timeout_s, _cost_s(frames, expect)),
            "tries": 0,
        }
        self._send()

    def finish(self) -> np.ndarray:
        """Wait for the frames.

        Returns:
            uint8 [T h w 3], the part asked for, in shared memory; valid until the next but one `begin`.

        Raises:
            Unreadable: the video cannot be decoded; the servant is ready for another.
            BadInput: the decoder cannot be imported.
        """
        request = self._request
        assert request is not None, "nothing was begun"
        while True:
            reply, failure = self._receive(request["limit_s"])
            if reply is not None:
                break
            self.counts[failure] += 1
            self._kill()
            self._start()
            request["tries"] += 1
            if request["tries"] == 2:
                self._request = None
                raise Unreadable(failure, self._explain(failure, request["limit_s"]))
            self._send()
        self._request = None
        self._served += 1
        self._recycle_if_due(reply)
        if "fatal" in reply:
            raise BadInput(f"the decoder {request['backend']} cannot be used ({reply['fatal']}); set loader.decoder")
        if "reason" in reply:
            self.counts[reply["reason"]] += 1
            raise Unreadable(reply["reason"], _one_line(reply["detail"]))
        self.counts["clips"] += 1
        self.fell_back = None
        if reply["gave_up"]:
            self.counts["fallback"] += 1
            self.fell_back, detail = reply["gave_up"]
            log.debug("fell back to %s: %s", request["fallback"], _one_line(detail))
        return self._memory[self._turn].array((len(request["frames"]), *request["part"][2:], 3))

    def close(self) -> None:
        """End the process."""
        self._finalizer()

    @property
    def pid(self) -> int:
        """Process id of the servant of the moment."""
        return self._process.pid

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._printed = tempfile.TemporaryFile(mode="a+b", prefix="vjepa-servant-")  # noqa: SIM115
        memory = [m.descriptor for m in self._memory]
        limit = 0 if self.decoder == "torchcodec" else ADDRESS_SPACE_BYTES  # torch reserves more than it uses
        facts = [self.decoder, theirs.fileno(), os.getpid(), limit, *memory]
        room = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(p for p in (room, os.environ.get("PYTHONPATH", "")) if p)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with deaf_from_birth():
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-c",
                    f"from vjepa_data.decoding.decode_worker_main import serve; serve(*{facts})",
                ],
                stdin=subprocess.DEVNULL,
                stdout=self._printed,
                stderr=self._printed,
                pass_fds=[theirs.fileno(), *memory],
                env={**os.environ, **threads, "PYTHONPATH": path},
            )
        theirs.close()
        self._socket, self._served, self._is_ready = ours, 0, False
        self._finalizer = weakref.finalize(self, _end, self._process, ours, self._printed)

    def _kill(self) -> None:
        self._process.kill()
        self._finalizer()

    def _recycle_if_due(self, reply: dict) -> None:
        if self._served >= RECYCLE_CLIPS or reply.get("rss", 0) > RECYCLE_RSS_BYTES:
            self.counts["recycled"] += 1
            self._finalizer()
            self._start()

    def _send(self) -> None:
        request = self._request
        assert request is not None
        video, e = request["video"], request["expect"]
        memory = self._memory[self._turn]
        size = memory.hold(max(len(video), len(request["frames"]) * math.prod(request["part"][2:]) * 3))
        memory.map[: len(video)] = video
        text = {k: request[k] for k in ("frames", "part", "backend", "fallback")}
        text |= {"expect": [e.frames, e.width, e.height], "memory": self._turn, "size": size, "video": len(video)}
        with contextlib.suppress(
            BrokenPipeError, ConnectionResetError
        ):  # it died; finish() sees that and starts another
            write(self._socket, text)

    def _receive(self, limit_s: float) -> tuple[dict | None, str]:
        """Wait for an answer; give it, or None and what went wrong."""
        if not self._is_ready:
            self._wait_until_ready()
        if not self._answers_within(limit_s):
            return None, "timeout"
        try:
            return read(self._socket), ""
        except (EOFError, ConnectionResetError):
            return None, "crash"

    def _wait_until_ready(self) -> None:
        """Wait for the process to start, which takes long where Python lies on a slow disk.

        Raises:
            BadInput: it does not start.
        """
        try:
            if not self._answers_within(START_TIMEOUT_S):
                raise EOFError
            read(self._socket)
        except (EOFError, ConnectionResetError):
            self._process.kill()
            self._printed.seek(0)
            said = _one_line(self._printed.read()[-160:].decode(errors="replace"))
            raise BadInput(f"the process that decodes does not start ({said}); try `vjepa doctor`") from None
        self._is_ready = True

    def _answers_within(self, limit_s: float) -> bool:
        poll, patience = select.poll(), Patience(self._process.pid, limit_s)
        poll.register(self._socket, select.POLLIN)
        while not poll.poll(1000 * patience.tick_s):
            if patience.is_over():
                return False
        return True

    def _explain(self, failure: str, limit_s: float) -> str:
        if failure == "timeout":
            return f"{self.decoder} gave no answer in {limit_s:.3g} s, twice"
        return f"{self.decoder} crashed, twice"


class _Memory:
    """A piece of memory that two processes map; it grows, never shrinks."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("vjepa-servant")
        self.size = 0
        self.map: mmap.mmap
        weakref.finalize(self, os.close, self.descriptor)

    def hold(self, size: int) -> int:
        if size > self.size:
            self.size = (size + (1 << 20)) >> 20 << 20
            os.ftruncate(self.descriptor, self.size)
            self.map = mmap.mmap(self.descriptor, self.size)  # views of the old map keep it alive
        return self.size

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.frombuffer(self.map, dtype=np.uint8, count=int(np.prod(shape))).reshape(shape)


def _cost_s(frames: Sequence[int], expect: Expect) -> float:
    """Seconds that frames of a video may cost on a slow core: all from the key frame before them are decoded."""
    last, first = max(frames, default=0), min(frames, default=0)
    return (last + 1 - max(0, first - LONGEST_GOP)) * expect.width * expect.height / SLOWEST_PIXELS_PER_S


def _one_line(text: str) -> str:
    """Cut a message to 160 printable characters of one line."""
    return re.sub(r"[^ -~]+", " ", text)[:160].strip()


def _end(process: subprocess.Popen, channel: socket.socket, printed) -> None:
    channel.close()  # an idle servant ends at this
    try:
        process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    printed.close()
