"""An environment of gymnasium is a world: processes, starts by seed, bounds, and clear refusals."""

import numpy as np
import pytest

from vjepa.planning.agents import RandomAgent
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


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gym:CartPole-v1", "a planner needs a box"),
        ("gym:missing_package/Thing-v0", "no environment"),
        ("maze", "unknown world 'maze'; give two_room, push or gym:ID"),
    ],
)
def test_an_unfit_world_is_refused_with_the_reason(name: str, reason: str):
    with pytest.raises(BadInput, match=reason):
        make_world(name)
