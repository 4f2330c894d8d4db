"""Films of planned episodes: the frame with the plans that the planner weighed, the goal, and their cost below.

Letters: F frames, N samples, H steps of a plan, P Q height and width in pixels.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image, ImageDraw

from vjepa.planning.agents import PlannerAgent
from vjepa.planning.scoring import simulate_plans
from vjepa.planning.worlds import SimulatedWorld, Tasks

SCALE_PX = 192
CURVE_PX = 48
FAN = 12
"""Plans that are drawn: the best plans of the last evaluation."""

BLUE, ORANGE, GREY = (37, 99, 235), (234, 115, 23), (138, 147, 163)


@dataclass(frozen=True)
class Film:
    """An episode as pictures."""

    frames: UInt8[ndarray, "F P Q 3"]
    costs: Float[ndarray, " plans"]
    """Least cost of each plan, in the order of planning."""


def film(world: SimulatedWorld, agent: PlannerAgent, task: Tasks, *, px: int, budget: int) -> Film:
    """Play an episode again, which takes the same actions, and draw it.

    Args:
        world: the world. The first two columns of its state are a position in sides of the frame.
        agent: the planner.
        task: the task.
        px: height and width of the frames that the agent sees.
        budget: steps of the episode.
    """
    episode, step = world.play(task, px), 0
    pictures: list[ndarray] = []
    costs: list[float] = []
    while step < budget:
        view = episode.view()
        chosen = agent.act(view, step)[0]
        assert agent.last is not None
        plans, values = agent.last
        order = values[0].argsort()[:FAN]
        paths = simulate_plans(world.simulator, view.states, task, plans[:, order])[0][0, ..., :2]  # [N H 2]
        costs.append(float(values[0].min()))
        start = view.states[0, :2]
        for number, action in enumerate(chosen[: budget - step]):
            now = episode.view()
            fan = [np.concatenate((start[None], path)) for path in paths]
            pictures.append(_picture(now.frames[0], now.goals[0], fan, executed=number))
            episode.step(action[None])
        step += len(chosen)
    last = episode.view()
    pictures.append(_picture(last.frames[0], last.goals[0], [], executed=0))
    curves = [_curve(costs, shown=min(len(costs), 1 + n * len(costs) // len(pictures))) for n in range(len(pictures))]
    return Film(np.stack([np.concatenate(pair) for pair in zip(pictures, curves, strict=True)]), np.array(costs))


def _picture(frame: ndarray, goal: ndarray, fan: list[ndarray], *, executed: int) -> UInt8[ndarray, "P Q 3"]:
    big, target = (
        Image.fromarray(each).resize((SCALE_PX, SCALE_PX), Image.Resampling.NEAREST) for each in (frame, goal)
    )
    pen = ImageDraw.Draw(big)
    for rank, path in reversed(list(enumerate(fan))):  # the best on top
        points = [(float(x) * SCALE_PX, float(y) * SCALE_PX) for x, y in path[executed:]]
        pen.line(points, fill=BLUE if rank == 0 else GREY, width=3 if rank == 0 else 1)
    gap = np.full((SCALE_PX, 4, 3), 255, np.uint8)
    return np.concatenate((np.asarray(big), gap, np.asarray(target)), axis=1)


def _curve(costs: list[float], *, shown: int) -> UInt8[ndarray, "p Q 3"]:
    """Draw the cost of the plans so far."""
    width = 2 * SCALE_PX + 4
    picture = Image.new("RGB", (width, CURVE_PX), (255, 255, 255))
    top = max(max(costs), 1e-12)
    x = np.linspace(6, width - 6, max(2, len(costs)))
    points = [(float(x[n]), CURVE_PX - 6 - (CURVE_PX - 12) * costs[n] / top) for n in range(shown)]
    pen = ImageDraw.Draw(picture)
    pen.line([(6, CURVE_PX - 6), (width - 6, CURVE_PX - 6)], fill=GREY)
    if len(points) > 1:
        pen.line(points, fill=ORANGE, width=2)
    pen.ellipse([points[-1][0] - 3, points[-1][1] - 3, points[-1][0] + 3, points[-1][1] + 3], fill=ORANGE)
    return np.asarray(picture)
