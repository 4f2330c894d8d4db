"""Simulate episodes under a policy. Everything drawn is a function of (seed, episode, step).

    wander   a direction and a speed that are held for about five steps
    expert   towards a goal, and to the next one when it is reached, with some noise
    mixed    each episode is one or the other

Letters: E episodes, F frames of an episode, S columns of a state, A columns of an action, L columns of a layout,
U uniform numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Float64
from numpy import ndarray

from vjepa_data.errors import BadInput
from vjepa_data.rng import generator
from vjepa_data.worlds.base import LAYOUT_NUMBERS, STATE_NUMBERS, LayoutKind, World
from vjepa_data.worlds.push import Push
from vjepa_data.worlds.two_room import TwoRoom

Policy = Literal["wander", "expert", "mixed"]

WORLDS: dict[str, World] = {world.name: world for world in (TwoRoom(), Push())}
"""All worlds by name."""

KEEP_PROBABILITY = 0.8
"""Probability that `wander` keeps its direction for another step."""

EXPERT_NOISE = 0.25
"""Largest noise on an expert's action, relative to the largest action."""


@dataclass(frozen=True)
class Episodes:
    """Simulated episodes of a world."""

    states: Float64[ndarray, "E F S"]
    actions: Float64[ndarray, "E F-1 A"]
    """Row `t` acts from frame `t` to frame `t + 1`."""

    layouts: Float64[ndarray, "E L"]


def simulate(
    world: World, *, policy: Policy, layout: LayoutKind, seed: int, episodes: Sequence[int], frames: int
) -> Episodes:
    """Simulate episodes by number.

    Args:
        world: the world.
        policy: the rule that chooses the actions.
        layout: which layouts to draw.
        seed: seed of the corpus.
        episodes: numbers of the episodes. An episode is the same in any company.
        frames: length of an episode. A shorter episode is the beginning of a longer episode.

    Raises:
        BadInput: an episode has fewer than two frames.
    """
    if frames < 2:
        raise BadInput(f"frames ({frames}) must be at least 2, since actions lie between frames; try 33")

    def draw(purpose: str, *shape: int) -> Float64[ndarray, "E ..."]:
        return np.stack([generator(seed, f"{world.name} {purpose}", e).random(shape) for e in episodes])

    layouts = world.layouts(layout, draw("layout", LAYOUT_NUMBERS))
    state = world.starts(layouts, draw("start", STATE_NUMBERS))
    wandering = _wander(draw("wander", frames - 1, 3), world.max_action)
    is_expert = _is_expert(policy, draw("policy", 1)[:, 0])[:, None]
    goal_draws = draw("goals", frames - 1, STATE_NUMBERS)
    noise = (2 * draw("noise", frames - 1, 2) - 1) * EXPERT_NOISE * world.max_action
    goals = state
    states, actions = [state], []
    for step in range(frames - 1):
        is_reached = world.distance(state, goals) < world.goal_distance  # at first the goal is the start
        goals = np.where(is_reached[:, None], world.starts(layouts, goal_draws[:, step]), goals)
        skilled = world.expert(state, goals, layouts) + noise[:, step]
        action = np.where(is_expert, skilled, wandering[:, step])
        action = np.clip(action, -world.max_action, world.max_action)
        state = world.step(state, action, layouts)
        states.append(state)
        actions.append(action)
    return Episodes(np.stack(states, axis=1), np.stack(actions, axis=1), layouts)


def _is_expert(policy: Policy, u: Float[ndarray, " E"]) -> ndarray:
    return {"wander": np.zeros(len(u), bool), "expert": np.ones(len(u), bool), "mixed": u < 0.5}[policy]


def _wander(u: Float64[ndarray, "E steps 3"], longest: float) -> Float64[ndarray, "E steps 2"]:
    """Return actions that keep a drawn direction and speed until the next change."""
    is_new = u[..., 0] >= KEEP_PROBABILITY
    is_new[:, 0] = True
    numbers = np.arange(u.shape[1])
    since = np.maximum.accumulate(np.where(is_new, numbers, 0), axis=1)
    angle, speed = (np.take_along_axis(u[..., i], since, axis=1) for i in (1, 2))
    direction = np.stack((np.cos(2 * np.pi * angle), np.sin(2 * np.pi * angle)), axis=-1)
    return direction * speed[..., None] * longest
