"""A trained model as a policy: frames and a picture of the goal in, an action out.

    policy = Policy(vjepa.load("runs/lewm_two_room"), low=[-0.078, -0.078], high=[0.078, 0.078])
    action = policy.act(frame, goal)

Letters: T frames, P Q height and width in pixels, A columns of an action.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray

from vjepa.planning.agents import PlannerAgent, Planning
from vjepa.planning.costs import CostName
from vjepa.planning.planners import DEFAULT_EFFORT, Effort, PlannerName
from vjepa.planning.scoring import LearnedScorer, device_of
from vjepa.planning.worlds import Tasks, View
from vjepa.weights.world_model import WorldModel
from vjepa_data.errors import BadInput


class Policy:
    """Plans with a model, carries out the first steps of the plan, and plans again."""

    def __init__(
        self,
        model: WorldModel,
        *,
        low: Sequence[float] | Float[ndarray, " A"],
        high: Sequence[float] | Float[ndarray, " A"],
        planner: PlannerName = "cem",
        cost: CostName = "min",
        effort: Effort | None = None,
        horizon: int = 20,
        execute: int = 4,
        seed: int = 0,
    ) -> None:
        """Args:
        model: a model with a dynamics predictor, on any device.
        low, high: bounds of the actions, which no action leaves.
        planner, cost: the search for actions, and the cost of a plan. `temporal` needs a network of its own.
        effort: how much to compute. By default as the planner was tuned.
        horizon: steps of a plan.
        execute: steps that are carried out before the next plan.
        seed: seed of all draws. Equal calls give equal actions.

        Raises:
            BadInput: the model cannot plan, a bound is infinite, or a number does not fit.
        """
        if cost == "temporal":
            raise BadInput("a policy has no network for the cost temporal; give min, sum or last")
        self._model, self._execute = model, execute
        planning = Planning(planner, effort or DEFAULT_EFFORT[planner], horizon, execute, seed)
        self._agent = PlannerAgent(
            LearnedScorer(model, cost), planning, low=np.asarray(low), high=np.asarray(high), device=device_of(model)
        )
        self.reset()

    def reset(self, episode: int = 0) -> None:
        """Begin an episode: forget the plan. Its number separates its draws from the draws of other episodes."""
        self._episode, self._step, self._queue = episode, 0, []

    def act(
        self, frames: UInt8[ndarray, "P Q 3"] | UInt8[ndarray, "T P Q 3"], goal: UInt8[ndarray, "P Q 3"]
    ) -> Float[ndarray, " A"]:
        """Return the next action.

        Args:
            frames: the current frame, or the frames so far, of which the last is used.
            goal: the frame to reach.

        Raises:
            BadInput: a picture is not uint8, or has another size than the model's clips.
        """
        frame = frames if frames.ndim == 3 else frames[-1]
        px = self._model.px
        for name, picture in (("frame", frame), ("goal", goal)):
            if picture.shape != (px, px, 3) or picture.dtype != np.uint8:
                raise BadInput(
                    f"the {name} is {picture.dtype} {list(picture.shape)}, and this model takes uint8 [{px}, {px}, 3]"
                )
        if not self._queue:
            nothing = np.zeros((1, 0))
            tasks = Tasks(np.array([self._episode]), nothing, nothing, nothing)
            view = View(frame[None], goal[None], tasks, nothing, np.zeros(1))
            self._queue = list(self._agent.act(view, self._step)[0])
        self._step += 1
        return self._queue.pop(0)
