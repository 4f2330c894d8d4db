"""Feed our exact stream of clips to your own training loop, stop it, and resume at any step on any number of ranks.

python examples/use_loader.py CORPUS
"""

import hashlib
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from vjepa_data import ClipLoader
from vjepa_data.reader.batch import Batch
from vjepa_data.settings import Data, Loader

BATCH_SIZE = 8  # clips per step, over all ranks


def open_stream(corpus: Path, *, step: int = 0, rank: int = 0, world: int = 1) -> ClipLoader:
    """Return the batches of a rank, from any step on. The step is all that a checkpoint must hold of the loader."""
    data = Data.model_validate(
        {"sources": [{"shards": str(corpus)}], "clip": {"frames": 4, "fps": 6}, "crop": {"px": 48}}
    )
    return ClipLoader(data, Loader(workers=0), seed=0, batch_size=BATCH_SIZE, rank=rank, world=world, step=step)


def train_steps(model: nn.Module, batches: Iterator[Batch], *, steps: int) -> list[float]:
    """Train a toy autoencoder of mean colours, in place of any loop that takes batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for batch in islice(batches, steps):
        colours = batch.groups[0].frames.float().div(255).mean((1, 2, 3))  # uint8 [B T H W C] to [B C]
        loss = (model(colours) - colours).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def hash_clips(batches: list[Batch]) -> dict[int, str]:
    """Return a hash of the pixels of each slot of a step, for any rank that read it."""
    return {
        slot: hashlib.sha256(clip.numpy().tobytes()).hexdigest()
        for batch in batches
        for group in batch.groups
        for slot, clip in zip(group.slots, group.frames, strict=True)
    }


def main(corpus: Path) -> None:
    """Compare an uninterrupted run with a run that stops after 3 of 6 steps, and 1 rank with 2."""
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    with open_stream(corpus) as batches:
        losses = train_steps(model, batches, steps=6)

    model.load_state_dict(start)
    with open_stream(corpus) as batches:
        first = train_steps(model, batches, steps=3)
    with open_stream(corpus, step=3) as batches:  # a new process would do the same
        second = train_steps(model, batches, steps=3)
    assert first + second == losses, "the resumed stream differs"

    with open_stream(corpus, step=100) as whole:
        expected = hash_clips([next(whole)])
    halves = []
    for rank in range(2):
        with open_stream(corpus, step=100, rank=rank, world=2) as half:
            halves.append(next(half))
    assert hash_clips(halves) == expected, "two ranks read other clips than one"
    print(f"losses {losses[0]:.4f} to {losses[-1]:.4f}; equal after a restart, and on two ranks")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
