"""Shared memory that loader workers reuse for their batches.

Fresh shared memory costs a page fault per 4 kB: 2 ms for a clip of 16 frames of 256 px, where writing it again takes
0.1 ms. So the trainer allocates a few buffers for each worker:

    worker                                               trainer
      takes a free buffer
      writes the pixels of a batch into it
      buffer number and small fields  --->                 makes tensors of the buffer, without a copy
                                                           when their last view is dropped, the buffer is free

The trainer need not return buffers. A batch that is kept keeps its buffer, and a worker without a free buffer takes
fresh memory.
"""

import itertools
import math
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from vjepa_data.compat import new_shared_storage
from vjepa_data.reader.batch import Batch

FREE, TAKEN = 0, 1

_numbers = itertools.count()
_made_here: weakref.WeakValueDictionary[int, "SharedBuffers"] = weakref.WeakValueDictionary()


class SharedBuffers:
    """The buffers of all workers of a loader. The trainer allocates them, and a worker takes only its own."""

    def __init__(self, *, workers: int, each: int, size: int) -> None:
        """Allocate the buffers. Memory that is never written to costs nothing.

        Args:
            workers: number of workers.
            each: buffers per worker.
            size: bytes per buffer.
        """
        self.number = next(_numbers)
        self.states = torch.full((workers, each), FREE, dtype=torch.uint8).share_memory_()
        self.memory = [fresh([each, size]) for _ in range(workers)]
        _made_here[self.number] = self

    def take(self, shapes: Sequence[Sequence[int]]) -> "tuple[list[Tensor], SharedBuffer | None]":
        """Find memory for the pixels of a batch: a free buffer, or fresh shared memory.

        Args:
            shapes: shape of each tensor.

        Returns:
            Empty uint8 tensors of these shapes, and the buffer that holds them, or None for fresh memory. They belong
            to the caller until the batch is sent. A batch in a buffer is sent as `InSharedBuffer`.
        """
        worker = get_worker_info()
        assert worker is not None, "only workers take buffers"
        states, memory = self.states[worker.id].numpy(), self.memory[worker.id]
        free = np.flatnonzero(states == FREE)
        size = sum(map(math.prod, shapes))
        if len(free) == 0 or size > memory.shape[1]:
            return [fresh(shape) for shape in shapes], None
        index = int(free[0])  # the first, so that the last buffers may never be touched
        states[index] = TAKEN
        return _pieces(memory[index, :size], shapes), SharedBuffer(self.number, worker.id, index)

    def receive(self, buffer: "SharedBuffer", shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the tensors that a worker wrote. The buffer is free again when nothing refers to them."""
        memory = self.memory[buffer.worker][buffer.index, : sum(map(math.prod, shapes))].numpy()
        weakref.finalize(memory, _give_back, self.states.numpy(), buffer, os.getpid()).atexit = False
        return _pieces(torch.from_numpy(memory), shapes)  # torch keeps this array as long as any view lives


def _give_back(states: np.ndarray, buffer: "SharedBuffer", trainer: int) -> None:
    if os.getpid() == trainer:  # a forked process drops its copy of the batch, not the batch
        states[buffer.worker, buffer.index] = FREE


@dataclass(frozen=True)
class SharedBuffer:
    """Address of a buffer: the loader, its worker, and the number among the worker's buffers."""

    loader: int
    worker: int
    index: int


@dataclass(frozen=True)
class InSharedBuffer:
    """A batch whose pixels lie in a shared buffer. Unpickling it in the trainer gives a `Batch`."""

    batch: Batch
    buffer: SharedBuffer

    def __reduce__(self) -> tuple:
        only_shapes = (pixels.to("meta") for pixels in self.batch.pixels)
        return _receive, (self.batch.with_pixels(only_shapes), self.buffer)


def _receive(batch: Batch, buffer: SharedBuffer) -> Batch:
    buffers = _made_here[buffer.loader]
    return batch.with_pixels(buffers.receive(buffer, [pixels.shape for pixels in batch.pixels]))


def _pieces(memory: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    parts = memory.split([math.prod(shape) for shape in shapes])
    return [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]


def fresh(shape: Sequence[int]) -> Tensor:
    """Allocate an empty uint8 tensor in shared memory, which goes to another process without a copy."""
    storage = new_shared_storage(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, tuple(shape))  # pyright: ignore[reportCallIssue, reportArgumentType]
