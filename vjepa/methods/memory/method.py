"""Memory: a later clip of a video is predicted from a recurrent memory of its earlier clips.

    clips 0 .. K-1 of one video, in order, in one slot --encoder--> cells e_0 .. e_{K-1} --core--> states m_0 .. m_{K-1}
    loss = mean |predictor(m_i, e_i, some cells of y_j) - y_j|  +  the same from a memory that saw e_i alone,   i < j

The second term trains the best prediction without a memory, with the same networks. The gain of memory,
1 - first / second, therefore is not flattered by an untrained comparison. It is logged by the distance j - i.

No state crosses steps: a sequence begins and ends in its slot, so a run resumes exactly on any number of ranks.

Letters: B videos, K clips, T frames, Y X pixels, M cells, F channels of a feature, P pairs.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vjepa.methods.base import Average, Loss, Method, Networks, TokenCounts, send
from vjepa.methods.frozen_encoder import EncoderFile, FrozenEncoder
from vjepa.methods.memory.settings import MemorySettings
from vjepa.methods.regularizers import sum_over_ranks
from vjepa.nn.attention import Backend
from vjepa.nn.encoder import Encoder, View, normalise
from vjepa.nn.grid import Grid, clip_grid
from vjepa.nn.memory import ClipMemory, Pairs, Whitening, pool_cells
from vjepa_data.reader.batch import Batch
from vjepa_data.rng import generator

RETURN_POWER = 4
"""With 1, most pairs that `at_returns` draws can be predicted without a memory, and it is not learned in 600 steps."""


@dataclass(frozen=True)
class ClipSequences:
    """Ordered clips on the device, and the pairs of them that are compared."""

    frames: Float[Tensor, "BK C T Y X"]
    grid: Grid
    pairs: Pairs
    videos: int
    places: Float[Tensor, "B n"] | None = None
    """Numbers in [0, 1) that choose pairs by what returns in a video, see `at_returns`."""


class Memory(Method):
    """Prediction of later clips from a gated recurrent memory."""

    settings: MemorySettings
    _is_whitening_set = False

    def build(self, attention: Backend = "sdpa") -> Networks:
        """Return the memory, and the encoder: frozen by reference, or trained with its moving average."""
        run, settings = self.run, self.settings
        memory = ClipMemory(run.model, cells=settings.side**2, seed=run.seed)
        if settings.encoder is not None:
            folder = Path(settings.encoder)
            frozen = FrozenEncoder(run.model, folder, attention=attention)
            constants: dict[str, torch.nn.Module] = {"encoder_file": EncoderFile(folder)}
            if settings.whiten:
                constants["memory.whitening"] = Whitening(run.model.encoder.width)
            return Networks({"memory": memory}, frozen={"encoder": frozen}, constants=constants)
        encoder = Encoder(run.model, seed=run.seed, attention=attention)
        target = copy.deepcopy(encoder).requires_grad_(False)
        trained = {"encoder": encoder, "memory": memory}
        return Networks(trained, averages={"target": Average(target, of="encoder")}, exported="target")

    def prepare(self, batch: Batch, device: torch.device) -> ClipSequences:
        """Bring sequences to the device and draw the pairs of clips that are compared."""
        (clips,) = batch.groups  # `check` makes sure that all clips have one length
        pixels = normalise(send(clips.frames, device))
        grid = clip_grid(pixels.shape[2], pixels.shape[-1], self.run.model)
        slots = clips.slots[:: clips.sequence]
        pairs = self.draw_pairs(batch.step, slots, clips.sequence, device)
        return ClipSequences(pixels, grid, pairs, len(slots), self.draw_places(batch.step, slots, device))

    def draw_pairs(self, step: int, slots: tuple[int, ...], clips: int, device: torch.device) -> Pairs:
        """Draw pairs of clips and shown cells as functions of (seed, step, slot). Distances are uniform."""
        count, cells = self.settings.pairs, self.settings.side**2
        earlier, later, shown = [], [], []
        for slot in slots:
            draw = generator(self.run.seed, "memory pairs", step, slot)
            distance = draw.integers(1, clips, count)
            first = (draw.random(count) * (clips - distance)).astype(np.int64)
            earlier.append(first)
            later.append(first + distance)
            shown.append(draw.random((count, cells)).argsort(1).argsort(1) < self.settings.shown)
        return Pairs(*(send(torch.from_numpy(np.stack(each)), device) for each in (earlier, later, shown)))

    def draw_places(self, step: int, slots: tuple[int, ...], device: torch.device) -> Float[Tensor, "B n"] | None:
        """Draw numbers for the pairs that are chosen by returns, as functions of (seed, step, slot)."""
        count = round(self.settings.returns * self.settings.pairs)
        if not count:
            return None
        drawn = [generator(self.run.seed, "memory returns", step, slot).random(count) for slot in slots]
        return send(torch.from_numpy(np.stack(drawn).astype(np.float32)), device)

    def loss(self, networks: Networks, inputs: ClipSequences, *, step: int) -> Loss:
        """Return the error of predictions with the memory plus that of predictions without it."""
        settings, run, pairs = self.settings, self.run, inputs.pairs
        if settings.encoder is not None:
            reference = networks["encoder_file"]
            assert isinstance(reference, EncoderFile)
            reference.check()
            with torch.no_grad():
                clips = targets = self._cells(networks["encoder"], inputs)
                if settings.whiten:
                    clips = targets = self._whitened(networks["memory.whitening"], clips)
        else:
            clips = self._cells(networks["encoder"], inputs)
            with torch.no_grad():
                targets = self._cells(networks["target"], inputs)
        if inputs.places is not None:
            pairs = at_returns(pairs, targets, inputs.places)
        errors = forecast_errors(networks["memory"], clips, targets, pairs)
        scale = 1 / (run.batch_size * settings.pairs)
        metrics = {name: error.sum() * scale for name, error in errors.items()}
        value = metrics["prediction"] + metrics["alone"]
        by_gap = self._by_gap(errors, pairs.later - pairs.earlier, scale)
        every = {name: metric.detach() for name, metric in (metrics | by_gap).items()}
        tokens = inputs.videos * run.data.clip.sequence * inputs.grid.tokens
        names = [name.removeprefix("prediction_") for name in by_gap if name.startswith("prediction_")]
        ratios = {f"memory_ratio_{name}": (f"prediction_{name}", f"alone_{name}") for name in names}
        return Loss(
            value=value,
            metrics=every,
            features=clips.detach().flatten(0, 2)[:4096],
            tokens=TokenCounts(total=tokens, visible=tokens),
            ratios={"memory_ratio": ("prediction", "alone"), **ratios},
        )

    def _cells(self, encoder: torch.nn.Module, inputs: ClipSequences) -> Float[Tensor, "B K M F"]:
        """Encode each clip alone and pool its tokens to cells."""
        grid = inputs.grid
        tokens = encoder([View(inputs.frames)])[0].unflatten(1, (grid.t, grid.h, grid.w))
        return pool_cells(tokens, self.settings.side).unflatten(0, (inputs.videos, -1))

    def _whitened(self, whitening: torch.nn.Module, clips: Float[Tensor, "B K M F"]) -> Float[Tensor, "B K M F"]:
        assert isinstance(whitening, Whitening)
        if not self._is_whitening_set:
            set_whitening(whitening, clips.flatten(0, 2))
            self._is_whitening_set = True
        return whitening(clips)

    def _by_gap(self, errors: Mapping[str, Tensor], gaps: Tensor, scale: float) -> dict[str, Tensor]:
        """Sum errors by range of gaps. A range without a pair in a step counts as an error of 0 over nearly 0."""
        ends = [0, *self.settings.gap_clips, 1 << 30]
        found = {}
        for low, high in pairwise(ends):
            name = f"gap_{low + 1}_{high}" if high < 1 << 30 else f"gap_{low + 1}_up"
            inside = (gaps > low) & (gaps <= high)
            for kind, error in errors.items():
                found[f"{kind}_{name}"] = (error * inside).sum() * scale + 1e-12
        return found


@torch.no_grad()
def set_whitening(whitening: Whitening, cells: Float[Tensor, "n F"]) -> None:
    """Fit the whitening to cells of all ranks, unless a checkpoint already set it."""
    if whitening.is_set.is_meta or whitening.is_set.item():
        return
    wide = cells.double()
    count = sum_over_ranks(wide.new_tensor(len(wide)))
    mean = sum_over_ranks(wide.sum(0)) / count
    whitening.fit(mean, sum_over_ranks((wide - mean).T @ (wide - mean)) / count)


def at_returns(pairs: Pairs, cells: Float[Tensor, "B K M F"], places: Float[Tensor, "B n"]) -> Pairs:
    """Replace the first n pairs of each video by pairs whose later clip returns to what was seen before.

    A pair is worth what a perfect memory would save: the distance of the later clip from the earlier clip, less its
    distance from the nearest clip up to there. Pairs are drawn in proportion to a power of that. No label is read.

    Args:
        pairs: pairs with uniform distances.
        cells: features of the clips.
        places: numbers in [0, 1) that choose the pairs.
    """
    clips, count = cells.shape[1], places.shape[1]
    distance = torch.cdist(cells.flatten(2), cells.flatten(2), p=1) / cells[0, 0].numel()  # [B later earlier]
    saved = (distance - distance.cummin(2).values) ** RETURN_POWER
    worth = (saved + 1e-6).tril(-1).flatten(1).cumsum(1)  # a still video has pairs too
    chosen = torch.searchsorted(worth / worth[:, -1:], places.contiguous(), right=True).clamp(max=clips * clips - 2)
    return Pairs(
        torch.cat((chosen % clips, pairs.earlier[:, count:]), dim=1),
        torch.cat((chosen // clips, pairs.later[:, count:]), dim=1),
        pairs.shown,
    )


def forecast_errors(
    memory: torch.nn.Module, clips: Float[Tensor, "B K M F"], targets: Float[Tensor, "B K M F"], pairs: Pairs
) -> dict[str, Float[Tensor, "B P"]]:
    """Return the mean absolute error over hidden cells of each later clip: `prediction` with the memory, `alone`."""
    found = memory(clips, targets, pairs)
    video = torch.arange(len(targets), device=targets.device)[:, None]
    aim, hidden = targets[video, pairs.later], ~pairs.shown
    return {
        name: ((forecast - aim).abs().mean(-1) * hidden).sum(-1) / hidden.sum(-1)
        for name, forecast in (("prediction", found.remembered), ("alone", found.alone))
    }
