"""Two rooms and a door: a disc moves by its actions, and slides along walls.

          door_y
    +-------#-------+      The disc is a point among obstacles that are larger by its radius. A step is divided into
    |       #       |      SUBSTEPS, each a move in x and then a move in y. A move along an axis stops exactly at the
    |   o           |      first obstacle, so no path crosses a wall at any speed.
    |       #       |
    +-------#-------+
          wall_x

Letters: E episodes, P height and width in pixels.
"""

from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, Float64, UInt8
from numpy import ndarray

from vjepa_data.worlds.base import (
    Actions,
    LayoutKind,
    Layouts,
    States,
    World,
    in_bands,
    is_between,
    limit_length,
    stamp_disc,
)

RADIUS = 0.04
HALF_WALL = 0.02 + RADIUS
"""Half of the wall's thickness, enlarged by the radius of the disc."""

SUBSTEPS = 4
ROUNDING = 1e-9

FLOOR, WALL, DISC = (226, 222, 210), (58, 62, 74), (200, 44, 40)


class TwoRoom(World):
    """Two rooms and a door. The state is the disc's position, an action its displacement."""

    name: ClassVar[str] = "two_room"
    state_columns: ClassVar[tuple[str, ...]] = ("x", "y")
    action_columns: ClassVar[tuple[str, ...]] = ("dx", "dy")
    layout_columns: ClassVar[tuple[str, ...]] = ("wall_x", "door_y", "half_door")
    max_action: ClassVar[float] = 0.078
    goal_distance: ClassVar[float] = 0.047

    def layouts(self, kind: LayoutKind, u: Float[ndarray, "E U"]) -> Layouts:
        """Return wall, door and half the width of the door.

        Random doors are at 20 to 80 % of the height, and narrower than the fixed door. Random walls are at 35 to 65 %
        of the width.
        """
        if kind == "fixed":
            return np.tile((0.5, 0.3, 0.125), (len(u), 1))
        door = 0.2 + 0.6 * in_bands(u[:, 0], kind=kind)
        return np.stack((0.35 + 0.3 * u[:, 1], door, np.full(len(u), 0.094)), axis=1)

    def starts(self, layouts: Layouts, u: Float[ndarray, "E U"]) -> States:
        """Return positions in either room with equal probability, never in the door."""
        wall, is_left = layouts[:, 0], u[:, 0] < 0.5
        low = np.where(is_left, RADIUS, wall + HALF_WALL)
        high = np.where(is_left, wall - HALF_WALL, 1 - RADIUS)
        return np.stack((low + u[:, 1] * (high - low), RADIUS + u[:, 2] * (1 - 2 * RADIUS)), axis=1)

    def step(self, states: States, actions: Actions, layouts: Layouts) -> States:
        """Move each disc by its action as far as walls allow."""
        return self.path(states, actions, layouts)[:, -1]

    def path(self, states: States, actions: Actions, layouts: Layouts) -> Float64[ndarray, "E corners 2"]:
        """Return the corners of the path of a step. Every part between two corners is parallel to an axis."""
        part = np.clip(actions, -self.max_action, self.max_action) / SUBSTEPS
        left, right = layouts[:, 0] - HALF_WALL, layouts[:, 0] + HALF_WALL
        x, y = states.T
        corners = [states]
        for _ in range(SUBSTEPS):
            is_blocked = ~self._fits_door(y, layouts)
            low = np.where(is_blocked & (x >= right), right, RADIUS)
            high = np.where(is_blocked & (x <= left), left, 1 - RADIUS)
            x = np.clip(x + part[:, 0], low, high)
            corners.append(np.stack((x, y), axis=1))
            is_in_door = is_between(x, left, right)
            slack = layouts[:, 2] - RADIUS
            low = np.where(is_in_door, layouts[:, 1] - slack, RADIUS)
            high = np.where(is_in_door, layouts[:, 1] + slack, 1 - RADIUS)
            y = np.clip(y + part[:, 1], low, high)
            corners.append(np.stack((x, y), axis=1))
        return np.stack(corners, axis=1)

    def _fits_door(self, y: Float64[ndarray, " E"], layouts: Layouts, share: float = 1.0) -> Bool[ndarray, " E"]:
        return abs(y - layouts[:, 1]) <= share * (layouts[:, 2] - RADIUS) + ROUNDING

    def distance(self, states: States, goals: States) -> Float64[ndarray, " E"]:
        """Return the distance of the discs from their goals."""
        return np.linalg.norm(states - goals, axis=1)

    def expert(self, states: States, goals: States, layouts: Layouts) -> Actions:
        """Go straight to a goal in the same room, or through the middle of the door."""
        wall, door = layouts[:, 0], layouts[:, 1]
        side, goal_side = np.sign(states[:, 0] - wall), np.sign(goals[:, 0] - wall)
        near, far = wall + side * HALF_WALL, wall + goal_side * (HALF_WALL + self.max_action)
        is_in_front = self._fits_door(states[:, 1], layouts, share=0.5)
        waypoint = np.stack((np.where(is_in_front, far, near), door), axis=1)
        target = np.where((side == goal_side)[:, None], goals, waypoint)
        return limit_length(target - states, self.max_action)

    def straight(self, states: States, goals: States) -> Actions:
        """Move in a straight line towards the goal."""
        return limit_length(goals - states, self.max_action)

    def render(self, states: States, layouts: Layouts, px: int) -> UInt8[ndarray, "E P P 3"]:
        """Draw the wall and the disc."""
        distinct, number = np.unique(layouts, axis=0, return_inverse=True)
        frames = _draw_rooms(distinct, px)[number.reshape(-1)]
        stamp_disc(frames, states, np.full(len(states), RADIUS), DISC)
        return frames


def _draw_rooms(layouts: Layouts, px: int) -> UInt8[ndarray, "E P P 3"]:
    grid = (np.arange(px) + 0.5) / px
    in_wall = np.clip(0.5 - (abs(grid - layouts[:, :1]) - (HALF_WALL - RADIUS)) * px, 0, 1)
    in_door = np.clip(0.5 - (abs(grid - layouts[:, 1:2]) - layouts[:, 2:3]) * px, 0, 1)
    cover = (in_wall[:, None, :] * (1 - in_door[:, :, None]))[..., None]
    floor, wall = np.array(FLOOR, dtype=np.float64), np.array(WALL, dtype=np.float64)
    return np.rint(floor + cover * (wall - floor)).astype(np.uint8)
