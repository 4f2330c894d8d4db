"""The whitening of a frozen encoder's features, from the first batches of a run.

The batches are those of one rank that owns every slot, so that the result depends on the settings alone. Each rank
computes it, and a checkpoint keeps it. A run that resumes reads the checkpoint's.
"""

from pathlib import Path

import torch
from torch import Tensor

from vjepa.methods.frozen_encoder import FrozenEncoder
from vjepa.methods.regularizers import sum_over_ranks, world_size
from vjepa.methods.settings import RunSettings
from vjepa.nn.encoder import View, normalise
from vjepa.nn.grid import clip_grid
from vjepa.nn.memory import Whitening, pool_cells
from vjepa_data.reader.loader import ClipLoader
from vjepa_data.settings import Loader

CHUNK = 64
"""Clips that are encoded together."""


class CorpusWhitening(Whitening):
    """A whitening that is fitted to clips of the run's corpora when the weights are initialized."""

    def __init__(self, run: RunSettings, encoder: Path, *, side: int, clips: int):
        """Args:
        run: settings of data and model, and the seed.
        encoder: native export of the frozen encoder.
        side: rows and columns of cells.
        clips: clips to read, at least. Whole batches are read.
        """
        super().__init__(run.model.encoder.width)
        self.run, self.encoder, self.side, self.clips = run, encoder, side, clips
        if not self.mean.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Read the clips, encode them and fit the map."""
        self.fit(self._cells().flatten(0, 1).to(self.mean.device))
        for parameter in self.parameters():  # ranks on machines of another kind may differ by rounding
            parameter.copy_(sum_over_ranks(parameter.clone()) / world_size())

    def _cells(self) -> Tensor:
        run, device = self.run, self.mean.device
        encoder = FrozenEncoder(run.model, self.encoder).to(device)
        found: list[Tensor] = []
        reading = Loader(workers=0, decoder="pyav")
        with ClipLoader(run.data, reading, seed=run.seed, batch_size=run.batch_size) as batches:
            for batch in batches:
                (clips,) = batch.groups
                for part in clips.frames.split(CHUNK):
                    pixels = normalise(part.to(device))
                    grid = clip_grid(pixels.shape[2], pixels.shape[-1], run.model)
                    tokens = encoder([View(pixels)])[0].unflatten(1, (grid.t, grid.h, grid.w))
                    found.append(pool_cells(tokens, self.side))
                if sum(map(len, found)) >= self.clips:
                    break
        return torch.cat(found)
