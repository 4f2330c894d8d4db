"""Environments of gymnasium as worlds: `--world gym:gym_pusht/PushT-v0`, a process for each episode.

An environment must render to an array (`render_mode="rgb_array"`), have a bounded box of actions, report success as
`info["is_success"]` or `info["success"]`, and show its goal: `info["goal_frame"]`, or a function of `gym_goals`.

Letters: E episodes, A columns of an action, H W P height and width in pixels.
"""

import importlib
import multiprocessing
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image

from vjepa.planning.worlds import Tasks, View
from vjepa_data.errors import BadInput
from vjepa_data.rng import generator
from vjepa_data.worlds.base import LayoutKind


def make_environment(name: str) -> Any:
    """Make an environment that shows its goal. Its package registers it when it is imported: NAMESPACE/NAME of package
    NAMESPACE, or PACKAGE:NAME.
    """
    import gymnasium

    from vjepa.planning.gym_goals import ShowGoal

    if "/" in name and ":" not in name:
        importlib.import_module(name.partition("/")[0])
    return ShowGoal(gymnasium.make(name, render_mode="rgb_array", disable_env_checker=True))


class GymWorld:
    """An environment of gymnasium. It cannot be computed ahead, so it has no oracle and no straight line."""

    simulator = None
    goal_distance = 0.5
    """The distance is 0 after a success and 1 before."""

    def __init__(self, name: str) -> None:
        """Make the environment once, for its bounds and to see that it shows its goal.

        Raises:
            BadInput: gymnasium or the environment is missing, or the environment lacks information that a planner
                needs.
        """
        try:
            import gymnasium
        except ModuleNotFoundError:
            raise BadInput("worlds of gymnasium need the package; pip install 'vjepa-pretrain[worlds]'") from None
        self.name, self._gym = f"gym:{name}", gymnasium
        self._id = name
        try:
            env = make_environment(name)
        except (ModuleNotFoundError, gymnasium.error.Error) as error:
            raise BadInput(f"gymnasium has no environment {name!r} ({error}); pip install its package") from None
        try:
            space = env.action_space
            if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
                raise BadInput(f"{name} has actions {space}; a planner needs a box of one axis")
            self.low, self.high = space.low.astype(np.float64), space.high.astype(np.float64)
            self.fps = float(env.metadata.get("render_fps", 10))
            env.reset(seed=0)
        finally:
            env.close()

    def tasks(self, numbers: Sequence[int], *, seed: int, layout: LayoutKind) -> Tasks:
        """Return tasks: a start is the seed with which the environment is reset, a function of (seed, number)."""
        seeds = [generator(seed, f"plan {self.name}", n).integers(1 << 31) for n in numbers]
        starts = np.array(seeds, np.float64)[:, None]
        return Tasks(np.asarray(numbers), starts, np.zeros_like(starts), np.zeros((len(seeds), 0)))

    def tasks_at(self, numbers: Sequence[int], *, seed: int, layout: LayoutKind, steps: int) -> Tasks:
        """Refuse: the states of an environment cannot be set.

        Raises:
            BadInput: always.
        """
        raise BadInput(f"{self.name} cannot be set to a goal so many steps away; leave --per-distance out")

    def play(self, tasks: Tasks, px: int) -> "GymPlay":
        """Start a process for each episode and reset it."""
        return GymPlay(self._gym, partial(make_environment, self._id), tasks, px)


class GymPlay:
    """Episodes of an environment, each in a process."""

    def __init__(self, gym: Any, make: Any, tasks: Tasks, px: int) -> None:
        self.tasks, self._px = tasks, px
        mode = gym.vector.AutoresetMode.DISABLED
        # Processes fork from a server that has imported this module and no torch.
        multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, "gymnasium"])
        self._envs = gym.vector.AsyncVectorEnv([make] * len(tasks), autoreset_mode=mode, context="forkserver")
        _, info = self._envs.reset(seed=[int(start) for start in tasks.starts[:, 0]])
        self._goals = np.stack([_resize(frame, px) for frame in info["goal_frame"]])
        self._is_reached = np.asarray(info["is_success"], bool)
        self._is_over = np.zeros(len(tasks), bool)

    def view(self) -> View:
        """Return all that can be known of the episodes now."""
        frames = np.stack([_resize(np.asarray(frame), self._px) for frame in self._envs.render()])
        return View(frames, self._goals, self.tasks, self.tasks.starts, self.distance())

    def distance(self) -> Float[ndarray, " E"]:
        """Return 0 for episodes that are at their goal, else 1."""
        return 1.0 - self._is_reached

    def step(self, actions: Float[ndarray, "E A"]) -> None:
        """Carry out an action in each episode. An episode that the environment ended keeps its last result."""
        kind = self._envs.single_action_space.dtype
        _, _, ended, cut, info = self._envs.step(actions.astype(kind))
        self._is_reached = np.where(self._is_over, self._is_reached, np.asarray(info["is_success"], bool))
        self._is_over |= ended | cut

    def close(self) -> None:
        """End the processes."""
        self._envs.close()


def _resize(frame: ndarray, px: int) -> UInt8[ndarray, "P P 3"]:
    return np.asarray(Image.fromarray(frame).resize((px, px), Image.Resampling.BOX))
