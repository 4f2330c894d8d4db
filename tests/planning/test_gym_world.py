"""An environment of gymnasium is a world: processes, starts by seed, bounds, and clear refusals."""

from typing import Any

import numpy as np
import pytest

from vjepa.planning.agents import RandomAgent
from vjepa.planning.gym_goals import PICTURES
from vjepa.planning.gym_world import make_environment
from vjepa.planning.harness import draw_tasks, play
from vjepa.planning.worlds import make_world
from vjepa_data.errors import BadInput


def test_an_environment_is_played_in_processes():
    world = make_world("gym:tiny_env/Point-v0")
    assert world.low.tolist() == pytest.approx([-0.1, -0.1])
    tasks = draw_tasks(world, episodes=2, seed=0, layout="fixed", budget=30).groups["hard"]
    found = play(world, RandomAgent(world, seed=0), tasks, px=24, budget=30)
    again = play(world, RandomAgent(world, seed=0), tasks.take(slice(1, 2)), px=24, budget=30)
    assert np.array_equal(found.distances[1:], again.distances)
    assert (found.distances[:, 0] == 1).all()
    assert (found.distances[:, -1] == 0).all(), "success stays after the environment ended"
    assert (found.actions >= world.low - 1e-6).all()
    assert (found.actions <= world.high + 1e-6).all()


def test_each_episode_of_an_environment_has_its_own_goal():
    world = make_world("gym:tiny_env/Point-v0")
    episodes = world.play(world.tasks(range(2), seed=0, layout="fixed"), 40)
    try:
        left, right = episodes.view().goals[:, 0, :, 0].argmin(1)
    finally:
        episodes.close()
    assert left != right


def test_the_picture_of_a_goal_leaves_the_start_as_it_is(monkeypatch: pytest.MonkeyPatch):
    def picture(env: Any) -> Any:
        inner = env.unwrapped
        inner.place = np.array([inner.goal, 0.0])
        return env.render()

    monkeypatch.setitem(PICTURES, "tiny_env/Terse", picture)
    shown, plain = (make_environment(f"tiny_env/{name}-v0") for name in ("Terse", "Point"))
    (start, info), (expected, other) = shown.reset(seed=3), plain.reset(seed=3)
    assert np.array_equal(start, expected)
    assert np.array_equal(info["goal_frame"], other["goal_frame"])
    assert info["is_success"] is other["is_success"] is False


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gym:CartPole-v1", "a planner needs a box"),
        ("gym:tiny_env/Terse-v0", "does not say what its goal looks like"),
        ("gym:missing_package/Thing-v0", "no environment"),
        ("maze", "unknown world 'maze'; give two_room, push or gym:ID"),
    ],
)
def test_an_unfit_world_is_refused_with_the_reason(name: str, reason: str):
    with pytest.raises(BadInput, match=reason):
        make_world(name)
