"""The servant's own side: the process that decodes, one request at a time. Imports no torch.

A request and its answer are each four bytes of length and a JSON object on a socket; bytes and frames lie in memory
that both processes map.
"""

import contextlib
import importlib
import json
import mmap
import resource
import signal
import socket
import struct

import numpy as np

from vjepa_data.decoding.backends import Expect, decode
from vjepa_data.errors import Unreadable
from vjepa_data.process import die_with_parent, ignore_stop_signals, keep_memory, on_one_core

ADDRESS_SPACE_BYTES = 8 << 30  # a file that declares absurd sizes ends the servant, not the machine
PRINTED_BYTES = 1 << 20  # decord prints whole files to stderr when it cannot open them
MODULES = {"pyav": "av"}


def serve(decoder: str, channel: int, parent: int, address_space: int, *memory: int) -> None:
    """Answer requests until the worker hangs up: the main function of the servant's process."""
    die_with_parent(parent)
    ignore_stop_signals()
    keep_memory()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (PRINTED_BYTES, PRINTED_BYTES))
    if address_space:
        resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    connection = socket.socket(fileno=channel)
    maps: dict[int, mmap.mmap] = {}
    with contextlib.suppress(ImportError):  # the first request tells
        importlib.import_module(MODULES.get(decoder, decoder))
    write(connection, {"ready": True})
    while True:
        try:
            request = read(connection)
        except (EOFError, ConnectionResetError):
            return
        number, size = request["memory"], request["size"]
        if number not in maps or len(maps[number]) != size:
            maps[number] = mmap.mmap(memory[number], size)
        with on_one_core():
            answer = _answer(request, maps[number])
        write(connection, {**answer, "rss": _rss_bytes()})


def _answer(request: dict, memory: mmap.mmap) -> dict:
    video = memory[: request["video"]]
    expect = Expect(*request["expect"])
    given_up = None
    for backend in (request["backend"], request["fallback"]):
        if backend is None:
            continue
        try:
            frames = decode(video, request["frames"], backend=backend, expect=expect)
        except Unreadable as e:
            given_up = given_up or e
            continue
        except MemoryError:
            return {"reason": "memory", "detail": f"{backend} wants more than {ADDRESS_SPACE_BYTES >> 30} GiB"}
        except ImportError as e:
            return {"fatal": str(e)}
        top, left, height, width = request["part"]
        frames = frames[:, top : top + height, left : left + width]
        np.frombuffer(memory, dtype=np.uint8, count=frames.size).reshape(frames.shape)[:] = frames
        return {"gave_up": [given_up.reason, given_up.detail] if given_up else None}
    assert given_up is not None
    return {"reason": given_up.reason, "detail": given_up.detail}


def write(channel: socket.socket, message: dict) -> None:
    """Send one message.

    Raises:
        BrokenPipeError, ConnectionResetError: the other side is gone.
    """
    text = json.dumps(message).encode()
    channel.sendall(struct.pack("<I", len(text)) + text)


def read(channel: socket.socket) -> dict:
    """Wait for one message.

    Raises:
        EOFError, ConnectionResetError: the other side is gone.
    """
    (length,) = struct.unpack("<I", _read_exactly(channel, 4))
    return json.loads(_read_exactly(channel, length))


def _read_exactly(channel: socket.socket, size: int) -> bytes:
    parts = b""
    while len(parts) < size:
        part = channel.recv(size - len(parts))
        if not part:
            raise EOFError("the other side hung up")
        parts += part
    return parts


def _rss_bytes() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()
