"""The evaluation: kinds of tasks, independence of batches and processes, resuming, and agents that must fail or not."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_model import PX, write_model

import vjepa
from vjepa.cli import main
from vjepa.evals.untrained import untrained_model
from vjepa.planning import Policy
from vjepa.planning.agents import PlannerAgent, Planning, RandomAgent, StraightAgent, make_box
from vjepa.planning.evaluation import PlanSettings, evaluate
from vjepa.planning.harness import RECORDS, draw_tasks, play
from vjepa.planning.planners import Effort
from vjepa.planning.results import make_row
from vjepa.planning.scoring import LearnedScorer, OracleScorer, ShuffledScorer
from vjepa.planning.worlds import SimulatedWorld, make_world
from vjepa.report.planning import write_page
from vjepa_data.errors import BadInput
from vjepa_data.worlds.episodes import WORLDS

WORLD = SimulatedWorld(WORLDS["two_room"])
QUICK = Effort(samples=6, elites=2, iterations=2)
SMALL = PlanSettings(
    effort=QUICK,
    horizon=4,
    execute=2,
    budget=6,
    episodes=5,
    against=("random", "straight", "oracle"),
    data_episodes=3,
    data_updates=3,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("planning") / "model")


def read_episodes(folder: Path) -> dict[tuple[str, str, int], Any]:
    """Return the distances and actions of every episode on record."""
    found = {}
    for line in map(json.loads, (folder / RECORDS).read_text().splitlines()[1:]):
        rows = zip(line["episodes"], line["distances"], line["actions"], strict=True)
        found |= {(line["agent"], line["group"], number): (d, a) for number, d, a in rows}
    return found


# Tasks


@pytest.mark.parametrize("name", ["two_room", "push"])
def test_hard_tasks_are_those_that_a_straight_line_does_not_solve(name: str):
    world = make_world(name)
    assert isinstance(world, SimulatedWorld)
    tasks = draw_tasks(world, episodes=20, seed=0, layout="fixed", budget=40)
    for group, share in (("hard", 0.0), ("straight", 1.0)):
        if group not in tasks.groups:
            assert name == "push", "hardly any task of push is solved by a straight line"
            continue
        found = play(world, StraightAgent(world.simulator), tasks.groups[group], px=16, budget=40)
        assert (found.distances < world.goal_distance).any(1).mean() == share
        assert (found.distances[:, 0] >= world.goal_distance).all(), "a task was solved from the start"
    assert len(tasks.groups["hard"]) == 20
    assert tasks.drawn >= 20 + tasks.solved


def test_more_tasks_begin_with_the_same_tasks():
    few, many = (draw_tasks(WORLD, episodes=n, seed=0, layout="held_out", budget=40).groups["hard"] for n in (5, 9))
    assert np.array_equal(many.take(slice(0, 5)).starts, few.starts)
    assert np.array_equal(many.numbers[:5], few.numbers)


def test_goals_at_a_distance_are_not_solved_from_the_start():
    tasks = draw_tasks(WORLD, episodes=2, seed=0, layout="fixed", budget=40, distances=(5, 20), per_distance=6)
    for steps in (5, 20):
        group = tasks.groups[f"{steps} steps away"]
        apart = WORLD.simulator.distance(group.starts, group.goals)
        assert len(group) == 6
        assert (apart >= WORLD.goal_distance).all()
        assert (apart <= steps * WORLD.simulator.max_action * 2**0.5).all()


# Independence


def test_results_do_not_depend_on_the_batch(model: Path, tmp_path: Path):
    settings = replace(SMALL, against=("random", "oracle", "cloning", "untrained"))
    for batch in (1, 16):
        evaluate(model, settings, tmp_path / str(batch), batch=batch)
    alone, together = (read_episodes(tmp_path / str(batch)) for batch in (1, 16))
    assert alone == together
    assert len(alone) == 5 * (5 + 2)


def test_another_process_finds_the_same_actions(model: Path, tmp_path: Path):
    settings = replace(SMALL, episodes=2, against=("oracle",))
    evaluate(model, settings, tmp_path / "here")
    code = (
        "import pathlib, sys\n"
        "from vjepa.planning.evaluation import PlanSettings, evaluate\n"
        "from vjepa.planning.planners import Effort\n"
        f"evaluate(pathlib.Path({str(model)!r}), {settings!r}, pathlib.Path({str(tmp_path / 'there')!r}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert read_episodes(tmp_path / "here") == read_episodes(tmp_path / "there")


def test_a_policy_takes_the_actions_of_the_evaluation(model: Path):
    loaded = vjepa.load(model)
    tasks = draw_tasks(WORLD, episodes=2, seed=0, layout="fixed", budget=40).groups["hard"]
    planning = Planning("cem", QUICK, horizon=4, execute=2, seed=7)
    agent = PlannerAgent(LearnedScorer(loaded, "min"), planning, low=WORLD.low, high=WORLD.high)
    expected = play(WORLD, agent, tasks, px=PX, budget=5).actions
    policy = Policy(loaded, low=WORLD.low, high=WORLD.high, effort=QUICK, horizon=4, execute=2, seed=7)
    for row, number in enumerate(tasks.numbers):
        policy.reset(int(number))
        episode = WORLD.play(tasks.take(slice(row, row + 1)), PX)
        for step in range(5):
            view = episode.view()
            action = policy.act(view.frames[0], view.goals[0])
            assert np.array_equal(action, expected[row, step])
            episode.step(action[None])


# Resuming


def test_an_interrupted_evaluation_continues(model: Path, tmp_path: Path):
    rows = evaluate(model, SMALL, tmp_path / "out", batch=2).rows
    complete = read_episodes(tmp_path / "out")
    records = tmp_path / "out" / RECORDS
    text = records.read_text()
    records.write_text(text[: len(text) * 2 // 3])
    (tmp_path / "out" / "plan.json").unlink()
    again = evaluate(model, SMALL, tmp_path / "out", batch=3).rows
    assert read_episodes(tmp_path / "out") == complete
    assert [(r.agent, r.group, r.reached, r.held) for r in again] == [
        (r.agent, r.group, r.reached, r.held) for r in rows
    ]


def test_records_of_another_evaluation_are_refused(model: Path, tmp_path: Path):
    evaluate(None, SMALL, tmp_path / "out")
    (tmp_path / "out" / "plan.json").unlink()
    with pytest.raises(BadInput, match="evaluation with another horizon, seed"):
        evaluate(None, replace(SMALL, seed=1, horizon=5), tmp_path / "out")


# Agents


def test_the_oracle_reaches_what_random_actions_do_not():
    tasks = draw_tasks(WORLD, episodes=20, seed=0, layout="held_out", budget=40).groups["hard"]
    planning = Planning("cem", Effort(), horizon=20, execute=4, seed=0)
    oracle = PlannerAgent(OracleScorer(WORLD.simulator, "min"), planning, low=WORLD.low, high=WORLD.high)
    reached = {
        name: (play(WORLD, agent, tasks, px=16, budget=40).distances < WORLD.goal_distance).any(1).sum()
        for name, agent in (("oracle", oracle), ("random", RandomAgent(WORLD, seed=0)))
    }
    assert reached["oracle"] >= 19
    assert reached["random"] <= 3


def test_the_untrained_model_keeps_scales_and_loses_weights(model: Path):
    loaded = vjepa.load(model)
    loaded.parts["dynamics"].actions.std.fill_(3.0)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    fresh = untrained_model(loaded, seed=1)
    before, after = loaded.state_dict(), fresh.state_dict()
    assert torch.equal(before["parts.dynamics.actions.std"], after["parts.dynamics.actions.std"])
    assert torch.equal(before["parts.dynamics.centre.mean"], after["parts.dynamics.centre.mean"])
    assert not torch.equal(before["parts.dynamics.projector.0.weight"], after["parts.dynamics.projector.0.weight"])
    assert not any(value.requires_grad for value in fresh.parameters())


def test_shuffled_costs_are_those_of_other_plans(model: Path):
    loaded = vjepa.load(model)
    view = WORLD.play(draw_tasks(WORLD, episodes=1, seed=0, layout="fixed", budget=9).groups["hard"], PX).view()
    actions = 0.05 * torch.randn(1, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    costs, shuffled = (kind(loaded, "min").cost(view)(actions) for kind in (LearnedScorer, ShuffledScorer))
    assert torch.equal(shuffled, costs[:, [3, 0, 1, 2]])


def test_all_agents_of_the_diagnosis_and_of_inverse_planning_play(model: Path, tmp_path: Path):
    settings = replace(
        SMALL, episodes=1, diagnose=1, distances=(5,), per_distance=1, cost="temporal", against=("inverse", "shuffled")
    )
    found = evaluate(model, settings, tmp_path / "out")
    played = {(row.agent, row.group) for row in found.rows}
    mixed = {("true dynamics, latent cost", "diagnosis"), ("learned dynamics, true cost", "diagnosis")}
    assert played >= mixed | {("model", "diagnosis"), ("model", "5 steps away"), ("inverse", "hard")}
    content = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert content["tasks"]["drawn"] >= content["tasks"]["hard"]
    page = write_page(found, tmp_path / "out").read_text()
    assert "True and learned dynamics" in page
    assert "Energy" in page
    films = list((tmp_path / "out" / "films").glob("*.mp4"))
    assert films
    assert all(f"films/{film.name}" in page for film in films)


def test_a_row_counts_first_success_and_the_end_apart():
    line = {
        "agent": "a",
        "group": "hard",
        "episodes": [0, 1, 2],
        "distances": [[9, 0, 9, 9], [9, 9, 9, 0], [9, 9, 9, 9]],
        "seconds": 2.0,
        "plans": 6,
        "calls": 60,
    }
    row = make_row([line], agent="a", group="hard", goal_distance=1.0)
    assert row is not None
    assert (row.reached, row.held, row.median_steps, row.episodes) == (2, 1, 2.0, 3)
    assert row.low < 2 / 3 < row.high
    assert row.held_low < 1 / 3 < row.held_high


# Errors


def test_an_unknown_agent_is_an_error_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--out", str(tmp_path / "out"), "--against", "oracle,expert"]) == 2
    assert "'expert' is not an agent; give some of random,straight" in capsys.readouterr().err


def test_a_model_of_another_rate_is_refused(tmp_path: Path):
    with pytest.raises(BadInput, match=r"clips of 5 frames per second, and two_room acts 10 times"):
        evaluate(write_model(tmp_path / "slow", fps=5.0), SMALL, tmp_path / "out")


def test_a_control_of_the_model_needs_a_model(tmp_path: Path):
    with pytest.raises(BadInput, match="--against untrained needs a model"):
        evaluate(None, replace(SMALL, against=("untrained",)), tmp_path / "out")


def test_infinite_bounds_are_refused():
    with pytest.raises(BadInput, match="finite bounds"):
        make_box(np.array([-np.inf]), np.array([1.0]), torch.device("cpu"))


def test_adam_is_refused_where_there_is_no_gradient(model: Path, tmp_path: Path):
    with pytest.raises(BadInput, match="adam follows gradients"):
        evaluate(model, replace(SMALL, planner="adam"), tmp_path / "out")
