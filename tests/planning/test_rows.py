"""Rows have the same bits in any company, whatever the function does with the size of its batch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vjepa.planning.rows import TILE, RowWise


def by_size(x: Tensor) -> Tensor:
    """Compute something else for each number of rows."""
    return x * (1 + len(x) * 2**-20)


def by_place(x: Tensor) -> Tensor:
    """Compute something else for the first row."""
    return torch.cat((x[:1] * (1 + 2**-20), x[1:])) if len(x) > 1 else x * 1


def product(x: Tensor) -> Tensor:
    """Multiply by a matrix, whose order of summation depends on the batch."""
    weight = torch.randn(200, 96, generator=torch.Generator().manual_seed(1))
    return torch.tanh(x @ weight) @ weight.T


@pytest.mark.parametrize("compute", [by_size, by_place, product, lambda x: x.square()])
def test_a_row_has_the_same_bits_in_any_company(compute: Callable[[Tensor], Tensor]):
    rows = torch.randn(5 * TILE + 3, 200, generator=torch.Generator().manual_seed(0))
    function = RowWise(compute)
    together = function(rows)
    for first, count in ((0, 1), (7, 1), (3, 2), (1, TILE), (10, 3 * TILE + 1), (len(rows) - 1, 1)):
        assert torch.equal(function(rows[first : first + count]), together[first : first + count])
        assert torch.equal(RowWise(compute)(rows[first : first + count]), together[first : first + count])


def test_large_inputs_are_computed_in_blocks():
    sizes = []

    def watched(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return 2 * x

    rows = torch.arange(100.0)[:, None]
    assert torch.equal(RowWise(watched, tokens=64)(rows), 2 * rows)
    assert max(sizes) == 2 * TILE, "a row of 64 tokens: blocks of 2,048 tokens"


def test_gradients_have_the_same_bits_in_any_company():
    rows = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))

    def gradient(part: Tensor) -> Tensor:
        part = part.clone().requires_grad_()
        return torch.autograd.grad(RowWise(product)(part).square().sum(), part)[0]

    assert torch.equal(gradient(rows)[5:6], gradient(rows[5:6]))


def test_rows_of_other_strides_have_the_same_bits():
    rows = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)).T
    function = RowWise(product)
    assert torch.equal(function(rows), function(rows.contiguous()))
    same = rows[:1].expand(32, -1)
    assert torch.equal(function(same), function(same.contiguous()))
