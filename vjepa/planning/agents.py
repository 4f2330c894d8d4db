"""Agents: everything that chooses actions in a world, from the planner under test to the controls.

Letters: E episodes, X steps that are carried out, H steps of a plan, A columns of an action.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from vjepa.planning.costs import Cost
from vjepa.planning.draws import Draws
from vjepa.planning.planners import PLANNERS, Box, Effort, PlannerName, stop_early
from vjepa.planning.scoring import Scorer
from vjepa.planning.worlds import Simulator, View, World
from vjepa_data.errors import BadInput
from vjepa_data.rng import generator


@dataclass
class Counts:
    """Work of an agent so far."""

    plans: int = 0
    calls: int = 0
    """Steps of dynamics: one for each step of each plan that was evaluated."""


@runtime_checkable
class Agent(Protocol):
    """Chooses actions for episodes in lock step."""

    counts: Counts

    def act(self, view: View, step: int) -> Float[ndarray, "E X A"]:
        """Return the actions to carry out next, one step or several.

        Args:
            view: the episodes.
            step: steps that were carried out; 0 begins new episodes.
        """
        ...


class RandomAgent:
    """Uniform actions, each a function of (seed, episode, step)."""

    def __init__(self, world: World, *, seed: int) -> None:
        self.counts, self._world, self._seed = Counts(), world, seed

    def act(self, view: View, step: int) -> Float[ndarray, "E 1 A"]:
        """Draw an action for each episode."""
        low, high = self._world.low, self._world.high
        u = [generator(self._seed, "random agent", int(n), step).random(len(low)) for n in view.tasks.numbers]
        return (low + np.stack(u) * (high - low))[:, None]


class StraightAgent:
    """Towards the goal in a straight line, from true states."""

    def __init__(self, simulator: Simulator) -> None:
        self.counts, self._simulator = Counts(), simulator

    def act(self, view: View, step: int) -> Float[ndarray, "E 1 A"]:
        """Return the direction of each goal."""
        return self._simulator.straight(view.states, view.tasks.goals)[:, None]


@dataclass(frozen=True)
class Planning:
    """How to plan."""

    planner: PlannerName
    effort: Effort
    horizon: int
    """Steps of a plan, H."""

    execute: int
    """Steps that are carried out before the next plan, X."""

    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.execute <= self.horizon:
            raise BadInput(f"execute ({self.execute}) must be from 1 to the horizon ({self.horizon})")


class PlannerAgent:
    """Plans to the horizon, carries out the first steps, and plans again from the rest of the plan."""

    def __init__(
        self,
        scorer: Scorer,
        planning: Planning,
        *,
        low: Float[ndarray, " A"],
        high: Float[ndarray, " A"],
        device: torch.device | str = "cpu",
    ) -> None:
        """Args:
        scorer: dynamics and distance.
        planning: how to plan.
        low, high: bounds of the actions.
        device: device of the scorer.

        Raises:
            BadInput: a bound is infinite, or the planner needs a gradient that the scorer does not have.
        """
        if planning.planner == "adam" and not scorer.has_gradient:
            raise BadInput(
                "adam follows the gradient of the cost, and this cost has none; choose cem or another planner"
            )
        self.counts, self._scorer, self._planning = Counts(), scorer, planning
        self._device = torch.device(device)
        self._box = make_box(low, high, self._device)
        self._plans: Float[Tensor, "E H A"] | None = None
        self.last: tuple[Tensor, Tensor] | None = None
        """Plans [E N H A] that a search evaluated last, and their costs [E N]."""

    def act(self, view: View, step: int) -> Float[ndarray, "E X A"]:
        """Plan for each episode."""
        planning = self._planning
        draws = Draws(planning.seed, [int(n) for n in view.tasks.numbers], step, self._device)
        cost, start = self._counted(self._scorer.cost(view)), self._first_guess(len(view), step)
        found = PLANNERS[planning.planner](self._recorded(cost), start, self._box, draws, planning.effort)
        self._plans = stop_early(cost, found, self._box)
        self.counts.plans += len(view)
        return self._plans[:, : planning.execute].double().cpu().numpy()

    def _first_guess(self, episodes: int, step: int) -> Float[Tensor, "E H A"]:
        """Return the rest of the last plans, or the middle of the box."""
        planning = self._planning
        middle = (self._box.low + self._box.high) / 2
        rest = middle.expand(episodes, planning.horizon, -1)
        if self._plans is None or step == 0:
            return rest
        return torch.cat((self._plans[:, planning.execute :], rest[:, : planning.execute]), dim=1)

    def _counted(self, cost: Cost) -> Callable[[Tensor], Tensor]:
        def score(actions: Tensor) -> Tensor:
            self.counts.calls += actions.shape[:3].numel()
            return cost(actions)

        return score

    def _recorded(self, cost: Cost) -> Callable[[Tensor], Tensor]:
        def score(actions: Tensor) -> Tensor:
            costs = cost(actions)
            if actions.shape[1] > 1:  # not the mean alone, with which a planner may end
                self.last = actions.detach(), costs.detach()
            return costs

        return score


def make_box(low: ndarray, high: ndarray, device: torch.device) -> Box:
    """Return the box of a world's actions.

    Raises:
        BadInput: a bound is infinite, or no action is between the bounds.
    """
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise BadInput(f"actions need finite bounds, low below high, got {low.tolist()} to {high.tolist()}")
    return Box(*(torch.from_numpy(np.asarray(bound, np.float32)).to(device) for bound in (low, high)))
