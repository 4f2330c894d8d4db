"""Functions of rows whose results do not depend, bit by bit, on how many rows are computed together.

The matrix products of a CPU choose their order of summation by the shape of the batch. Rows are therefore computed in
blocks, each padded to a multiple of TILE rows. The first time that a block of some size is computed, some of its tiles
are computed alone too. A size that does not give the same is computed tile by tile from then on. So the result of a row
is that of a tile, whatever else is computed, and mostly at the speed of a large batch.

Letters: R rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

TILE = 16
"""Rows of a tile. The products of MKL give a row the same bits in 16 rows as in 1,024, and other bits in 8."""

LARGEST = 2048
"""Rows of the largest block, if a row is a single token. Larger ones leave the caches of a CPU."""


class RowWise:
    """A function of tensors [R ...] to a tensor [R ...], which computes each row from the same row of its inputs."""

    def __init__(self, compute: Callable[..., Tensor], *, tokens: int = 1) -> None:
        """Args:
        compute: the function.
        tokens: tokens of a row, by which blocks are smaller.
        """
        self._compute = compute
        self._largest = max(1, LARGEST // TILE // tokens) * TILE
        self._tile: int | None = None
        self._is_equal: dict[tuple[int, bool], bool] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Compute all rows. A GPU computes them at once, as they are."""
        if inputs[0].device.type != "cpu":
            return self._compute(*inputs)
        parts = zip(*(each.split(self._largest) for each in inputs), strict=True)
        return torch.cat([self._block(part) for part in parts])

    def _block(self, inputs: tuple[Tensor, ...]) -> Tensor:
        rows = len(inputs[0])
        padded = tuple(_pad(each, -rows % TILE) for each in inputs)
        has_gradient = torch.is_grad_enabled() and any(each.requires_grad for each in padded)
        key = (len(padded[0]), has_gradient)
        if key not in self._is_equal:
            self._is_equal[key] = self._agrees(padded)
        return (self._compute(*padded) if self._is_equal[key] else self._by_tile(padded))[:rows]

    def _by_tile(self, inputs: tuple[Tensor, ...]) -> Tensor:
        if self._tile is None:
            self._tile = TILE if self._is_same_anywhere(inputs) else 1
        parts = zip(*(each.split(self._tile) for each in inputs), strict=True)
        return torch.cat([self._compute(*part) for part in parts])

    @torch.no_grad()
    def _is_same_anywhere(self, inputs: tuple[Tensor, ...]) -> bool:
        """Return whether a row has the same result at any place of a tile."""
        tile = [each[:TILE] for each in inputs]
        found = self._compute(*tile)
        moved = [self._compute(*(each.roll(shift, 0) for each in tile)).roll(-shift, 0) for shift in (1, 6, 11)]
        return all(torch.equal(found, each) for each in moved)

    def _agrees(self, inputs: tuple[Tensor, ...]) -> bool:
        """Return whether a block gives what some of its tiles give alone, and the same gradients if there are any."""
        leaves = [each.detach().requires_grad_(each.requires_grad) for each in inputs]
        wanted = [each for each in leaves if each.requires_grad]
        whole = self._compute(*leaves)
        gradients = torch.autograd.grad(whole.sum(), wanted) if whole.requires_grad else ()
        last = len(whole) - TILE
        for first in {0, last // TILE // 3 * TILE, last // TILE // 2 * TILE, last}:
            rows = slice(first, first + TILE)
            part = self._by_tile(tuple(each[rows] for each in leaves))
            found = torch.autograd.grad(part.sum(), wanted) if part.requires_grad else ()
            pairs = [(whole, part), *zip(gradients, (each[rows] for each in found), strict=True)]
            if not all(torch.equal(one[rows], other) for one, other in pairs):
                return False
        return True


def _pad(rows: Tensor, count: int) -> Tensor:
    """Repeat the first row at the end, and return contiguous rows: other strides take other products."""
    return torch.cat((rows, rows[:1].expand(count, *rows.shape[1:]))) if count else rows.contiguous()
