"""Collapse monitors: numbers that fall or rise when features collapse, which the loss does not show.

All are tensors on the device. They are computed over the features of all ranks, with a sum over ranks of `1 + D + D *
D` numbers and a decomposition for which the host waits. Compute them every hundred steps or so.

Letters: n features, D channels.
"""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from vjepa.compat import differences, square_sum

Total = Callable[[Tensor], Tensor]
"""Sum over ranks: `World.sum`, or the identity on a single rank."""


def monitor(features: Float[Tensor, "n D"], total: Total, *, decompose: bool = True) -> dict[str, Float[Tensor, ""]]:
    """Measure the spread of features.

    Args:
        features: features of this rank. At least two over all ranks. Features pooled over a clip show whether clips
            differ. Tokens may differ by their position alone.
        total: sum over ranks.
        decompose: whether to decompose the covariance, which takes a GPU 0.1 s. Otherwise `rankme` is NaN.

    Returns:
        `rankme`: effective rank of the features, from 1 (collapsed) to D: exp of the entropy of the singular values
            normalised to sum 1, without centring (Garrido et al., RankMe, arXiv:2210.02885). At most n.
        `std`: standard deviation of a channel, mean over channels. It is 0 when all features are the same.
        `covariance`: share of the covariance's energy off the diagonal, from 0 (uncorrelated channels) to 1 - 1/D
            (identical channels). VICReg (arXiv:2105.04906) minimises it.
        All are NaN if a feature is not finite.
    """
    x = features.detach().double()
    width = x.shape[1]
    ours = torch.cat((x.new_full((1,), len(x)), x.sum(0), (x.T @ x).flatten()))
    count, first, second = total(ours).split((1, width, width * width))
    second = second.view(width, width)

    # In double precision, since singular values are square roots: in single precision 0 would be 3e-4 of the largest.
    # A decomposition of non-finite numbers would raise, where the step is only skipped.
    is_finite = second.isfinite().all()
    rankme = second.new_tensor(torch.nan)
    if decompose:
        energies = torch.linalg.eigvalsh(torch.where(is_finite, second, 0.0)).clamp_min(0)
        sizes = energies.sqrt()
        shares = sizes / sizes.sum().clamp_min(torch.finfo(torch.float64).tiny)
        rankme = (-torch.special.xlogy(shares, shares).sum()).exp()

    mean = first / count
    covariance = second / count - torch.outer(mean, mean)
    variance = covariance.diagonal().clamp_min(0)
    energy = covariance.square().sum()
    return {
        "rankme": torch.where(is_finite, rankme, torch.nan).float(),
        "std": variance.sqrt().mean().float(),
        "covariance": (1 - variance.square().sum() / energy.clamp_min(torch.finfo(torch.float64).tiny)).float(),
    }


@torch.no_grad()
def drift(target: Iterable[Tensor], encoder: Iterable[Tensor], total: Total) -> Float[Tensor, ""]:
    """Return the distance between the weights of an average and of its network, relative to the norm of the network.

    A target that follows too closely makes predictions trivially true. A target that stays gives no new signal.

    Args:
        target: this rank's shards of the average.
        encoder: this rank's shards of the network, in the same order and sharding.
        total: sum over ranks. Replicated shards count several times in numerator and denominator alike.
    """
    ours, theirs = list(target), list(encoder)
    assert len(ours) == len(theirs)
    apart, length = (square_sum(tensors) for tensors in (differences(ours, theirs), theirs))
    apart, length = total(torch.stack((apart, length)))
    return (apart / length).sqrt().float()
