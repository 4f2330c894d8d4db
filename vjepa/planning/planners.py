"""Planners: functions from a cost of actions to the best actions that were found.

    actions = cem(cost, start, box, draws, effort)

`cost` maps [E N H A] to [E N]. Every action that a planner evaluates or returns lies in the box. The result is the plan
of least cost among all that were evaluated, and the start is one of them. Episodes are planned together and do not
influence each other: everything random comes from `Draws`, and sums over samples are taken in order, because a sum in
parts depends on the shape of a batch.

Letters: E episodes, N samples, K elites, H steps of a plan, A columns of an action.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from vjepa.planning.costs import Cost
from vjepa.planning.draws import Draws
from vjepa_data.errors import BadInput

PlannerName = Literal["cem", "icem", "mppi", "sampling", "adam"]


@dataclass(frozen=True)
class Effort:
    """Computation of a planner, and width of its search. A planner ignores the fields that it does not name."""

    samples: int = 64
    """Random plans in an iteration. `adam`: random starts. Two more are evaluated: the first guess and rest."""

    elites: int = 8
    """Best plans of an iteration, to which `cem` and `icem` fit their distribution."""

    iterations: int = 5

    spread: float = 0.5
    """Standard deviation of the first samples, relative to the width of the box. `adam`: of its starts."""

    floor: float = 0.02
    """Least standard deviation of samples, relative to the width of the box."""

    colour: float = 2.0
    """Exponent of the noise over time. 0 is white noise."""

    temperature: float = 0.3
    """`mppi`: cost that lowers the weight of a plan by a factor e, in standard deviations of the cost."""

    decay: float = 0.8
    """`sampling`: factor of the standard deviation between iterations."""

    kept: float = 0.3
    """`icem`: share of the elites that the next iteration evaluates again in addition to its samples."""

    shrink: float = 1.25
    """`icem`: divisor of the number of samples between iterations, down to twice the elites."""

    step_size: float = 0.05
    """`adam`: learning rate, relative to the width of the box."""

    def __post_init__(self) -> None:
        if not 1 <= self.elites <= self.samples:
            raise BadInput(f"elites ({self.elites}) must be from 1 to the number of samples ({self.samples})")
        if self.iterations < 1:
            raise BadInput(f"iterations ({self.iterations}) must be at least 1")


DEFAULT_EFFORT: dict[PlannerName, Effort] = {
    "cem": Effort(spread=1.0),
    "icem": Effort(),
    "mppi": Effort(),
    "sampling": Effort(),
    "adam": Effort(samples=8, elites=1, iterations=40),
}
"""Default effort of each planner. Tuned by hand on two rooms. The first four evaluate 320 plans or fewer. With a
spread of 1 most first samples of `cem` have full speed along some axis, as a long detour needs."""


class Box(NamedTuple):
    """The least and the largest action."""

    low: Float[Tensor, " A"]
    high: Float[Tensor, " A"]

    @property
    def width(self) -> Float[Tensor, " A"]:
        """Width of the box along each column."""
        return self.high - self.low

    @property
    def middle(self) -> Float[Tensor, " A"]:
        """The action in the middle of the box, which is rest where actions are displacements or forces."""
        return (self.low + self.high) / 2

    def clip(self, actions: Float[Tensor, "*_ A"]) -> Float[Tensor, "*_ A"]:
        """Move actions to the nearest actions in the box."""
        return torch.minimum(torch.maximum(actions, self.low), self.high)


Planner = Callable[[Cost, Tensor, Box, Draws, Effort], Tensor]
"""(cost, first guess [E H A], box, draws, effort) to actions [E H A]."""


class _Best:
    """The best plan of each episode so far."""

    def __init__(self) -> None:
        self._plan: Tensor | None = None
        self._cost: Tensor | None = None

    def add(self, plans: Float[Tensor, "E N H A"], costs: Float[Tensor, "E N"]) -> None:
        """Compare with more plans. The earliest of equal plans stays. A cost that is not a number is never best."""
        costs = costs.nan_to_num(nan=torch.inf)
        lowest, number = costs.min(dim=1)
        plan = plans[torch.arange(len(plans), device=plans.device), number]
        if self._plan is None or self._cost is None:
            self._plan, self._cost = plan, lowest
            return
        is_better = lowest < self._cost
        self._plan = torch.where(is_better[:, None, None], plan, self._plan)
        self._cost = torch.where(is_better, lowest, self._cost)

    @property
    def plan(self) -> Float[Tensor, "E H A"]:
        assert self._plan is not None
        return self._plan


@torch.no_grad()
def cem(cost: Cost, start: Tensor, box: Box, draws: Draws, effort: Effort) -> Tensor:
    """Fit a normal distribution to the best samples, again and again (cross-entropy method)."""
    return _cross_entropy(cost, start, box, draws, replace(effort, kept=0.0, shrink=1.0))


@torch.no_grad()
def icem(cost: Cost, start: Tensor, box: Box, draws: Draws, effort: Effort) -> Tensor:
    """Sample with coloured noise, keep some elites, and sample less from iteration to iteration (arXiv:2008.06389)."""
    return _cross_entropy(cost, start, box, draws, effort)


def _cross_entropy(cost: Cost, start: Tensor, box: Box, draws: Draws, effort: Effort) -> Tensor:
    best, mean = _Best(), box.clip(start)
    std = (effort.spread * box.width).expand_as(mean)
    kept = _guesses(mean, box)  # later the mean and the elites that are kept
    for iteration in range(effort.iterations):
        count = max(2 * effort.elites, round(effort.samples / effort.shrink**iteration))
        plans = _samples(mean, std, box, draws, effort, iteration, count=min(count, effort.samples))
        plans = torch.cat((kept, plans), dim=1)
        costs = cost(plans)
        best.add(plans, costs)
        elites = _lowest(plans, costs, effort.elites)
        mean = _ordered_sum(elites) / effort.elites
        variance = _ordered_sum((elites - mean[:, None]).square()) / effort.elites
        std = torch.maximum(variance.sqrt(), effort.floor * box.width)
        kept = torch.cat((mean[:, None], elites[:, : int(effort.kept * effort.elites)]), dim=1)
    best.add(mean[:, None], cost(mean[:, None]))
    return best.plan


@torch.no_grad()
def mppi(cost: Cost, start: Tensor, box: Box, draws: Draws, effort: Effort) -> Tensor:
    """Average all samples with weights exp(-cost / temperature), the cost in standard deviations of the samples'.

    The standard deviation of the samples follows the same weights. Source: arXiv:1509.01149, with weights on a cost
    without unit, as a temperature that does not fit the cost picks a single sample or averages all.
    """
    best, mean = _Best(), box.clip(start)
    std = (effort.spread * box.width).expand_as(mean)
    for iteration in range(effort.iterations):
        plans = torch.cat((_guesses(mean, box), _samples(mean, std, box, draws, effort, iteration)), dim=1)
        costs = cost(plans)
        best.add(plans, costs)
        weights = _weights(costs, effort.temperature)[..., None, None]
        mean = box.clip(_ordered_sum(weights * plans))
        variance = _ordered_sum(weights * (plans - mean[:, None]).square())
        std = torch.maximum(variance.sqrt(), effort.floor * box.width)
    best.add(mean[:, None], cost(mean[:, None]))
    return best.plan


@torch.no_grad()
def sampling(cost: Cost, start: Tensor, box: Box, draws: Draws, effort: Effort) -> Tensor:
    """Take the best of samples around the best plan so far (predictive sampling, arXiv:2212.00541)."""
    best, centre = _Best(), box.clip(start)
    for iteration in range(effort.iterations):
        std = (effort.spread * effort.decay**iteration * box.width).expand_as(centre)
        plans = torch.cat((_guesses(centre, box), _samples(centre, std, box, draws, effort, iteration)), dim=1)
        best.add(plans, cost(plans))
        centre = best.plan
    return centre


def adam(cost: Cost, start: Tensor, box: Box, draws: Draws, effort: Effort) -> Tensor:
    """Follow the gradient of the cost with Adam, from several starts. Each update ends in the box."""
    best, mean = _Best(), box.clip(start)
    std = (effort.spread * box.width).expand_as(mean)
    starts = _samples(mean, std, box, draws, effort, 0, count=effort.samples)
    plans = torch.cat((_guesses(mean, box), starts), dim=1)
    scaled = ((plans - box.low) / box.width).requires_grad_()  # a step has the same meaning in all columns
    optimizer = torch.optim.Adam([scaled], lr=effort.step_size)
    for _ in range(effort.iterations):
        with torch.enable_grad():
            plans = box.clip(box.low + scaled * box.width)
            costs = cost(plans)
            (scaled.grad,) = torch.autograd.grad(costs.sum(), scaled)
        best.add(plans.detach(), costs.detach())
        optimizer.step()
        with torch.no_grad():
            scaled.clamp_(0, 1)
    with torch.no_grad():
        plans = box.clip(box.low + scaled * box.width)
        best.add(plans, cost(plans))
    return best.plan


PLANNERS: dict[PlannerName, Planner] = {
    "cem": cem,
    "icem": icem,
    "mppi": mppi,
    "sampling": sampling,
    "adam": adam,
}
assert tuple(PLANNERS) == get_args(PlannerName)


@torch.no_grad()
def stop_early(cost: Cost, plan: Float[Tensor, "E H A"], box: Box) -> Float[Tensor, "E H A"]:
    """Return the plan of least cost among a plan and those that follow it for some steps and rest from then on.

    Random samples hardly ever rest, so a search ends with plans that arrive and move on.
    """
    steps = torch.arange(plan.shape[1], device=plan.device)
    goes_on = (steps <= steps[:, None])[..., None]  # row n follows the plan for n + 1 steps, the last row to its end
    plans = torch.where(goes_on, plan[:, None], box.middle)
    best = _Best()
    best.add(plans.flip(1), cost(plans.flip(1)))
    return best.plan


def _guesses(mean: Float[Tensor, "E H A"], box: Box) -> Float[Tensor, "E N H A"]:
    """Return a plan and rest: random samples hardly ever propose to stay."""
    return torch.stack((mean, box.middle.expand_as(mean)), dim=1)


def _samples(
    mean: Float[Tensor, "E H A"],
    std: Float[Tensor, "E H A"],
    box: Box,
    draws: Draws,
    effort: Effort,
    iteration: int,
    *,
    count: int | None = None,
) -> Float[Tensor, "E N H A"]:
    """Return normal samples in the box."""
    noise = draws.normal(
        iteration,
        samples=effort.samples if count is None else count,
        horizon=mean.shape[1],
        actions=mean.shape[2],
        colour=effort.colour,
    )
    return box.clip(mean[:, None] + std[:, None] * noise)


def _lowest(plans: Float[Tensor, "E N H A"], costs: Float[Tensor, "E N"], count: int) -> Float[Tensor, "E K H A"]:
    """Return the plans of least cost, best first. Of equal plans the earlier is first. NaN counts as infinite."""
    order = costs.nan_to_num(nan=torch.inf).argsort(dim=1, stable=True)[:, :count]
    return plans[torch.arange(len(plans), device=plans.device)[:, None], order]


def _weights(costs: Float[Tensor, "E N"], temperature: float) -> Float[Tensor, "E N"]:
    """Return weights that sum to 1, of a cost in units of its standard deviation."""
    exact = costs.double()  # rounded to fp32 at the end, so that the last bits of `exp` do not matter
    is_finite = exact.isfinite()
    exact = torch.where(is_finite, exact, 0.0)
    count = is_finite.sum(1, keepdim=True).clamp_min(1)
    mean = exact.cumsum(1)[:, -1:] / count
    variance = torch.where(is_finite, (exact - mean).square(), 0.0).cumsum(1)[:, -1:] / count
    lowest = torch.where(is_finite, exact, torch.inf).amin(1, keepdim=True)
    raised = (exact - torch.where(lowest.isfinite(), lowest, 0.0)) / (temperature * variance.sqrt()).clamp_min(1e-30)
    raw = torch.where(is_finite, torch.exp(-raised), 0.0)
    total = raw.cumsum(1)[:, -1:]
    return torch.where(total > 0, raw / total, 1 / costs.shape[1]).float()


def _ordered_sum(values: Float[Tensor, "E N *rest"]) -> Float[Tensor, "E *rest"]:
    """Sum over dimension 1 from the first to the last, whatever the size of the batch."""
    return values.cumsum(1)[:, -1]
