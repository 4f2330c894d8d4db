"""Batches that a run never uses: those between a checkpoint it went back to and the steps that went wrong after it.

    passed_over = [(40, 7)]      step   38  39  40  41 ...
                                 batch  38  39  47  48 ...

With `(at, count)` every step from `at` on takes the batch (clips and masks) of a step `count` later, so what is random
stays a function of (seed, step, slot) and of this short list. It lies in the run folder from the moment of the decision
and in every checkpoint after it: whatever attempt goes on, and from wherever, uses the same batches.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vjepa_data.reader.loader import Batch, ClipLoader

PassedOver = Sequence[tuple[int, int]]


def read(run_folder: Path) -> PassedOver:
    """What the run folder knows of; nothing if there is nothing."""
    file = run_folder / "passed_over.json"
    return tuple((at, count) for at, count in json.loads(file.read_text())) if file.is_file() else ()


def add(run_folder: Path, *, at: int, count: int) -> None:
    """Pass over `count` batches from step `at` on, for good."""
    known = dict(read(run_folder))
    known[at] = known.get(at, 0) + count
    beside = run_folder / ".passed_over.json.part"
    beside.write_text(json.dumps(sorted(known.items())) + "\n")
    os.replace(beside, run_folder / "passed_over.json")


def batch_of(step: int, passed_over: PassedOver) -> int:
    """Number of the batch that a step uses."""
    return step + sum(count for at, count in passed_over if at <= step)


class Stream(Iterator[Batch]):
    """The batches of a run's steps, without those that are passed over."""

    def __init__(self, open_clips: Callable[[int], ClipLoader], *, step: int, passed_over: PassedOver) -> None:
        """Args:
        open_clips: opens the stream at the number of a batch.
        step: first step.
        passed_over: see above.
        """
        self._open, self._step, self._passed_over = open_clips, step, passed_over
        self.clips = open_clips(batch_of(step, passed_over))

    def __next__(self) -> Batch:
        wanted = batch_of(self._step, self._passed_over)
        if self.clips.step != wanted:
            self.clips.close()
            self.clips = self._open(wanted)
        self._step += 1
        return next(self.clips)

    def close(self) -> None:
        """End workers and servants."""
        self.clips.close()
