"""Planners find the optimum of a bowl inside the box, and depend on nothing but their draws."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from vjepa.planning.costs import HOLD, TIME_PRICE, cost_of
from vjepa.planning.draws import Draws, coloured
from vjepa.planning.planners import DEFAULT_EFFORT, PLANNERS, Box, Effort, PlannerName, stop_early
from vjepa_data.errors import BadInput

BOX = Box(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0]))
HORIZON = 6
EACH = pytest.mark.parametrize("name", list(PLANNERS))

LONG: dict[PlannerName, Effort] = {
    "cem": Effort(samples=200, elites=20, iterations=20, colour=0.0),
    "icem": Effort(samples=200, elites=20, iterations=20, colour=0.5),
    "mppi": Effort(samples=200, iterations=20, colour=0.0),
    "sampling": Effort(samples=100, iterations=40, colour=0.0),
    "adam": Effort(samples=4, elites=1, iterations=80),
}


def optimum(episode: int) -> Tensor:
    """Actions [H A] of least cost; some lie outside the box."""
    generator = torch.Generator().manual_seed(episode)
    return BOX.low + (1.2 * torch.rand(HORIZON, 2, generator=generator) - 0.1) * BOX.width


class Bowl:
    """A quadratic cost, 1 at the optimum of each episode, that records whether all actions were in the box."""

    def __init__(self, episodes: range) -> None:
        self.target = torch.stack([optimum(episode) for episode in episodes])[:, None]
        self.is_inside = True

    def __call__(self, plans: Tensor) -> Tensor:
        self.is_inside &= bool(((plans >= BOX.low) & (plans <= BOX.high)).all())
        squares = ((plans - self.target) / BOX.width).square().flatten(2)
        return 1 + squares.cumsum(-1)[..., -1]

    @property
    def least(self) -> Tensor:
        return self(BOX.clip(self.target))[:, 0]


def run(name: PlannerName, episodes: range, effort: Effort, *, seed: int = 0) -> tuple[Tensor, Bowl]:
    bowl = Bowl(episodes)
    start = torch.zeros(len(episodes), HORIZON, 2)
    return PLANNERS[name](bowl, start, BOX, Draws(seed, episodes, step=3), effort), bowl


@EACH
def test_a_planner_comes_within_a_percent_of_the_optimum(name: PlannerName):
    plans, bowl = run(name, range(4), LONG[name])
    assert (bowl(plans[:, None])[:, 0] <= 1.01 * bowl.least).all()
    assert bowl.is_inside, "an action outside the box was evaluated"


@EACH
def test_a_plan_does_not_depend_on_the_batch(name: PlannerName):
    effort = replace(DEFAULT_EFFORT[name], iterations=3)
    together, _ = run(name, range(16), effort)
    alone = torch.cat([run(name, range(e, e + 1), effort)[0] for e in range(16)])
    assert torch.equal(together, alone)
    assert not torch.equal(together, run(name, range(16), effort, seed=1)[0])


@EACH
@pytest.mark.parametrize("horizon", [1, 2])
def test_one_elite_and_a_horizon_of_one_step_work(name: PlannerName, horizon: int):
    effort = replace(DEFAULT_EFFORT[name], elites=1, iterations=3)
    start = torch.zeros(3, horizon, 2)
    plan = PLANNERS[name](lambda p: p.square().sum((-1, -2)), start, BOX, Draws(0, range(3), 0), effort)
    assert plan.shape == (3, horizon, 2)
    assert torch.equal(plan, BOX.clip(plan))


@EACH
def test_a_cost_that_is_not_a_number_is_never_chosen(name: PlannerName):
    def cost(plans: Tensor) -> Tensor:
        height = plans[..., 0, 0]
        return torch.where(height > 0.2, torch.nan, (height - 1).square())

    effort = DEFAULT_EFFORT[name]
    plan = PLANNERS[name](cost, torch.zeros(2, 3, 2), BOX, Draws(0, range(2), 0), effort)
    assert plan.isfinite().all()
    assert (plan[:, 0, 0] <= 0.2).all()


def test_adam_steps_its_optimizer():
    """A published planner built an Adam optimizer and then followed the plain gradient (jepa-wms, `AdamPlanner`)."""
    effort = Effort(samples=1, elites=1, iterations=2)
    target = torch.tensor([0.9, 1.0])
    steep = torch.tensor([1.0, 100.0])  # Adam's first step has the same length in all columns, a gradient step has not

    def cost(plans: Tensor) -> Tensor:
        return (steep * (plans - target).square()).sum((-1, -2))

    start = torch.tensor([[[0.0, 2.0]]])
    plan = PLANNERS["adam"](cost, start, BOX, Draws(0, [0], 0), effort)[0, 0]
    moved = (plan - start[0, 0]) / BOX.width
    assert torch.allclose(moved, torch.tensor([0.1, -0.1]), atol=0.005), "two steps of the learning rate"
    gradient = 2 * steep * (start[0, 0] - target) * BOX.width
    assert not torch.allclose(moved / moved.norm(), -gradient / gradient.norm(), atol=0.1)


def test_a_plan_that_passes_its_goal_stops_there():
    box = Box(torch.full((2,), -1.0), torch.ones(2))

    def cost(plans: Tensor) -> Tensor:
        return cost_of("min", (plans.cumsum(2) - goal).norm(dim=-1))

    plan = torch.tensor([[[1.0, 0.0], [0.5, 0.0], [0.0, 1.0], [-0.5, 0.0]]])
    goal = torch.tensor([1.5, 0.0])
    assert torch.equal(stop_early(cost, plan, box)[0], torch.cat((plan[0, :2], torch.zeros(2, 2))))
    goal = plan.sum(1)[0] + torch.tensor([0.1, 0.1])
    assert torch.equal(stop_early(cost, plan, box), plan), "every step brings it closer"


def test_more_elites_than_samples_are_refused():
    with pytest.raises(BadInput, match=r"elites \(9\) must be from 1 to the number of samples \(8\)"):
        Effort(samples=8, elites=9)


def test_coloured_noise_keeps_its_variance_and_gains_correlation():
    white = np.random.default_rng(0).standard_normal((20_000, 12, 1))
    red = coloured(white, exponent=2.0)
    assert abs(red.var(axis=0) - 1).max() < 0.05
    assert np.corrcoef(red[:, 0, 0], red[:, 1, 0])[0, 1] > 0.5


# Costs


def test_costs_are_their_formulas():
    distances = torch.tensor([[[3.0, 1.0, 2.0]]])
    assert cost_of("last", distances).item() == 2
    assert cost_of("sum", distances).item() == 2
    assert cost_of("min", distances).item() == pytest.approx(1 + TIME_PRICE * (3 + 1) + HOLD * 2)
    assert cost_of("temporal", distances).item() == pytest.approx(1 + 2 + HOLD * 2)


def test_a_plan_that_stays_costs_less_than_leaving_and_returning():
    stay, leave = cost_of("min", torch.tensor([[[0.1, 0.1, 0.1, 0.1], [2.0, 4.0, 2.0, 0.1]]]))[0]
    assert stay < leave
