"""Reach a goal with a trained model: frames and a picture of the goal in, actions out.

    vjepa train lewm_two_room                  # docs/worlds.md
    python examples/plan_two_room.py runs/lewm_two_room two_room.mp4 [EPISODES]

The film shows the current frame next to the goal.
"""

import sys
from pathlib import Path

import numpy as np

import vjepa
from vjepa.planning import Policy
from vjepa_data.rng import generator
from vjepa_data.synthetic.physics import write_video
from vjepa_data.worlds.two_room import TwoRoom

STEPS = 40


def main(run: str, film: str, episodes: int = 3) -> None:
    world, model = TwoRoom(), vjepa.load(run)
    bounds = np.full(len(world.action_columns), world.max_action)
    policy = Policy(model, low=-bounds, high=bounds)
    pictures, reached = [], 0
    for episode in range(episodes):
        u = generator(0, "example", episode).random((2, 1, 4))
        u[:, :, 0] = [[0.25], [0.75]]  # start on the left, goal on the right
        layout = world.layouts("fixed", u[0])
        state, goal = world.starts(layout, u[0]), world.starts(layout, u[1])
        target = world.render(goal, layout, model.px)[0]
        policy.reset(episode)
        distances = []
        for _ in range(STEPS):
            frame = world.render(state, layout, model.px)[0]
            pictures.append(np.concatenate((frame, target), axis=1))
            state = world.step(state, policy.act(frame, target)[None], layout)
            distances.append(float(world.distance(state, goal)[0]))
        arrived = [step for step, distance in enumerate(distances, 1) if distance < world.goal_distance]
        reached += bool(arrived)
        print(f"episode {episode}: " + (f"at the goal after {arrived[0]} steps" if arrived else "goal not reached"))
    write_video(Path(film), np.stack(pictures), fps=10)
    print(f"reached {reached} of {episodes} goals; {film} shows them")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
