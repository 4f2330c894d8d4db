"""The decode worker's own side: the process that answers decode requests. Imports no torch."""

import contextlib
import ctypes
import importlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from vjepa_data.child_process import SharedMemory
from vjepa_data.decoding.backends import Expect, decode
from vjepa_data.errors import BadInput, Unreadable

ADDRESS_SPACE_BYTES = 8 << 30  # a file that declares absurd sizes fails in its process alone
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 256 << 20  # free memory that malloc keeps at the top of the heap; a clip of 64 frames needs 70 MB
LARGEST_BYTES = 32 << 20  # the largest threshold that glibc accepts
MODULES = {"pyav": "av"}


@dataclass(frozen=True)
class DecodeRequest:
    """Frames to decode from a video that lies in shared memory, which then receives the frames."""

    memory: int
    """Number of the shared memory."""
    memory_bytes: int
    video_bytes: int
    frames: tuple[int, ...]
    expect: Expect
    part: tuple[int, int, int, int]
    """Top, left, height and width of the part of each frame to return."""
    backends: tuple[str, ...]
    """Decoders to try, in this order."""


@dataclass(frozen=True)
class Decoded:
    """Successful reply. The frames lie in shared memory."""

    gave_up: Unreadable | None
    """Error of the first decoder, if the second decoder succeeded."""


def decoder_service(decoder: str, *descriptors: int) -> Callable[[DecodeRequest], Decoded | Unreadable | BadInput]:
    """Make the function that answers requests in the decode worker."""
    keep_memory()
    with contextlib.suppress(ImportError):  # reported by the first request
        importlib.import_module(MODULES.get(decoder, decoder))
    memory = [SharedMemory(descriptor) for descriptor in descriptors]

    def answer(request: DecodeRequest) -> Decoded | Unreadable | BadInput:
        shared = memory[request.memory]
        shared.reserve(request.memory_bytes)
        with on_one_core():
            return _decode(request, shared)

    return answer


def _decode(request: DecodeRequest, shared: SharedMemory) -> Decoded | Unreadable | BadInput:
    video = shared.map[: request.video_bytes]
    errors: list[Unreadable] = []
    for backend in request.backends:
        try:
            frames = decode(video, request.frames, backend=backend, expect=request.expect)
        except Unreadable as error:
            errors.append(Unreadable(error.reason, one_line(error.detail)))
            continue
        except MemoryError:
            return Unreadable("memory", f"{backend} needs more than {ADDRESS_SPACE_BYTES >> 30} GiB")
        except ImportError as error:
            return BadInput(f"the decoder {backend} cannot be used ({error}); set loader.decoder")
        top, left, height, width = request.part
        frames = frames[:, top : top + height, left : left + width]
        np.frombuffer(shared.map, dtype=np.uint8, count=frames.size).reshape(frames.shape)[:] = frames
        return Decoded(errors[0] if errors else None)
    return errors[0]


def one_line(text: str) -> str:
    """Reduce a message to 160 printable characters on a line."""
    return re.sub(r"[^ -~]+", " ", text)[:160].strip()


def keep_memory() -> None:
    """Make malloc keep freed memory for the next clip.

    By default it returns the frames of every clip to the kernel. Getting as much again costs 700 to 2,000 page faults,
    an eighth of the decoding time (benchmarks/README.md). Has no effect without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, LARGEST_BYTES)


@contextlib.contextmanager
def on_one_core() -> Iterator[None]:
    """Keep this thread, and threads that it starts meanwhile, on the current core.

    decord hands every frame from one thread to another, a hundred times per clip. Across cores, each hand-over wakes a
    core, which may take longer than decoding the frame.
    """
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {ctypes.CDLL(None).sched_getcpu()})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
