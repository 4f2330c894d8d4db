"""Masks: which tokens of a clip are visible and which are hidden, as a function of (seed, step, slot).

The mask of a slot does not depend on the other slots requested with it, so ranks, micro-batches and resumed runs agree.

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

from vjepa.methods.mask_settings import BalancedMask, CausalMask, RandomMask, ReferenceMask, TubeMask
from vjepa.methods.mask_settings import Mask as MaskKind
from vjepa.nn.grid import Grid
from vjepa_data.rng import generator
from vjepa_data.settings import BadInput

# Visible counts are multiples of this where the grid allows: full tiles for matrix and attention kernels.
ROUND_TOKENS = 64


@dataclass(frozen=True)
class Mask:
    """Visible and hidden tokens of some clips, for a kind of mask."""

    kind: int
    """Index of the kind and of its mask token."""

    rows: tuple[int, ...]
    """Positions in the requested slots, ascending. `reference` masks may cover only some of them, because their counts
    differ between the groups of slots that are truncated together."""

    visible: Int[Tensor, "B V"]
    """Sorted ids of visible tokens."""

    hidden: Int[Tensor, "B K"]
    """Sorted ids of hidden tokens, to predict."""

    def select(self, clips: Tensor) -> Tensor:
        """Return the clips that this mask covers, given a clip for each slot. Without a copy if it covers all."""
        if self.rows == tuple(range(len(clips))):
            return clips
        return clips[torch.tensor(self.rows).to(clips.device, non_blocking=True)]

    def to(self, device: torch.device) -> "Mask":
        """Return a copy on a device, without waiting for it. From pageable memory the host would wait."""
        pinned = (x.pin_memory() if device.type == "cuda" else x for x in (self.visible, self.hidden))
        visible, hidden = (x.to(device, non_blocking=True) for x in pinned)
        return Mask(self.kind, self.rows, visible, hidden)


def sample_masks(kinds: Sequence[MaskKind], grid: Grid, *, seed: int, step: int, slots: Sequence[int]) -> list[Mask]:
    """Draw a mask of every kind for some slots of a step.

    Args:
        kinds: kinds of mask, as in the method's settings.
        grid: tokens of the clips.
        seed: of the run.
        step: optimizer step.
        slots: places in the global batch, ascending.

    Returns:
        On the CPU, a mask for each kind, in order. A `reference` kind whose slots span several groups has more.

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
                        f"({grid.t}). Try {max(1, grid.t // 2)}, or longer clips."
                    )
                seen = np.zeros((len(slots), grid.tokens), dtype=bool)
                seen[:, : kind.visible_tubelets * grid.cells] = True
        masks.append(Mask(number, tuple(range(len(slots))), _ids(seen), _ids(~seen)))
    return masks


