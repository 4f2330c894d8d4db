"""A disc that pushes another: quasi-static contact in a box.

In each of SUBSTEPS the pusher moves first. The other disc then moves along the line between the centres until both
touch. Where a wall stops it, the pusher is set back. Where that fails too, neither moves. Discs therefore never overlap
and never leave the box. A substep is much shorter than the discs are wide, so the pusher cannot jump over the other.

Letters: E episodes, P height and width in pixels.
"""

from typing import ClassVar

import numpy as np
from jaxtyping import Float, Float64, UInt8
from numpy import ndarray

from vjepa_data.worlds.base import (
    Actions,
    LayoutKind,
    Layouts,
    States,
    World,
    in_bands,
    limit_length,
    stamp_disc,
    unit,
)

PUSHER_RADIUS = 0.05
SUBSTEPS = 8
TOUCH = 1e-9

FLOOR, PUSHER, OBJECT = (226, 222, 210), (200, 44, 40), (40, 84, 190)


class Push(World):
    """A pusher and an object. The state is the position of both, an action the displacement of the pusher."""

    name: ClassVar[str] = "push"
    state_columns: ClassVar[tuple[str, ...]] = ("pusher_x", "pusher_y", "object_x", "object_y")
    action_columns: ClassVar[tuple[str, ...]] = ("dx", "dy")
    layout_columns: ClassVar[tuple[str, ...]] = ("object_radius",)
    max_action: ClassVar[float] = 0.06
    goal_distance: ClassVar[float] = 0.05

    def layouts(self, kind: LayoutKind, u: Float[ndarray, "E U"]) -> Layouts:
        """Return the radius of the object: 0.09, or drawn from 0.07 to 0.12."""
        if kind == "fixed":
            return np.full((len(u), 1), 0.09)
        return 0.07 + 0.05 * in_bands(u[:, 0], kind=kind)[:, None]

    def starts(self, layouts: Layouts, u: Float[ndarray, "E U"]) -> States:
        """Return an object away from the walls, and a pusher anywhere outside it."""
        radius = layouts[:, 0]
        reach = radius + PUSHER_RADIUS
        middle = 0.25 + 0.5 * u[:, :2]
        angle, far = 2 * np.pi * u[:, 2], reach + (0.05 + 0.4 * u[:, 3])
        direction = np.stack((np.cos(angle), np.sin(angle)), axis=1)
        pusher = np.clip(middle + direction * far[:, None], PUSHER_RADIUS, 1 - PUSHER_RADIUS)
        is_apart = np.linalg.norm(pusher - middle, axis=1) >= reach
        opposite = np.clip(middle - direction * far[:, None], PUSHER_RADIUS, 1 - PUSHER_RADIUS)
        return np.concatenate((np.where(is_apart[:, None], pusher, opposite), middle), axis=1)

    def step(self, states: States, actions: Actions, layouts: Layouts) -> States:
        """Move each pusher by its action, and the objects that it touches."""
        part = np.clip(actions, -self.max_action, self.max_action) / SUBSTEPS
        pusher, thing = states[:, :2], states[:, 2:]
        radius = layouts[:, :1]
        reach = radius + PUSHER_RADIUS
        for _ in range(SUBSTEPS):
            moved = np.clip(pusher + part, PUSHER_RADIUS, 1 - PUSHER_RADIUS)
            normal = unit(thing - moved)
            gap = np.linalg.norm(thing - moved, axis=1, keepdims=True) - reach
            pushed = np.clip(thing - normal * np.minimum(gap, 0), radius, 1 - radius)
            is_stuck = np.linalg.norm(pushed - moved, axis=1, keepdims=True) < reach - TOUCH
            back = np.clip(pushed - unit(pushed - moved) * reach, PUSHER_RADIUS, 1 - PUSHER_RADIUS)
            moved = np.where(is_stuck, back, moved)
            is_stuck = np.linalg.norm(pushed - moved, axis=1, keepdims=True) < reach - TOUCH
            pusher, thing = np.where(is_stuck, pusher, moved), np.where(is_stuck, thing, pushed)
        return np.concatenate((pusher, thing), axis=1)

    def distance(self, states: States, goals: States) -> Float64[ndarray, " E"]:
        """Return the distance of the objects from their goals. The pushers do not count."""
        return np.linalg.norm(states[:, 2:] - goals[:, 2:], axis=1)

    def expert(self, states: States, goals: States, layouts: Layouts) -> Actions:
        """Go behind the object in a circle around it, then push it in a straight line."""
        pusher, thing, goal = states[:, :2], states[:, 2:], goals[:, 2:]
        reach = layouts[:, 0] + PUSHER_RADIUS
        ahead, here = unit(goal - thing), unit(pusher - thing)
        angle = np.arctan2(_cross(here, -ahead), (here * -ahead).sum(1))  # from the pusher's place to behind the object
        turn = np.clip(angle, -0.6, 0.6)
        cos, sin = np.cos(turn), np.sin(turn)
        next_place = np.stack((cos * here[:, 0] - sin * here[:, 1], sin * here[:, 0] + cos * here[:, 1]), axis=1)
        around = thing + next_place * (reach + 0.02)[:, None]
        through = thing - ahead * reach[:, None] + ahead * self.max_action
        target = np.where((abs(angle) < 0.15)[:, None], through, around)
        remaining = np.linalg.norm(goal - thing, axis=1)
        return (
            limit_length(target - pusher, self.max_action) * np.minimum(1, 0.25 + remaining / self.max_action)[:, None]
        )

    def straight(self, states: States, goals: States) -> Actions:
        """Move the pusher in a straight line towards the object's goal."""
        return limit_length(goals[:, 2:] - states[:, :2], self.max_action)

    def render(self, states: States, layouts: Layouts, px: int) -> UInt8[ndarray, "E P P 3"]:
        """Draw the object and the pusher."""
        frames = np.empty((len(states), px, px, 3), dtype=np.uint8)
        frames[:] = FLOOR
        stamp_disc(frames, states[:, 2:], layouts[:, 0], OBJECT)
        stamp_disc(frames, states[:, :2], np.full(len(states), PUSHER_RADIUS), PUSHER)
        return frames


def _cross(a: Float64[ndarray, "E 2"], b: Float64[ndarray, "E 2"]) -> Float64[ndarray, " E"]:
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
