"""Regularizers that prevent collapse without a slowly moving target: SIGReg, VICReg, Barlow Twins.

Each term is a function of the embeddings of the whole step. Sums over clips are summed over ranks, with their gradient,
so that the term and its gradient do not depend on the number of ranks.

Letters: n clips of this rank, d channels, k knots, s slices.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from vjepa_data.rng import generator


class _Sum(torch.autograd.Function):
    """All-reduce (sum) whose backward pass sums the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def sum_over_ranks(x: Tensor) -> Tensor:
    """Differentiable all-reduce (sum). Returns its input on a single rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    result = _Sum.apply(x)
    assert isinstance(result, Tensor)
    return result


def world_size() -> int:
    """Return the number of ranks. Each adds this share of a term that is the same number on all of them."""
    return dist.get_world_size() if dist.is_initialized() else 1


def directions(*, seed: int, step: int, width: int, slices: int, device: torch.device) -> Float[Tensor, "d s"]:
    """Return random unit vectors: a function of the seed and the step, the same on all ranks."""
    drawn = generator(seed, "slices", step).standard_normal((width, slices), dtype="float32")
    vectors = torch.from_numpy(drawn)
    vectors = (vectors.pin_memory() if device.type == "cuda" else vectors).to(device, non_blocking=True)
    return vectors / vectors.norm(dim=0, keepdim=True)


def sigreg(z: Float[Tensor, "n d"], *, count: int, slices: Float[Tensor, "d s"], knots: int) -> Float[Tensor, ""]:
    """Return the distance of embeddings from a standard normal distribution, along many directions.

    Along a direction u the numbers x = z u should be standard normal, whose characteristic function is exp(-t^2 / 2).
    The Epps-Pulley statistic compares it with the empirical function, at `knots` values of t in [0, 3]:

        count * sum_t w(t) [ (mean cos(t x) - exp(-t^2 / 2))^2 + (mean sin(t x))^2 ]

    with w(t) the trapezoid rule, doubled for negative t, times exp(-t^2 / 2).

    Args:
        z: embeddings of this rank.
        count: clips over all ranks.
        slices: unit vectors.
        knots: values of t.

    Returns:
        Mean over directions. It is about 1 for normal embeddings, at any count.

    Source: LeJEPA (arXiv:2511.08544).
    """
    t = torch.linspace(0, 3, knots, device=z.device)
    normal = (-t.square() / 2).exp()
    weights = torch.full_like(t, 2 * 3 / (knots - 1))
    weights[0] = weights[-1] = 3 / (knots - 1)
    turned = (z.float() @ slices)[..., None] * t  # [n s k]
    observed = sum_over_ranks(torch.stack((turned.cos().sum(0), turned.sin().sum(0)))) / count  # [2 s k]
    apart = (observed[0] - normal).square() + observed[1].square()
    return count * (apart * weights * normal).sum(-1).mean()


def vicreg(z: Float[Tensor, "n d"], *, count: int) -> Float[Tensor, ""]:
    """Return the variance and covariance terms: channels should have a standard deviation of 1 or more, uncorrelated.

        mean_i max(0, 1 - sqrt(var_i + 1e-4))  +  1/25 sum_{i != j} cov_ij^2 / d

    The weights of the two terms, and 1 for the error between views, are VICReg's 25, 1 and 25.

    Source: VICReg (arXiv:2105.04906), equations 1 to 3.
    """
    z = z.float()
    covariance = _moments(z, z, count)[2] * (count / (count - 1))
    variance = covariance.diagonal()
    deficit = torch.relu(1 - (variance + 1e-4).sqrt()).mean()
    return deficit + (covariance.square().sum() - variance.square().sum()) / len(variance) / 25


def barlow(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], *, count: int) -> Float[Tensor, ""]:
    """Return the redundancy term: a channel should correlate with itself in another view, and with no other channel.

        sum_i (1 - c_ii)^2  +  0.0051 sum_{i != j} c_ij^2        c: correlation of channels of two views

    Source: Barlow Twins (arXiv:2103.03230).
    """
    a, b = a.float(), b.float()
    between = _moments(a, b, count)[2]
    spread_a, spread_b = (_moments(x, x, count)[2].diagonal().clamp_min(0) + 1e-5 for x in (a, b))
    c = between / torch.outer(spread_a, spread_b).sqrt()
    own = c.diagonal()
    return (1 - own).square().sum() + 0.0051 * (c.square().sum() - own.square().sum())


def _moments(a: Tensor, b: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the means of two views over all ranks, and the covariance of their channels."""
    width = a.shape[1]
    sums = sum_over_ranks(torch.cat((a.sum(0), b.sum(0), (a.T @ b).flatten()))) / count
    mean_a, mean_b, second = sums.split((width, width, width * width))
    return mean_a, mean_b, second.view(width, width) - torch.outer(mean_a, mean_b)
