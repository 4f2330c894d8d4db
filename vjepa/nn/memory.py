"""A memory of a video: a vector per cell of a coarse grid, updated by every clip through gates.

    clip i  --encoder-->  tokens  --mean over time, m x m cells (whitened)-->  e_i
    u, r   = sigmoid(W e_i + V m_{i-1})                              one number per channel: update, read
    m_i    = (1 - u) * m_{i-1} + u * norm(Tx(e_i, r * m_{i-1}))      Tx: transformer blocks over both
    z      = predictor(m_i, e_i, some cells of clip i + d)           the other cells of clip i + d

Source: gates around transformer blocks, RVM (arXiv:2512.13684). There, the state has a vector per patch.

This module imports torch and our networks alone, so that a native export loads without our other dependencies.

Letters: B videos, K clips, T frames, H W pixels, M cells, F channels of a feature, D width, P pairs of clips.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjepa.nn.attention import Segments
from vjepa.nn.blocks import NORM_EPS, Block
from vjepa.nn.init import assign, init_weights
from vjepa.nn.positions import Rotation
from vjepa.nn.shapes import Bool, Float, Int, Model

SHUT = -2.0
"""Added to the update gate. Its learned bias is on top."""

LASTS = (2.0, 64.0)
"""Clips after which channels of an untrained memory have forgotten 63 % of a clip, spread evenly in the logarithm.

Source: gates that begin with the range of time constants to be learned, Tallec and Ollivier (arXiv:1804.11188).
"""


class Pairs(NamedTuple):
    """Pairs of an earlier and a later clip of a video."""

    earlier: Int[Tensor, "B P"]
    later: Int[Tensor, "B P"]
    shown: Bool[Tensor, "B P M"]
    """Cells of the later clip that the predictor sees. It predicts the other cells."""


class Forecasts(NamedTuple):
    """Predictions of the cells of later clips."""

    remembered: Float[Tensor, "B P M F"]
    """From the memory after the earlier clip."""

    alone: Float[Tensor, "B P M F"]
    """From a memory that has seen the earlier clip alone."""


def pool_cells(tokens: Float[Tensor, "B t h w F"], side: int) -> Float[Tensor, "B M F"]:
    """Average tokens over time and over `side` x `side` cells, and layer-norm them without parameters, in fp32."""
    cells = F.adaptive_avg_pool2d(tokens.float().mean(1).movedim(-1, 1), side).flatten(2).transpose(1, 2)
    return F.layer_norm(cells, cells.shape[-1:])


class Whitening(nn.Module):
    """A fixed linear map of features after which all directions weigh alike: decorrelated, with a variance near 1.

    The map is symmetric (ZCA), so channels keep their meaning. Directions with hardly any variance are not blown up.
    A run fits it to its first batch, and a checkpoint keeps it.
    """

    FLOOR = 1e-3
    """Added to each variance, as a share of the largest."""

    def __init__(self, features: int):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(features), requires_grad=False)
        self.matrix = nn.Parameter(torch.eye(features), requires_grad=False)
        self.is_set = nn.Parameter(torch.zeros(1), requires_grad=False)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Initialize the map to the identity."""
        self.mean.zero_()
        self.matrix.copy_(torch.eye(len(self.mean)))
        self.is_set.zero_()

    def forward(self, cells: Float[Tensor, "... F"]) -> Float[Tensor, "... F"]:
        """Whiten features, in fp32."""
        return (cells.float() - self.mean) @ self.matrix

    @torch.no_grad()
    def fit(self, mean: Float[Tensor, " F"], covariance: Float[Tensor, "F F"]) -> None:
        """Set the map to whiten features with this mean and covariance."""
        variances, directions = torch.linalg.eigh(covariance)
        scales = (variances.clamp(min=0) + self.FLOOR * variances.max()).rsqrt()
        self.mean.copy_(mean)
        self.matrix.copy_(directions @ torch.diag(scales) @ directions.T)
        self.is_set.fill_(1)


