"""A point that must go right, to a line that is drawn at each reset, as an environment of gymnasium."""

from typing import Any

import gymnasium
import numpy as np

PX = 40


class Point(gymnasium.Env[np.ndarray, np.ndarray]):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    action_space = gymnasium.spaces.Box(-0.1, 0.2, (2,), np.float32)
    observation_space = gymnasium.spaces.Box(0, 1, (2,), np.float64)

    def __init__(self, render_mode: str = "rgb_array") -> None:
        self.render_mode, self.place, self.goal = render_mode, np.zeros(2), 1.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.place, self.goal = np.array([0.1, self.np_random.random()]), 0.7 + 0.2 * self.np_random.random()
        return self.place, self._info()

    def step(self, action: np.ndarray):
        self.place = np.clip(self.place + action, 0, 1)
        return self.place, 0.0, self._is_reached(), False, self._info()

    def render(self) -> Any:
        return self._draw(self.place[0])

    def _info(self) -> dict[str, Any]:
        return {"is_success": self._is_reached(), "goal_frame": self._draw(self.goal)}

    def _is_reached(self) -> bool:
        return bool(self.place[0] > self.goal)

    def _draw(self, x: float) -> np.ndarray:
        frame = np.zeros((PX, PX, 3), np.uint8)
        frame[:, : 1 + int(x * (PX - 1))] = 255
        return frame


class Terse(Point):
    """Reports success by its other name, and no picture of the goal."""

    def _info(self) -> dict[str, Any]:
        return {"success": self._is_reached()}


gymnasium.register("tiny_env/Point-v0", f"{__name__}:Point")
gymnasium.register("tiny_env/Terse-v0", f"{__name__}:Terse")
