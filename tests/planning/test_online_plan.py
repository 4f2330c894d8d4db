"""Planning during training measures what `vjepa plan` would."""

from pathlib import Path

import pytest
from tiny_model import tiny_run, write_model

import vjepa
from vjepa.config import OnlinePlan, Parallel
from vjepa.distributed.world import join
from vjepa.methods.base import create_method
from vjepa.monitoring.online_plan import BUDGET, EXECUTE, HORIZON, PlanRunner
from vjepa.planning.agents import PlannerAgent, Planning
from vjepa.planning.evaluation import effort_of
from vjepa.planning.harness import draw_tasks, play
from vjepa.planning.scoring import LearnedScorer
from vjepa.planning.worlds import make_world
from vjepa_data.errors import BadInput

SETTINGS = OnlinePlan(every_steps=3, episodes=3, samples=4, iterations=1)


def test_planning_in_training_is_that_of_the_exported_model(tmp_path: Path):
    run = tiny_run()
    with join(Parallel()) as world:
        runner = PlanRunner(SETTINGS, run, world, create_method(run).build())
        found = runner.measure()
    assert [step for step in range(1, 7) if runner.is_due(step)] == [3, 6]
    model, place = vjepa.load(write_model(tmp_path / "model")), make_world("two_room")
    tasks = draw_tasks(place, episodes=3, seed=run.seed, layout="fixed", budget=BUDGET).groups["hard"]
    planning = Planning("cem", effort_of("cem", samples=4, iterations=1), HORIZON, EXECUTE, run.seed)
    agent = PlannerAgent(LearnedScorer(model, "min"), planning, low=place.low, high=place.high)
    at_goal = play(place, agent, tasks, px=model.px, budget=BUDGET).distances < place.goal_distance
    assert found == {"plan/success": at_goal.any(1).mean(), "plan/held": at_goal[:, -1].mean()}


def test_a_run_at_another_rate_than_the_world_is_refused():
    run = tiny_run(fps=5.0)
    with join(Parallel()) as world, pytest.raises(BadInput, match="clips of 5 frames per second"):
        PlanRunner(SETTINGS, run, world, create_method(run).build())
