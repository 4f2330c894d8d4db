"""Scores of plans: dynamics predict what follows, a distance compares it with the goal.

                      distance of states             distance of latents
    true dynamics     the oracle                     encoder and distance alone: states are rendered and encoded
    learned dynamics  the predictor alone: states    the planner that needs no state
                      are read from latents

The last bits of a matrix product may depend on the shape of its batch, and so would plans. On a CPU frames are encoded
one by one, and plans are computed by `RowWise`. The true dynamics treat rows elementwise.

Letters: E episodes, N samples, R plans of all episodes, H steps of a plan, S columns of a state, A columns of an
action, P height and width in pixels, h w rows and columns of a latent, D channels of a latent.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from vjepa.nn.latent_dynamics import LatentDynamics
from vjepa.planning.costs import Cost, CostName, cost_of
from vjepa.planning.rows import RowWise
from vjepa.planning.worlds import Simulator, Tasks, View
from vjepa.weights.world_model import WorldModel
from vjepa_data.errors import BadInput

LatentDistance = Callable[[Tensor, Tensor], Tensor]
"""Latents [R H h w D] and goals [R h w D] to distances [R H]."""


@runtime_checkable
class Scorer(Protocol):
    """Makes the cost of plans that begin at a view."""

    has_gradient: bool

    def cost(self, view: View) -> Cost:
        """Return the cost of plans from the current frames. That of an episode is the same in any company, on a CPU."""
        ...


def squared_error(latents: Float[Tensor, "R H h w D"], goals: Float[Tensor, "R h w D"]) -> Float[Tensor, "R H"]:
    """Return the mean squared difference of latents."""
    return (latents - goals[:, None]).square().mean((-1, -2, -3))


class OracleScorer:
    """True dynamics and true distance."""

    has_gradient = False

    def __init__(self, simulator: Simulator, cost: CostName) -> None:
        self._simulator = simulator
        self._cost: CostName = cost

    def cost(self, view: View) -> Cost:
        """Return the cost of plans from the current states."""
        states, tasks = view.states, view.tasks

        def score(actions: Tensor) -> Tensor:
            futures, spread = simulate_plans(self._simulator, states, tasks, actions)
            flat = self._simulator.distance(futures.reshape(-1, futures.shape[-1]), spread.goals)
            return cost_of(self._cost, torch.from_numpy(flat).view(actions.shape[:3])).to(actions.device)

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

    has_gradient = True

    def __init__(self, model: WorldModel, cost: CostName, distance: LatentDistance = squared_error) -> None:
        check_model(model)
        self.model = model
        self._cost: CostName = cost

        def after_steps(now: Tensor, goals: Tensor, actions: Tensor) -> Tensor:
            return distance(model.rollout_from(now[:, None], actions), goals)

        self._after_steps = RowWise(after_steps, tokens=tokens_of(model))

    def cost(self, view: View) -> Cost:
        """Return the cost of plans from the current frames."""
        return self.cost_of_latents(*encode(self.model, view.frames, view.goals))

    def cost_of_latents(self, now: Float[Tensor, "E h w D"], goals: Float[Tensor, "E h w D"]) -> Cost:
        """Return the cost of plans from latents."""

        def score(actions: Tensor) -> Tensor:
            shape = actions.shape[:3]
            distances = self._after_steps(*_per_plan(shape[1], now, goals), actions.flatten(0, 1))
            return cost_of(self._cost, distances.view(shape))

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

    has_gradient = False

    def __init__(
        self, model: WorldModel, simulator: Simulator, cost: CostName, distance: LatentDistance = squared_error
    ) -> None:
        self.model, self._simulator = model, simulator
        self._cost: CostName = cost
        self._distance = RowWise(
            lambda frames, goals: distance(model.latents(frames[:, None]), goals)[:, 0], tokens=frame_tokens(model)
        )

    def cost(self, view: View) -> Cost:
        """Return the cost of plans from the current states."""
        (goals,) = encode(self.model, view.goals)
        alone = [view.take(slice(e, e + 1)) for e in range(len(view))]  # the frames of all plans need much memory

        def score(actions: Tensor) -> Tensor:
            found = []
            for row, one in enumerate(alone):
                futures, spread = simulate_plans(self._simulator, one.states, one.tasks, actions[row : row + 1])
                frames = self._simulator.render(futures.reshape(len(spread), -1), spread.layouts, self.model.px)
                pixels = torch.from_numpy(frames).to(goals.device)
                found.append(self._distance(pixels, *_per_plan(len(frames), goals[row : row + 1])))
            return cost_of(self._cost, torch.stack(found).view(actions.shape[:3]))

        return score


class TrueDistanceScorer:
    """Learned dynamics and true distance: states are read from predicted latents."""

    has_gradient = False

    def __init__(
        self, model: WorldModel, simulator: Simulator, cost: CostName, readout: Callable[[Tensor], Tensor]
    ) -> None:
        self.model, self._simulator = model, simulator
        self._cost: CostName = cost
        self._states = RowWise(
            lambda now, actions: readout(model.rollout_from(now[:, None], actions)), tokens=tokens_of(model)
        )

    def cost(self, view: View) -> Cost:
        """Return the cost of plans from the current frames."""
        (now,) = encode(self.model, view.frames)
        goals = view.tasks.goals

        def score(actions: Tensor) -> Tensor:
            shape = actions.shape[:3]
            states = self._states(*_per_plan(shape[1], now), actions.flatten(0, 1)).double().cpu().numpy()
            rows = np.arange(len(goals)).repeat(shape[1] * shape[2])
            flat = self._simulator.distance(states.reshape(len(rows), -1), goals[rows])
            return cost_of(self._cost, torch.from_numpy(flat).view(shape)).to(actions.device)

        return score


def _per_plan(plans: int, *latents: Float[Tensor, "E h w D"]) -> list[Float[Tensor, "R h w D"]]:
    """Repeat the latents of each episode for each of its plans."""
    return [each.repeat_interleave(plans, dim=0) for each in latents]


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
        pixels = torch.from_numpy(np.require(given, requirements=["C", "W"])).to(device)[:, None]
        parts = pixels.split(1 if alone and device.type == "cpu" else len(pixels))
        return torch.cat([model.latents(part)[:, 0] for part in parts])

    return tuple(latents(given) for given in frames)


def frame_tokens(model: WorldModel) -> int:
    """Return the tokens of a frame in the encoder."""
    return (model.px // model.model.patch_px) ** 2


def tokens_of(model: WorldModel) -> int:
    """Return the tokens of a latent."""
    return 1 if isinstance(model.parts["dynamics"], LatentDynamics) else frame_tokens(model)


def device_of(model: WorldModel) -> torch.device:
    """Return the device of a model."""
    return next(model.parameters()).device
