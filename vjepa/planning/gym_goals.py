"""Pictures of goals for environments of gymnasium that do not report one.

Planning needs `info["is_success"]` or `info["success"]`, and `info["goal_frame"]`. PushT and PointMaze report no
picture, so it is rendered from the goal's state. This module imports gymnasium.
"""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from vjepa_data.errors import BadInput


def picture_pusht(env: Any) -> Any:
    """Render the T at its goal, with the agent in a corner."""
    env.reset(options={"reset_to_state": [48.0, 48.0, *env.unwrapped.goal_pose]})
    return env.render()


def picture_point_maze(env: Any) -> Any:
    """Render the ball at rest at its goal."""
    body = env.unwrapped.point_env
    body.set_state(np.asarray(env.unwrapped.goal), np.zeros_like(body.data.qvel))
    return env.render()


PICTURES: dict[str, Callable[[Any], Any]] = {"gym_pusht/PushT-": picture_pusht, "PointMaze_": picture_point_maze}
"""Functions from an environment that was reset to the picture of its goal, by the beginning of the environment's name.
They leave the environment in another state."""


class ShowGoal(gymnasium.Wrapper):
    """Reports `is_success` and, after a reset, `goal_frame`, and nothing else."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment.

        Raises:
            BadInput: it reports no success, or the picture of its goal is unknown.
        """
        if seed is None:
            seed = int(self.env.unwrapped.np_random.integers(1 << 31))
        observation, info = self.env.reset(seed=seed, options=options)
        goal = info.get("goal_frame")
        if goal is None:
            goal = self._picture()
            observation, info = self.env.reset(seed=seed, options=options)
        return observation, self._success(info) | {"goal_frame": np.asarray(goal, np.uint8)}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Carry out an action."""
        observation, reward, ended, cut, info = self.env.step(action)
        return observation, reward, ended, cut, self._success(info)

    def _success(self, info: dict[str, Any]) -> dict[str, Any]:
        for name in ("is_success", "success"):
            if name in info:
                return {"is_success": bool(info[name])}
        raise BadInput(f"{self._name} reports neither info['is_success'] nor info['success'], so success is unknown")

    def _picture(self) -> Any:
        for beginning, picture in PICTURES.items():
            if self._name.startswith(beginning):
                return picture(self.env)
        raise BadInput(f"{self._name} does not say what its goal looks like; report it as info['goal_frame']")

    @property
    def _name(self) -> str:
        return self.env.spec.id if self.env.spec else type(self.env.unwrapped).__name__