class ClipMemory(nn.Module):
    """The recurrent core and the predictor that trains it."""

    def __init__(self, settings: Model, *, cells: int, seed: int = 0):
        """Build the networks and initialize them, unless on the meta device.

        Args:
            settings: `encoder.width` for the features, `predictor` for the size of core and predictor.
            cells: cells of a clip.
            seed: determines the initial weights, independently of device and sharding.
        """
        super().__init__()
        size, features = settings.predictor, settings.encoder.width
        self.settings, self.cells, self.size = settings, cells, size
        self.whitening: Whitening | None = None
        """Map of the pooled features. Only a loaded model has it. A method applies it itself."""
        self.embed = nn.Linear(features, size.width)
        self.place = nn.Parameter(torch.empty(cells, size.width))
        self.gate_new = nn.Linear(size.width, 2 * size.width)
        self.gate_state = nn.Linear(size.width, 2 * size.width, bias=False)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=NORM_EPS)
        self.distance_embed = nn.Linear(1, size.width)
        self.predictor_embed = nn.Linear(features, size.width)
        self.predictor_blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.predictor_norm = nn.LayerNorm(size.width, eps=NORM_EPS)
        self.predictor_proj = nn.Linear(size.width, features)
        if not self.place.is_meta:
            self.init_weights(seed)

    @classmethod
    def of_shapes(cls, settings: Model, shape: Callable[[str], tuple[int, ...]]) -> "ClipMemory":
        """Build the networks for tensors of these shapes. The shape of a missing tensor is empty."""
        found = cls(settings, cells=shape("memory.place")[0])
        if channels := shape("memory.whitening.mean"):
            found.whitening = Whitening(*channels)
        return found

    def init_weights(self, seed: int = 0) -> None:
        """Initialize all parameters. Call it after `to_empty` if the memory was built on the meta device."""
        init_weights(self, seed=seed, name="memory", std=self.settings.init_std)
        width = self.size.width
        fewest, most = map(math.log10, LASTS)
        lasts = torch.logspace(fewest, most, width)
        shut = torch.cat((-(lasts - 1).log() - SHUT, torch.zeros(width)))
        with torch.no_grad():
            assign(self.gate_new.bias, shut)

    @property
    def side(self) -> int:
        """Cells of a row."""
        return round(self.cells**0.5)

    def read(self, tokens: Float[Tensor, "B t h w F"]) -> Float[Tensor, "B M F"]:
        """Return the cells of clips, as `remember` takes them."""
        cells = pool_cells(tokens, self.side)
        return cells if self.whitening is None else self.whitening(cells)

    def empty(self, clips: Tensor) -> Float[Tensor, "B M D"]:
        """Return the state before the first clip."""
        return clips.new_zeros(len(clips), self.cells, self.size.width)

    def remember(
        self, clips: Float[Tensor, "B K M F"], state: Float[Tensor, "B M D"] | None = None
    ) -> Float[Tensor, "B K M D"]:
        """Return the state after each clip.

        Args:
            clips: pooled features, see `read`.
            state: the state before them. By default nothing has been seen.
        """
        inputs = self.embed(clips.to(self.place.dtype)) + self.place
        state = self.empty(inputs) if state is None else state
        states = []
        for new in inputs.unbind(1):
            update, read = (self.gate_new(new) + self.gate_state(state)).chunk(2, dim=-1)
            both = _transform(self.blocks, torch.cat((new, read.sigmoid() * state), dim=1))
            state = torch.lerp(state, self.norm(both[:, : self.cells]), (update + SHUT).sigmoid())
            states.append(state)
        return torch.stack(states, dim=1)

    def forecast(
        self, states: Float[Tensor, "B P M D"], newest: Float[Tensor, "B P M F"], later: Float[Tensor, "B P M F"],
        pairs: Pairs,
    ) -> Float[Tensor, "B P M F"]:  # fmt: skip
        """Predict the cells of later clips.

        Args:
            states: memory after the earlier clips.
            newest: pooled features of the earlier clips.
            later: pooled features of the later clips as targets, of which the predictor sees `pairs.shown`.
            pairs: numbers of the clips.
        """
        distance = (pairs.later - pairs.earlier).to(self.place.dtype).log1p()[..., None, None]
        given = self.predictor_embed(later.to(self.place.dtype)) * pairs.shown[..., None]
        # The memory of a cell is added to its query: attention would have to learn first which cell is which.
        queries = self.place + self.distance_embed(distance) + given + states
        x = torch.cat((queries, states, self.embed(newest.to(self.place.dtype)) + self.place), dim=2).flatten(0, 1)
        found = _transform(self.predictor_blocks, x)[:, : self.cells]
        return self.predictor_proj(self.predictor_norm(found)).unflatten(0, later.shape[:2]).float()

    def forward(self, clips: Float[Tensor, "B K M F"], later: Float[Tensor, "B K M F"], pairs: Pairs) -> Forecasts:
        """Predict later clips with and without the memory, in one call, since FSDP2 gathers parameters around it."""
        video = torch.arange(len(clips), device=clips.device)[:, None]
        newest, aims = clips[video, pairs.earlier], later[video, pairs.later]
        alone = self.remember(newest.flatten(0, 1)[:, None]).unflatten(0, pairs.earlier.shape)[:, :, 0]
        states = self.remember(clips)[video, pairs.earlier]
        return Forecasts(self.forecast(states, newest, aims, pairs), self.forecast(alone, newest, aims, pairs))


def _transform(blocks: nn.ModuleList, x: Float[Tensor, "B _N D"]) -> Float[Tensor, "B _N D"]:
    """Pass sequences through blocks without rotary positions."""
    count, length, _ = x.shape
    segments = Segments.of([(count, length)], device=x.device)
    first = blocks[0]
    assert isinstance(first, Block)
    still = torch.ones(count * length, 1, 1, x.shape[-1] // first.attn.heads, device=x.device)
    rotation = Rotation(still, torch.zeros_like(still))
    x = x.flatten(0, 1)
    for block in blocks:
        x = block(x, rotation, segments)
    return x.unflatten(0, (count, length))
