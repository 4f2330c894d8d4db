"""Whether features still say something: numbers that fall, or rise, when a model collapses. Its loss does not tell.

All are tensors on the device. Over ranks they are those of all features together, by one sum over ranks of
`1 + D + D * D` numbers, and then a decomposition that the host waits for. So they belong to every hundredth step or so,
not to every step.

Letters: n features, D channels.
"""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

Total = Callable[[Tensor], Tensor]
"""Sum over ranks: `World.sum`, or the identity on one."""


def monitor(features: Float[Tensor, "n D"], total: Total) -> dict[str, Float[Tensor, ""]]:
    """Measure the variety of features.

    Args:
        features: of this rank, at least two over all ranks: pooled over a clip (they tell whether clips differ) or
            tokens (they may differ by their place alone, when all else is lost).
        total: sum over ranks.

    Returns:
        `rankme`: how many directions features use, from 1 (collapsed) to D; exp of the entropy of singular values,
            as shares of their sum, without centring (Garrido et al., RankMe, arXiv:2210.02885). At most n.
        `std`: standard deviation of a channel, mean over channels; 0 when all features are the same.
        `covariance`: share of the covariance's energy off its diagonal, from 0 (channels tell different things) to
            1 - 1/D (they all tell the same). What VICReg (arXiv:2105.04906) presses down.
        All are NaN if a feature is not finite.
    """
    x = features.detach().double()
    width = x.shape[1]
    ours = torch.cat((x.new_full((1,), len(x)), x.sum(0), (x.T @ x).flatten()))
    count, first, second = total(ours).split((1, width, width * width))
    second = second.view(width, width)

    # In double precision, since singular values are roots: in single, what is 0 would come out as 3e-4 of the largest.
    # A decomposition of what is not finite would be an error, where the step is only skipped.
    is_finite = second.isfinite().all()
    energies = torch.linalg.eigvalsh(torch.where(is_finite, second, 0.0)).clamp_min(0)
    sizes = energies.sqrt()
    shares = sizes / sizes.sum().clamp_min(torch.finfo(torch.float64).tiny)
    entropy = -torch.special.xlogy(shares, shares).sum()

    mean = first / count
    covariance = second / count - torch.outer(mean, mean)
    variance = covariance.diagonal().clamp_min(0)
    energy = covariance.square().sum()
    return {
        "rankme": torch.where(is_finite, entropy.exp(), torch.nan).float(),
        "std": variance.sqrt().mean().float(),
        "covariance": (1 - variance.square().sum() / energy.clamp_min(torch.finfo(torch.float64).tiny)).float(),
    }


@torch.no_grad()
def drift(target: Iterable[Tensor], encoder: Iterable[Tensor], total: Total) -> Float[Tensor, ""]:
    """How far the target's weights are from the encoder's, as a share of the encoder's length.

    A target that follows too closely makes its own guesses come true; one that does not follow teaches nothing.

    Args:
        target: this rank's part of its parameters, in any cut, as long as it is the same for both.
        encoder: this rank's part of the encoder's, in the same order.
        total: sum over ranks; parts that several ranks hold count several times, above and below the line.
    """
    pairs = list(zip(target, encoder, strict=True))
    apart = torch.stack([(a.double() - b.double()).square().sum() for a, b in pairs]).sum()
    length = torch.stack([b.double().square().sum() for _, b in pairs]).sum()
    apart, length = total(torch.stack((apart, length)))
    return (apart / length).sqrt().float()
