"""Copying batches to the device before it needs them."""

from collections.abc import Iterable, Iterator

import torch

from vjepa_data.reader.batch import Batch


def ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy batches to a device, on a separate stream if the device has streams.

        host             | step 7, queued | batch 8 | step 8, queued | batch 9 |
        compute stream   |      step 6      |      step 7      |      step 8
        side stream      |        copy 8    |      copy 9      |

    The host queues steps faster than the GPU computes them. The copy of a batch, and its scaling with `loader.crop_on:
    device`, therefore overlap with the step before, and a step waits only for its own batch. No batch is drawn early.

    Args:
        batches: in pinned memory, as `ClipLoader` gives them on a machine with a GPU.
        device: where the clips are needed. On a CPU they are not copied.
    """
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in batches:
        if side is None:
            yield batch.on(device)
            continue
        with torch.cuda.stream(side):
            moved = batch.on(device)
        compute = torch.cuda.current_stream(device)
        compute.wait_stream(side)
        for tensor in (tensor for clips in moved.groups for tensor in clips.tensors):
            tensor.record_stream(compute)  # its memory is reused only after this step
        yield moved
