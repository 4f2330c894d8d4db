"""Batches on the device before the device needs them."""

from collections.abc import Iterable, Iterator

import torch

from vjepa_data.reader.batch import Batch


def ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Take batches to a device, on a stream of its own where it has streams.

        host             | step 7, queued | batch 8 | step 8, queued | batch 9 |
        compute stream   |      step 6      |      step 7      |      step 8
        side stream      |        copy 8    |      copy 9      |

    A host that queues its steps is ahead of the GPU, so the copy of a batch, and its scaling with `loader.crop_on:
    device`, run beside the step before it; the step itself waits for nothing but them. No batch is drawn early.

    Args:
        batches: in pinned memory, as `ClipLoader` gives them where there is a GPU.
        device: where the clips are wanted. On a CPU they stay where they are.
    """
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in batches:
        if side is None:
            yield batch.on(device)
            continue
        with torch.cuda.stream(side):
            there = batch.on(device)
        compute = torch.cuda.current_stream(device)
        compute.wait_stream(side)
        for clips in there.groups:
            clips.frames.record_stream(compute)  # not given to the next batch before this step is done with it
        yield there
