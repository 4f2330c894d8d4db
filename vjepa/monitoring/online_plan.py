"""Planning during training: the success of a fixed planner on fixed tasks, with the weights of the moment."""

import torch

from vjepa.config import OnlinePlan, Run
from vjepa.distributed.world import World
from vjepa.methods.base import Networks
from vjepa.monitoring.online_model import copy_model
from vjepa.planning.agents import PlannerAgent, Planning
from vjepa.planning.evaluation import check_fit, effort_of
from vjepa.planning.harness import GROUP, draw_tasks, play
from vjepa.planning.scoring import LearnedScorer
from vjepa.planning.worlds import make_world
from vjepa_data.errors import BadInput

HORIZON, EXECUTE, BUDGET = 20, 5, 40


class PlanRunner:
    """Plays tasks with the trained networks."""

    def __init__(self, settings: OnlinePlan, run: Run, world: World, networks: Networks) -> None:
        """Draw the tasks.

        Raises:
            BadInput: the world is unknown or does not fit, or the method has no dynamics predictor.
        """
        if "dynamics" not in networks.trained:
            raise BadInput(
                f"track.plan needs a dynamics predictor, which objective {run.objective.name} does not train"
            )
        self.settings, self._run, self._world, self._networks = settings, run, world, networks
        self._place = make_world(settings.world)
        check_fit(self._place, channels=getattr(run.objective, "action_channels", 0), fps=run.data.clip.fps)
        self._tasks = draw_tasks(
            self._place, episodes=settings.episodes, seed=run.seed, layout=settings.layout, budget=BUDGET
        ).groups[GROUP]

    def is_due(self, step: int) -> bool:
        """Return whether planning is due after `step` updates."""
        return step % self.settings.every_steps == 0

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Play all tasks on the first rank. All ranks must call it together, to gather sharded weights.

        Returns:
            `plan/success` and `plan/held`, shares of the tasks. Empty on other ranks.
        """
        model = copy_model(self._run, self._world, self._networks)
        if model is None:
            return {}
        run, settings, place = self._run, self.settings, self._place
        effort = effort_of("cem", samples=settings.samples, iterations=settings.iterations)
        planning = Planning("cem", effort, HORIZON, EXECUTE, run.seed)
        agent = PlannerAgent(
            LearnedScorer(model, "min"), planning, low=place.low, high=place.high, device=self._world.device
        )
        at_goal = play(place, agent, self._tasks, px=model.px, budget=BUDGET).distances < place.goal_distance
        return {"plan/success": float(at_goal.any(1).mean()), "plan/held": float(at_goal[:, -1].mean())}
