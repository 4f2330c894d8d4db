"""Scores of plans: dynamics predict what follows, a distance compares it with the goal.

                      distance of states             distance of latents
    true dynamics     the oracle                     encoder and distance alone: states are rendered and encoded
    learned dynamics  the predictor alone: states    the planner that needs no state
                      are read from latents

The last bits of a matrix product may depend on the shape of its batch, and so would plans. On a CPU frames are encoded
one by one, and `PlannerAgent` plans episodes together only where it has measured that their costs are the same alone.
The true dynamics treat rows elementwise and compute all episodes together.

Letters: E episodes, N samples, H steps of a plan, S columns of a state, A columns of an action, P height and width in
pixels, h w rows and columns of a latent, D channels of a latent.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from vjepa.planning.costs import Cost, CostName, cost_of
from vjepa.planning.worlds import Simulator, Tasks, View
from vjepa.weights.world_model import WorldModel
from vjepa_data.errors import BadInput

LatentDistance = Callable[[Tensor, Tensor], Tensor]
"""Latents [E N H h w D] and goals [E h w D] to distances [E N H]."""


@runtime_checkable
class Scorer(Protocol):
    """Makes the cost of plans that begin at a view."""

    is_elementwise: bool
    """Whether the cost of an episode is the same bit by bit in any company."""

    has_gradient: bool

    def cost(self, view: View) -> Cost:
        """Return the cost of plans from the current frames."""
        ...


def squared_error(latents: Float[Tensor, "E N H h w D"], goals: Float[Tensor, "E h w D"]) -> Float[Tensor, "E N H"]:
    """Return the mean squared difference of latents."""
    return (latents - goals[:, None, None]).square().mean((-1, -2, -3))


class OracleScorer:
    """True dynamics and true distance."""

    is_elementwise, has_gradient = True, False

    def __init__(self, simulator: Simulator, cost: CostName) -> None:
        self._simulator = simulator
        self._cost: CostName = cost

    def cost(self, view: View) -> Cost:
        """Return the cost of plans from the current states."""
        states, tasks, start = view.states, view.tasks, torch.from_numpy(view.distance)

        def score(actions: Tensor) -> Tensor:
            futures, spread = simulate_plans(self._simulator, states, tasks, actions)
            flat = self._simulator.distance(futures.reshape(-1, futures.shape[-1]), spread.goals)
            return cost_of(self._cost, torch.from_numpy(flat).view(actions.shape[:3]), start).to(actions.device)

        return score


def simulate_plans(
    simulator: Simulator, states: Float[ndarray, "E S"], tasks: Tasks, actions: Float[Tensor, "E N H A"]
) -> tuple[Float[ndarray, "E N H S"], Tasks]:
    """Return the true states after each step of each plan, and the task of each of these states."""
    episodes, samples, horizon, _ = actions.shape
    given = actions.double().cpu().numpy().reshape(episodes * samples, horizon, -1)
    rows = np.arange(episodes).repeat(samples)
    now, layouts, futures = states[rows], tasks.layouts[rows], []
    for step in range(horizon):
        now = simulator.step(now, given[:, step], layouts)
        futures.append(now)
    found = np.stack(futures, axis=1).reshape(episodes, samples, horizon, -1)
    return found, tasks.take(rows.repeat(horizon))


class LearnedScorer:
    """Learned dynamics and a distance of latents."""

    is_elementwise, has_gradient = False, True

    def __init__(self, model: WorldModel, cost: CostName, distance: LatentDistance = squared_error) -> None:
        check_model(model)
        self.model, self._distance = model, distance
        self._cost: CostName = cost

    def cost(self, view: View) -> Cost:
        """Return the cost of plans from the current frames."""
        return self.cost_of_latents(*encode(self.model, view.frames, view.goals))

    def cost_of_latents(self, now: Float[Tensor, "E h w D"], goals: Float[Tensor, "E h w D"]) -> Cost:
        """Return the cost of plans from latents."""
        start = self._distance(now[:, None, None], goals)[:, 0, 0]

        def score(actions: Tensor) -> Tensor:
            return cost_of(self._cost, self._distance(predict(self.model, now, actions), goals), start)

        return score


class ShuffledScorer(LearnedScorer):
    """A control: every plan gets the cost of another, so a planner that uses its actions must fail."""

    has_gradient = False

    def cost_of_latents(self, now: Float[Tensor, "E h w D"], goals: Float[Tensor, "E h w D"]) -> Cost:
        """Return the cost of plans from latents, moved by one plan."""
        score = super().cost_of_latents(now, goals)
        return lambda actions: score(actions).roll(1, dims=1)


class TrueDynamicsScorer:
    """True dynamics and a distance of latents: every true state is rendered and encoded."""

    is_elementwise, has_gradient = False, False

    def __init__(
        self, model: WorldModel, simulator: Simulator, cost: CostName, distance: LatentDistance = squared_error
    ) -> None:
        self.model, self._simulator, self._distance = model, simulator, distance
        self._cost: CostName = cost

    def cost(self, view: View) -> Cost:
        """Return the cost of plans from the current states."""
        now, goals = encode(self.model, view.frames, view.goals)
        states, tasks = view.states, view.tasks
        start = self._distance(now[:, None, None], goals)[:, 0, 0]

        def score(actions: Tensor) -> Tensor:
            futures, spread = simulate_plans(self._simulator, states, tasks, actions)
            frames = self._simulator.render(futures.reshape(len(spread), -1), spread.layouts, self.model.px)
            latents = encode(self.model, frames, alone=False)[0].unflatten(0, actions.shape[:3])
            return cost_of(self._cost, self._distance(latents, goals), start)

        return score


class TrueDistanceScorer:
    """Learned dynamics and true distance: states are read from predicted latents."""

    is_elementwise, has_gradient = False, False

    def __init__(
        self, model: WorldModel, simulator: Simulator, cost: CostName, readout: Callable[[Tensor], Tensor]
    ) -> None:
        self.model, self._simulator, self._readout = model, simulator, readout
        self._cost: CostName = cost

    def cost(self, view: View) -> Cost:
        """Return the cost of plans from the current frames."""
        (now,) = encode(self.model, view.frames)
        goals, start = view.tasks.goals, torch.from_numpy(view.distance)

        def score(actions: Tensor) -> Tensor:
            states = self._readout(predict(self.model, now, actions)).double().cpu().numpy()
            rows = np.arange(len(goals)).repeat(actions.shape[1] * actions.shape[2])
            flat = self._simulator.distance(states.reshape(len(rows), -1), goals[rows])
            return cost_of(self._cost, torch.from_numpy(flat).view(actions.shape[:3]), start).to(actions.device)

        return score


# The model


def check_model(model: WorldModel) -> None:
    """Check that a model can be planned with.

    Raises:
        BadInput: it has no dynamics predictor, or reads states beside actions.
    """
    if "rollout" not in model.capabilities:
        raise BadInput(
            f"a planner needs a model that predicts under actions, and this one can {', '.join(model.capabilities)}; "
            "load a model trained by lewm or dynamics"
        )
    if getattr(model.parts["dynamics"], "states", 0):
        raise BadInput(
            "this model reads a state beside each action, which a planner does not know ahead; train without "
            "objective.state"
        )


@torch.no_grad()
def encode(model: WorldModel, *frames: ndarray, alone: bool = True) -> tuple[Float[Tensor, "E h w D"], ...]:
    """Return the latents of each array of frames [E P P 3].

    Args:
        model: the encoder.
        frames: arrays of frames.
        alone: on a CPU, encode each frame by itself.
    """
    device = device_of(model)

    def latents(given: ndarray) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(given)).to(device)[:, None]
        parts = pixels.split(1 if alone and device.type == "cpu" else len(pixels))
        return torch.cat([model.latents(part)[:, 0] for part in parts])

    return tuple(latents(given) for given in frames)


def predict(
    model: WorldModel, now: Float[Tensor, "E h w D"], actions: Float[Tensor, "E N H A"]
) -> Float[Tensor, "E N H h w D"]:
    """Return the latents after each step of each plan."""
    episodes, samples = actions.shape[:2]
    latents = now[:, None].expand(-1, samples, -1, -1, -1).flatten(0, 1)[:, None]  # [EN 1 h w D]
    return model.rollout_from(latents, actions.flatten(0, 1)).unflatten(0, (episodes, samples))


def device_of(model: WorldModel) -> torch.device:
    """Return the device of a model."""
    return next(model.parameters()).device
