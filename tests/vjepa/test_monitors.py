"""Monitors against their definitions, and over ranks."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vjepa.monitoring.collapse import drift, monitor


def alone(x: Tensor) -> Tensor:
    return x


def features(n: int = 400, width: int = 12) -> Tensor:
    """Correlated channels with a mean."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(n, width, generator=generator) @ mixing + torch.randn(width, generator=generator)


def test_rankme_is_that_of_the_singular_values() -> None:
    x = features()
    sizes = torch.linalg.svdvals(x.double())
    shares = sizes / sizes.sum()
    expected = (-(shares * shares.log()).sum()).exp()
    assert monitor(x, alone)["rankme"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_spread_and_covariance_are_those_of_the_definition() -> None:
    x = features()
    seen = monitor(x, alone)
    assert seen["std"].item() == pytest.approx(x.std(0, correction=0).mean().item(), rel=1e-5)
    covariance = torch.cov(x.T, correction=0)
    off = covariance - covariance.diagonal().diag()
    expected = off.square().sum() / covariance.square().sum()
    assert seen["covariance"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "rankme", "std", "covariance"),
    [
        (lambda: torch.randn(20000, 16, generator=torch.Generator().manual_seed(0)), 16.0, 1.0, 0.0),
        (lambda: torch.randn(16).expand(100, 16), 1.0, 0.0, 0.0),  # all the same
        (lambda: torch.linspace(-1, 1, 101)[:, None].expand(101, 16), 1.0, 0.583, 15 / 16),  # one direction
        (lambda: torch.zeros(100, 16), 1.0, 0.0, None),
    ],
)
def test_collapse_shows(make: Callable[[], Tensor], rankme: float, std: float, covariance: float | None) -> None:
    seen = monitor(make(), alone)
    assert seen["rankme"].item() == pytest.approx(rankme, rel=0.02)
    assert seen["std"].item() == pytest.approx(std, abs=0.02)
    if covariance is not None and std:
        assert seen["covariance"].item() == pytest.approx(covariance, abs=0.01)
    assert all(torch.isfinite(value) for value in seen.values())


def test_features_that_are_not_finite_are_no_error() -> None:
    x = features()
    x[3, 2] = torch.inf
    assert all(torch.isnan(value) for value in monitor(x, alone).values())


def test_monitors_over_ranks_equal_monitors_of_all_features() -> None:
    """Two uneven ranks whose sums are added."""
    x = features()
    sent: list[Tensor] = []

    def keep(mine: Tensor) -> Tensor:
        sent.append(mine)
        return mine

    monitor(x[:150], keep)
    together = monitor(x[150:], lambda mine: mine + sent[0])
    for name, value in monitor(x, alone).items():
        torch.testing.assert_close(together[name], value, rtol=1e-6, atol=0)


def test_half_precision_features_are_measured_in_double() -> None:
    x = features().bfloat16()
    for name, value in monitor(x.double(), alone).items():
        torch.testing.assert_close(monitor(x, alone)[name], value)


def test_only_one_rank_decomposes() -> None:
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    whole, part = monitor(features, lambda x: x), monitor(features, lambda x: x, decompose=False)
    assert part["rankme"].isnan()
    assert {name: part[name] for name in ("std", "covariance")} == {name: whole[name] for name in ("std", "covariance")}


def test_drift_is_the_distance_of_weights() -> None:
    encoder = torch.nn.Linear(3, 4)
    target = copy.deepcopy(encoder)
    assert drift(target.parameters(), encoder.parameters(), alone).item() == 0.0
    with torch.no_grad():
        for parameter in target.parameters():
            parameter *= 1.01
    assert drift(target.parameters(), encoder.parameters(), alone).item() == pytest.approx(0.01, rel=1e-4)
    replicated = drift(target.parameters(), encoder.parameters(), lambda x: 2 * x)
    assert replicated.item() == pytest.approx(0.01, rel=1e-4)
