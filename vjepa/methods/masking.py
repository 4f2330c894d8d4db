"""Which tokens are visible and which are to be guessed: a function of (seed, step, slot).

A slot is masked the same whichever other slots are asked for, so ranks, micro-batches and resumed runs agree.

Letters: B slots, V visible and K hidden tokens of a clip, t h w its grid.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from vjepa.config import BalancedMask, CausalMask, RandomMask, ReferenceMask, TubeMask
from vjepa.config import Mask as Kind
from vjepa.nn.grid import Grid
from vjepa_data.rng import generator
from vjepa_data.settings import BadInput

# Visible counts are multiples of this where the grid allows: full tiles for matrix and attention kernels.
ROUND_TOKENS = 64


@dataclass(frozen=True)
class Mask:
    """What some clips show and what they hide, through one kind of mask."""

    kind: int
    """Index of the kind; also of its mask token."""

    rows: tuple[int, ...]
    """Which of the slots asked for these are, in order. All of them, but for `reference`, whose counts differ between
    the groups of slots that it truncates together."""

    visible: Int[Tensor, "B V"]
    """Sorted ids of visible tokens."""

    hidden: Int[Tensor, "B K"]
    """Sorted ids of tokens to guess."""

    def select(self, clips: Tensor) -> Tensor:
        """The clips that this mask is for, out of one for each slot; no copy if it is for all."""
        if self.rows == tuple(range(len(clips))):
            return clips
        return clips[torch.tensor(self.rows).to(clips.device, non_blocking=True)]

    def to(self, device: torch.device) -> "Mask":
        """The same, on a device; without waiting for it."""
        visible, hidden = (x.to(device, non_blocking=True) for x in (self.visible, self.hidden))
        return Mask(self.kind, self.rows, visible, hidden)


def sample_masks(kinds: Sequence[Kind], grid: Grid, *, seed: int, step: int, slots: Sequence[int]) -> list[Mask]:
    """Mask some slots of a step through every kind.

    Args:
        kinds: as in `run.masks`.
        grid: tokens of the clips.
        seed: of the run.
        step: optimizer step.
        slots: places in the global batch, ascending.

    Returns:
        On the CPU, one mask for each kind, in order; more for a `reference` kind whose slots span several groups.

    Raises:
        BadInput: a kind would leave nothing visible or nothing hidden on this grid.
    """
    masks = []
    for number, kind in enumerate(kinds):
        if isinstance(kind, ReferenceMask):
            masks += _reference(kind, number, grid, seed=seed, step=step, slots=slots)
            continue
        draws = [generator(seed, "mask", step, slot, number) for slot in slots]
        match kind:
            case BalancedMask():
                seen = _tubes(~_hide_rectangles(kind, grid, draws), grid)
            case TubeMask():
                cells = visible_cells(kind.visible_share, grid)
                seen = _tubes(_lowest(np.stack([draw.random(grid.cells) for draw in draws]), cells), grid)
            case RandomMask():
                count = _round_count(kind.visible_share * grid.tokens, grid.tokens, ROUND_TOKENS)
                seen = _lowest(np.stack([draw.random(grid.tokens) for draw in draws]), count)
            case CausalMask():
                if kind.visible_tubelets >= grid.t:
                    raise BadInput(
                        f"masks: visible_tubelets ({kind.visible_tubelets}) must be below the clip's tubelets "
                        f"({grid.t}); try {max(1, grid.t // 2)}, or longer clips"
                    )
                seen = np.zeros((len(slots), grid.tokens), dtype=bool)
                seen[:, : kind.visible_tubelets * grid.cells] = True
        masks.append(Mask(number, tuple(range(len(slots))), _ids(seen), _ids(~seen)))
    return masks


def visible_cells(share: float, grid: Grid) -> int:
    """How many tubes stay visible: the share, rounded to a multiple of 64 tokens where that moves it little.

    Args:
        share: of the clip that should stay visible.
        grid: tokens of the clip.

    Returns:
        A count of places in the picture, at least 1 and below `grid.cells`.
    """
    return _round_count(share * grid.cells, grid.cells, ROUND_TOKENS // math.gcd(ROUND_TOKENS, grid.t))


def _round_count(wanted: float, whole: int, multiple: int) -> int:
    """A multiple of `multiple`, or of the largest half of it that stays within a sixteenth of what is wanted."""
    if whole < 2:
        raise BadInput(f"masks: a grid of {whole} cannot be both seen and hidden; use larger crops or smaller patches")
    while multiple > 1:
        count = round(wanted / multiple) * multiple
        if 0 < count < whole and abs(count - wanted) <= wanted / 16:
            return count
        multiple //= 2
    return min(max(round(wanted), 1), whole - 1)


def _ids(chosen: NDArray[np.bool_]) -> Int[Tensor, "B V"]:
    """Ids of chosen tokens, in order; every slot must have as many."""
    return torch.from_numpy(np.nonzero(chosen)[1].reshape(len(chosen), -1))


def _tubes(cells: NDArray[np.bool_], grid: Grid) -> NDArray[np.bool_]:
    """The same places of the picture in every tubelet."""
    return np.tile(cells, (1, grid.t))


def _lowest(scores: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """Choose in each row the `count` lowest scores."""
    chosen = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(chosen, np.argpartition(scores, count - 1, axis=1)[:, :count], True, axis=1)
    return chosen


# --- balanced -----------------------------------------------------------------------------------------------------


def _hide_rectangles(kind: BalancedMask, grid: Grid, draws: Sequence[np.random.Generator]) -> NDArray[np.bool_]:
    """Hide an exact number of cells in the shape of rectangles that grow or shrink together until the number is met.

    Each rectangle has its own aspect and place. A cell's score is by how much the nearest rectangle must be scaled
    about its centre to reach it (1 on the border), so the cells of lowest score are the union of rectangles scaled by
    one factor: hidden regions stay large and whole, and no speckle is left, which a model could fill in from next door.
    A rectangle's last row is cut at one end, in a direction drawn for the slot.

    Returns:
        [B cells], True where hidden.
    """
    hidden = grid.cells - visible_cells(_free_share(kind, grid), grid)
    u = np.stack([draw.random(3 * kind.blocks + 1) for draw in draws])  # [B 3 blocks + 1]
    shape, top, left = np.split(u[:, :-1, None], 3, axis=1)  # [B blocks 1]
    height, width = _rectangle(kind.block_share, kind.aspect, grid.h, grid.w, shape)
    top = np.floor(top * (grid.h - height + 1))
    left = np.floor(left * (grid.w - width + 1))
    rows, columns = np.arange(grid.h), np.arange(grid.w)
    down = np.abs(rows + 0.5 - top - height / 2) * (2 / height)  # [B blocks h]
    across = np.abs(columns + 0.5 - left - width / 2) * (2 / width)  # [B blocks w]
    down, across = down[..., :, None], across[..., None, :]
    score = np.maximum(down, across) + 1e-6 * (np.abs(down - across) < 1e-9)  # a corner after its row, never alone
    score = score.min(axis=1)  # [B h w]
    turn = 2 * np.pi * u[:, -1, None, None]
    ramp = np.cos(turn) * rows[:, None] + np.sin(turn) * columns  # breaks ties, far below any true difference
    return _lowest((score + 1e-9 * ramp).reshape(len(u), -1), hidden)


def _rectangle(
    block_share: float, aspect: tuple[float, float], h: int, w: int, u: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Height and width in cells of a rectangle whose aspect lies at `u`, in [0, 1), of the way."""
    ratio = aspect[0] + u * (aspect[1] - aspect[0])
    cells = block_share * h * w
    height = np.clip(np.round(np.sqrt(cells * ratio)), 1, h)
    width = np.clip(np.round(np.sqrt(cells / ratio)), 1, w)
    return height.astype(np.float64), width.astype(np.float64)