def visible_cells(share: float, grid: Grid) -> int:
    """Return the number of visible tubes: the share, rounded to a multiple of 64 tokens where that changes it little.

    Args:
        share: share of the clip that stays visible.
        grid: tokens of the clip.

    Returns:
        A number of cells, at least 1 and below `grid.cells`.
    """
    return _round_count(share * grid.cells, grid.cells, ROUND_TOKENS // math.gcd(ROUND_TOKENS, grid.t))


def _round_count(wanted: float, whole: int, multiple: int) -> int:
    """Round to `multiple`, or to the largest half of it that changes the number by at most a sixteenth."""
    if whole < 2:
        raise BadInput(
            f"masks: a grid of {whole} cannot be split into visible and hidden; use larger crops or smaller patches"
        )
    while multiple > 1:
        count = round(wanted / multiple) * multiple
        if 0 < count < whole and abs(count - wanted) <= wanted / 16:
            return count
        multiple //= 2
    return min(max(round(wanted), 1), whole - 1)


def _ids(chosen: NDArray[np.bool_]) -> Int[Tensor, "B V"]:
    """Return the ids of chosen tokens, ascending. Every slot must have the same number."""
    return torch.from_numpy(np.nonzero(chosen)[1].reshape(len(chosen), -1))


def _tubes(cells: NDArray[np.bool_], grid: Grid) -> NDArray[np.bool_]:
    """Repeat the same cells in every tubelet."""
    return np.tile(cells, (1, grid.t))


def _lowest(scores: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """Mark the `count` lowest scores of each row."""
    chosen = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(chosen, np.argpartition(scores, count - 1, axis=1)[:, :count], True, axis=1)
    return chosen


# --- balanced -----------------------------------------------------------------------------------------------------


def _hide_rectangles(kind: BalancedMask, grid: Grid, draws: Sequence[np.random.Generator]) -> NDArray[np.bool_]:
    """Hide an exact number of cells, as rectangles that grow or shrink together until the number is met.

    Each rectangle has its own aspect and position. A cell's score is the factor by which the nearest rectangle must be
    scaled about its centre to reach the cell (1 on the border). The cells of lowest score are therefore the union of
    rectangles scaled by a common factor. Hidden regions stay large and contiguous, without isolated cells that a model
    could fill in from their neighbours. A rectangle's last row is cut at one end, in a direction drawn for the slot.

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
    """Return the height and width in cells of rectangles whose aspect lies at fraction `u`, in [0, 1), of its range."""
    ratio = aspect[0] + u * (aspect[1] - aspect[0])
    cells = block_share * h * w
    height = np.clip(np.round(np.sqrt(cells * ratio)), 1, h)
    width = np.clip(np.round(np.sqrt(cells / ratio)), 1, w)
    return height.astype(np.float64), width.astype(np.float64)


def _free_share(kind: BalancedMask, grid: Grid) -> float:
    """Return the visible share of the picture: as set, or the average area outside the rectangles."""
    if kind.visible_share is not None:
        return kind.visible_share
    return _mean_free_share(kind.blocks, kind.block_share, kind.aspect, grid.h, grid.w)


@functools.cache
def _mean_free_share(blocks: int, block_share: float, aspect: tuple[float, float], h: int, w: int) -> float:
    """Return the expected share outside the rectangles: exact over positions, by the midpoint rule over aspects."""
    covered = np.zeros((h, w))  # chance that one rectangle covers a cell
    shapes = np.stack(_rectangle(block_share, aspect, h, w, (np.arange(64) + 0.5) / 64), axis=1)
    for height, width in shapes:
        covered += np.outer(_chance(h, int(height)), _chance(w, int(width))) / len(shapes)
    return float(((1 - covered) ** blocks).mean())


def _chance(cells: int, length: int) -> NDArray[np.float64]:
    """Return, for each cell, the probability that an interval of `length` placed uniformly covers it."""
    places = cells - length + 1
    starts = np.arange(places)
    at = np.arange(cells)[:, None]
    return ((starts <= at) & (at < starts + length)).sum(axis=1) / places


# --- reference ----------------------------------------------------------------------------------------------------


def _reference(
    kind: ReferenceMask, number: int, grid: Grid, *, seed: int, step: int, slots: Sequence[int]
) -> list[Mask]:
    """Mask groups of `kind.batch` slots of the global batch as V-JEPA 2 masks the batch of a GPU."""
    placed = [divmod(slot, kind.groups)[::-1] if kind.groups else divmod(slot, kind.batch) for slot in slots]
    masks = []
    for group in sorted({group for group, _ in placed}):
        sizes, places = generator(seed, "reference mask", step, group, number).integers(2**63, size=2)
        visible, hidden = reference_masks(
            kind, grid, clips=kind.batch, size_seed=int(sizes), places=torch.Generator().manual_seed(int(places))
        )
        rows = tuple(row for row, (of, _) in enumerate(placed) if of == group)
        own = torch.tensor([placed[row][1] for row in rows])
        masks.append(Mask(number, rows, visible[own], hidden[own]))
    return masks


def reference_masks(
    kind: ReferenceMask, grid: Grid, *, clips: int, size_seed: int, places: torch.Generator
) -> tuple[Int[Tensor, "B V"], Int[Tensor, "B K"]]:
    """Reproduce V-JEPA 2's sampler draw by draw: equal seeds give equal ids.

    All clips share a block size, and each block of each clip has its own position. Tokens outside all blocks are
    visible. Then every clip is truncated to the fewest ids of any clip, first ids first. Time is outermost in an id, so
    truncation removes the end of the clip from both sets, and its amount depends on `clips`.

    Args:
        kind: number, scale and aspect of the blocks.
        grid: tokens of the clips.
        clips: clips that are masked and truncated together.
        size_seed: seed of the block size. V-JEPA 2 counts batches: 0, 1, 2 ...
        places: generator of the positions. V-JEPA 2 uses the loader worker's global generator.

    Returns:
        Sorted ids of visible and of hidden tokens.

    Raises:
        BadInput: the blocks cover the whole clip in 1,000 attempts.

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
                f"masks: {kind.blocks} blocks of {t}x{h}x{w} tokens cover the whole grid {grid.t}x{grid.h}x{grid.w}. "
                "Use fewer or smaller blocks."
            )
        flat = seen.flatten()
        visible.append(flat.nonzero()[:, 0])
        hidden.append((~flat).nonzero()[:, 0])
    seen_count, hidden_count = (min(map(len, ids)) for ids in (visible, hidden))
    return torch.stack([ids[:seen_count] for ids in visible]), torch.stack([ids[:hidden_count] for ids in hidden])


def _reference_size(kind: ReferenceMask, grid: Grid, seed: int) -> tuple[int, int, int]:
    """Return the tubelets, rows and columns of a block."""
    rng = torch.Generator().manual_seed(seed)
    u = [float(torch.rand(1, generator=rng)) for _ in range(3)]
    (t0, t1), (s0, s1), (a0, a1) = kind.temporal_scale, kind.spatial_scale, kind.aspect
    t = max(1, int(grid.t * (t0 + u[0] * (t1 - t0))))
    cells = int(grid.cells * (s0 + u[1] * (s1 - s0)))
    aspect = a0 + u[2] * (a1 - a0)
    h = min(round(math.sqrt(cells * aspect)), grid.h)
    w = min(round(math.sqrt(cells / aspect)), grid.w)
    return t, h, w
