"""Batches that a run never uses, from the checkpoint it went back to until the last bad step after it.

    skipped = [(40, 7)]      step   38  39  40  41 ...
                             batch  38  39  47  48 ...

With `(at, count)` every step from `at` on takes the batch (clips and masks) of a step `count` later. Everything random
stays a function of (seed, step, slot) and of this short list. The list is written to the run folder when the decision
is made, and to every later checkpoint, so that any attempt uses the same batches.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vjepa_data.reader.loader import Batch, ClipLoader

SkippedBatches = Sequence[tuple[int, int]]


def read(run_folder: Path) -> SkippedBatches:
    """Read the skipped batches of a run folder."""
    file = run_folder / "passed_over.json"
    return tuple((at, count) for at, count in json.loads(file.read_text())) if file.is_file() else ()


def add(run_folder: Path, *, at: int, count: int) -> None:
    """Skip `count` batches from step `at` on, in this and all later attempts."""
    known = dict(read(run_folder))
    known[at] = known.get(at, 0) + count
    beside = run_folder / ".passed_over.json.part"
    beside.write_text(json.dumps(sorted(known.items())) + "\n")
    os.replace(beside, run_folder / "passed_over.json")


def batch_of(step: int, skipped: SkippedBatches) -> int:
    """Return the number of the batch that a step uses."""
    return step + sum(count for at, count in skipped if at <= step)


class Stream(Iterator[Batch]):
    """Batches of the steps of a run, without the skipped batches."""

    def __init__(self, open_clips: Callable[[int], ClipLoader], *, step: int, skipped: SkippedBatches) -> None:
        """Args:
        open_clips: opens the stream at a batch number.
        step: first step.
        skipped: the skipped batches.
        """
        self._open, self._step, self._skipped = open_clips, step, skipped
        self.clips = open_clips(batch_of(step, skipped))

    def __next__(self) -> Batch:
        wanted = batch_of(self._step, self._skipped)
        if self.clips.step != wanted:
            self.clips.close()
            self.clips = self._open(wanted)
        self._step += 1
        return next(self.clips)

    def close(self) -> None:
        """End the loader's workers."""
        self.clips.close()