def _free_share(kind: BalancedMask, grid: Grid) -> float:
    """Share of the picture that stays visible: as set, or what the rectangles leave free on average."""
    if kind.visible_share is not None:
        return kind.visible_share
    return _mean_free_share(kind.blocks, kind.block_share, kind.aspect, grid.h, grid.w)


@functools.cache
def _mean_free_share(blocks: int, block_share: float, aspect: tuple[float, float], h: int, w: int) -> float:
    """Expected share that the rectangles leave free: exact in their places, by the midpoint rule in their aspect."""
    covered = np.zeros((h, w))  # chance that one rectangle covers a cell
    shapes = np.stack(_rectangle(block_share, aspect, h, w, (np.arange(64) + 0.5) / 64), axis=1)
    for height, width in shapes:
        covered += np.outer(_chance(h, int(height)), _chance(w, int(width))) / len(shapes)
    return float(((1 - covered) ** blocks).mean())


def _chance(cells: int, length: int) -> NDArray[np.float64]:
    """Chance that a stretch of `length` out of `cells`, placed uniformly, covers each of them."""
    places = cells - length + 1
    starts = np.arange(places)
    at = np.arange(cells)[:, None]
    return ((starts <= at) & (at < starts + length)).sum(axis=1) / places


# --- reference ----------------------------------------------------------------------------------------------------


