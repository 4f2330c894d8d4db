"""Shared memory that workers write batches to, again and again.

Fresh shared memory costs a page fault for every 4 kB: 2 ms for a clip of 16 frames of 256 px, where writing it again
takes 0.1 ms. So the trainer gives each worker a few blocks of memory to keep:

    worker                                               trainer
      takes a block that is free
      writes the pixels of a batch into it
      which block, and all else of the batch  --->         makes tensors of the block, without a copy
                                                           when the last view of them is dropped: the block is free

Nobody has to promise anything. A batch that is kept keeps its block; a worker that finds none free takes fresh memory.
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

from vjepa_data.reader.batch import Batch

FREE, TAKEN = 0, 1

_numbers = itertools.count()
_made_here: weakref.WeakValueDictionary[int, "SharedBuffers"] = weakref.WeakValueDictionary()


class SharedBuffers:
    """The blocks of all workers of a loader. Made by the trainer; a worker takes only its own."""

    def __init__(self, *, workers: int, each: int, size: int) -> None:
        """Args:
        workers: how many there are.
        each: blocks for each of them. Memory that is never written to costs nothing.
        size: of a block, bytes.
        """
        self.number = next(_numbers)
        self.states = torch.full((workers, each), FREE, dtype=torch.uint8).share_memory_()
        self.memory = [fresh([each, size]) for _ in range(workers)]
        _made_here[self.number] = self

    def take(self, shapes: Sequence[Sequence[int]]) -> "tuple[list[Tensor], SharedBuffer | None]":
        """Find room for a batch: in a free block, or in fresh shared memory.

        Args:
            shapes: of its pixels.

        Returns:
            Empty uint8 tensors of these shapes, and the block they lie in. They belong to the caller until the batch is
            sent, as it is from fresh memory, or as `InSharedBuffer`.
        """
        worker = get_worker_info()
        assert worker is not None, "only workers take blocks"
        states, memory = self.states[worker.id].numpy(), self.memory[worker.id]
        free = np.flatnonzero(states == FREE)
        size = sum(map(math.prod, shapes))
        if len(free) == 0 or size > memory.shape[1]:
            return [fresh(shape) for shape in shapes], None
        block = SharedBuffer(
            self.number, worker.id, int(free[0])
        )  # the first, so that the last are perhaps never touched
        states[block.place] = TAKEN
        return _pieces(memory[block.place, :size], shapes), block

    def receive(self, block: "SharedBuffer", shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Give what a worker wrote; when nothing refers to it any more, the block is free again."""
        memory = self.memory[block.worker][block.place, : sum(map(math.prod, shapes))].numpy()
        weakref.finalize(memory, _give_back, self.states.numpy(), block, os.getpid()).atexit = False
        return _pieces(torch.from_numpy(memory), shapes)  # torch keeps this very array as long as any view lives


def _give_back(states: np.ndarray, block: "SharedBuffer", trainer: int) -> None:
    if os.getpid() == trainer:  # a process that was forked drops its copy of the batch, not the batch
        states[block.worker, block.place] = FREE


@dataclass(frozen=True)
class SharedBuffer:
    """Which block."""

    loader: int
    worker: int
    place: int


@dataclass(frozen=True)
class InSharedBuffer:
    """A batch whose pixels lie in a block: what a worker sends, and what the trainer gets as a `Batch`."""

    batch: Batch
    block: SharedBuffer

    def __reduce__(self) -> tuple:
        only_shapes = (pixels.to("meta") for pixels in self.batch.pixels)
        return _receive, (self.batch.with_pixels(only_shapes), self.block)


def _receive(batch: Batch, block: SharedBuffer) -> Batch:
    blocks = _made_here[block.loader]
    return batch.with_pixels(blocks.receive(block, [pixels.shape for pixels in batch.pixels]))


def _pieces(memory: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    parts = memory.split([math.prod(shape) for shape in shapes])
    return [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]


def fresh(shape: Sequence[int]) -> Tensor:
    """Make an empty uint8 tensor in shared memory, which goes to another process without a copy."""
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, tuple(shape))  # pyright: ignore[reportCallIssue, reportArgumentType]