def _reference(
    kind: ReferenceMask, number: int, grid: Grid, *, seed: int, step: int, slots: Sequence[int]
) -> list[Mask]:
    """Cut the global batch into groups of `kind.batch` slots, each masked as V-JEPA 2 masks the batch of one GPU."""
    masks = []
    for group in sorted({slot // kind.batch for slot in slots}):
        sizes, places = generator(seed, "reference mask", step, group, number).integers(2**63, size=2)
        visible, hidden = reference_masks(
            kind, grid, clips=kind.batch, size_seed=int(sizes), places=torch.Generator().manual_seed(int(places))
        )
        rows = tuple(row for row, slot in enumerate(slots) if slot // kind.batch == group)
        own = torch.tensor([slots[row] % kind.batch for row in rows])
        masks.append(Mask(number, rows, visible[own], hidden[own]))
    return masks


def reference_masks(
    kind: ReferenceMask, grid: Grid, *, clips: int, size_seed: int, places: torch.Generator
) -> tuple[Int[Tensor, "B V"], Int[Tensor, "B K"]]:
    """V-JEPA 2's sampler, draw by draw: with equal seeds, equal ids.

    One size of block for all clips; a place for each block of each clip; visible is what no block covers. Then every
    clip is cut to the fewest ids of any, first ids first. Time is outermost in an id, so the cut hides the end of the
    clip from both sides, and how much is cut depends on `clips`.

    Args:
        kind: blocks, their scale and aspect.
        grid: tokens of the clips.
        clips: how many to mask, and to cut to the fewest ids among them.
        size_seed: decides the block's size. V-JEPA 2 counts batches: 0, 1, 2 ...
        places: decides where the blocks go. V-JEPA 2 uses the loader worker's global generator.

    Returns:
        Sorted ids of visible and of hidden tokens.

    Raises:
        BadInput: the blocks cover the whole clip again and again.

    Source: V-JEPA 2 (arXiv:2506.09985) and its released sampler, described, not copied.
    """
    t, h, w = _reference_size(kind, grid, size_seed)
    visible, hidden = [], []
    for _ in range(clips):
        for _attempt in range(1000):
            seen = torch.ones(grid.t, grid.h, grid.w, dtype=torch.bool)
            for _ in range(kind.blocks):
                top, left, start = (
                    int(torch.randint(free + 1, (1,), generator=places))
                    for free in (grid.h - h, grid.w - w, grid.t - t)
                )
                seen[start : start + t, top : top + h, left : left + w] = False
            if seen.any():
                break
        else:
            raise BadInput(
                f"masks: {kind.blocks} blocks of {t}x{h}x{w} tokens cover the whole grid {grid.t}x{grid.h}x{grid.w}; "
                "use fewer or smaller ones"
            )
        flat = seen.flatten()
        visible.append(flat.nonzero()[:, 0])
        hidden.append((~flat).nonzero()[:, 0])
    seen_count, hidden_count = (min(map(len, ids)) for ids in (visible, hidden))
    return torch.stack([ids[:seen_count] for ids in visible]), torch.stack([ids[:hidden_count] for ids in hidden])


def _reference_size(kind: ReferenceMask, grid: Grid, seed: int) -> tuple[int, int, int]:
    """Tubelets, rows and columns of a block."""
    rng = torch.Generator().manual_seed(seed)
    u = [float(torch.rand(1, generator=rng)) for _ in range(3)]
    (t0, t1), (s0, s1), (a0, a1) = kind.temporal_scale, kind.spatial_scale, kind.aspect
    t = max(1, int(grid.t * (t0 + u[0] * (t1 - t0))))
    cells = int(grid.cells * (s0 + u[1] * (s1 - s0)))
    aspect = a0 + u[2] * (a1 - a0)
    h = min(round(math.sqrt(cells * aspect)), grid.h)
    w = min(round(math.sqrt(cells / aspect)), grid.w)
    return t, h, w
