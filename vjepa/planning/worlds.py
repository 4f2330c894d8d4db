"""Worlds in which plans are carried out, and the tasks that are set in them.

    play = world.play(tasks, px)       all episodes at their starts, in lock step
    play.view()                        frames and pictures of the goals
    play.step(actions)                 one frame further
    play.distance()                    how far each episode is from its goal, for the score

A world that can also be computed ahead from any state has a `simulator`. The oracle and the diagnosis need it.

Letters: E episodes, N samples, H steps of a plan, S columns of a state, A columns of an action, L columns of a layout,
P height and width in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, UInt8
from numpy import ndarray

from vjepa_data.errors import BadInput
from vjepa_data.rng import generator
from vjepa_data.worlds import base
from vjepa_data.worlds.base import LAYOUT_NUMBERS, STATE_NUMBERS, LayoutKind
from vjepa_data.worlds.episodes import WORLDS, simulate
from vjepa_data.worlds.files import FPS


@dataclass(frozen=True)
class Tasks:
    """Starts and goals. Row `i` of every array belongs to episode `numbers[i]`."""

    numbers: Int[ndarray, " E"]
    starts: Float[ndarray, "E S"]
    goals: Float[ndarray, "E S"]
    layouts: Float[ndarray, "E L"]

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, rows: Bool[ndarray, " E"] | Int[ndarray, " _"] | slice) -> "Tasks":
        """Return some of the tasks."""
        return Tasks(self.numbers[rows], self.starts[rows], self.goals[rows], self.layouts[rows])

    @classmethod
    def join(cls, parts: Sequence["Tasks"]) -> "Tasks":
        """Return the tasks of all parts."""
        names = ("numbers", "starts", "goals", "layouts")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@runtime_checkable
class Simulator(Protocol):
    """A world that can be set to any state. Rows are independent."""

    def step(self, states: ndarray, actions: ndarray, layouts: ndarray) -> ndarray:
        """Return the states [E S] of the next frame."""
        ...

    def distance(self, states: ndarray, goals: ndarray) -> ndarray:
        """Return the distance [E] of each state from its goal."""
        ...

    def straight(self, states: ndarray, goals: ndarray) -> ndarray:
        """Return an action [E A] in the direction of the goal."""
        ...

    def render(self, states: ndarray, layouts: ndarray, px: int) -> ndarray:
        """Return frames, uint8 [E P P 3]."""
        ...


@dataclass(frozen=True)
class View:
    """Episodes at the same step. A learned model is given the frames and the pictures of the goals alone."""

    frames: UInt8[ndarray, "E P P 3"]
    goals: UInt8[ndarray, "E P P 3"]
    tasks: Tasks
    states: Float[ndarray, "E S"]
    distance: Float[ndarray, " E"]

    def __len__(self) -> int:
        return len(self.tasks)

    def take(self, rows: slice) -> "View":
        """Return some of the episodes."""
        tasks = self.tasks.take(rows)
        return View(self.frames[rows], self.goals[rows], tasks, self.states[rows], self.distance[rows])


@runtime_checkable
class Play(Protocol):
    """Episodes that are played in lock step."""

    tasks: Tasks

    def view(self) -> View:
        """Return all that can be known of the episodes now."""
        ...

    def distance(self) -> Float[ndarray, " E"]:
        """Return the distance of each episode from its goal."""
        ...

    def step(self, actions: Float[ndarray, "E A"]) -> None:
        """Carry out an action in each episode."""
        ...

    def close(self) -> None:
        """Free the resources of the episodes."""
        ...


@runtime_checkable
class World(Protocol):
    """A world with tasks."""

    name: str
    low: Float[ndarray, " A"]
    high: Float[ndarray, " A"]

    goal_distance: float
    """A goal within this distance is reached."""

    fps: float
    """Actions per second."""

    @property
    def simulator(self) -> Simulator | None:
        """The world as a function of states, or None if it cannot be set to a state."""
        ...

    def tasks(self, numbers: Sequence[int], *, seed: int, layout: LayoutKind) -> Tasks:
        """Return tasks by number, each a function of (seed, number)."""
        ...

    def tasks_at(self, numbers: Sequence[int], *, seed: int, layout: LayoutKind, steps: int) -> Tasks:
        """Return tasks whose goal is the state after so many steps of a policy."""
        ...

    def play(self, tasks: Tasks, px: int) -> Play:
        """Set each episode to its start."""
        ...


class SimulatedWorld:
    """A world of `vjepa_data.worlds`."""

    fps = float(FPS)

    def __init__(self, simulator: base.World) -> None:
        self.simulator: base.World = simulator
        self.name = simulator.name
        self.high = np.full(len(simulator.action_columns), simulator.max_action)
        self.low = -self.high
        self.goal_distance = simulator.goal_distance

    def tasks(self, numbers: Sequence[int], *, seed: int, layout: LayoutKind) -> Tasks:
        """Return tasks whose start and goal are drawn independently.

        The draws have names of their own: no training episode shares them, whatever its seed.
        """

        def draw(purpose: str, count: int) -> Float64[ndarray, "E U"]:
            return np.stack([generator(seed, f"plan {self.name} {purpose}", n).random(count) for n in numbers])

        layouts = self.simulator.layouts(layout, draw("layout", LAYOUT_NUMBERS))
        starts, goals = (self.simulator.starts(layouts, draw(name, STATE_NUMBERS)) for name in ("start", "goal"))
        return Tasks(np.asarray(numbers), starts, goals, layouts)

    def tasks_at(self, numbers: Sequence[int], *, seed: int, layout: LayoutKind, steps: int) -> Tasks:
        """Return tasks whose goal is the last state of an episode of the `mixed` policy, held out by its seed."""
        held_out = int(generator(seed, f"plan {self.name} episodes").integers(1 << 62))
        found = simulate(
            self.simulator, policy="mixed", layout=layout, seed=held_out, episodes=numbers, frames=steps + 1
        )
        return Tasks(np.asarray(numbers), found.states[:, 0], found.states[:, -1], found.layouts)

    def play(self, tasks: Tasks, px: int) -> "SimulatedPlay":
        """Set each episode to its start."""
        return SimulatedPlay(self.simulator, tasks, px)


class SimulatedPlay:
    """Episodes of a simulated world."""

    def __init__(self, simulator: base.World, tasks: Tasks, px: int) -> None:
        self.tasks, self._simulator, self._px, self._states = tasks, simulator, px, tasks.starts
        self._goals = simulator.render(tasks.goals, tasks.layouts, px)

    def view(self) -> View:
        """Return all that can be known of the episodes now."""
        frames = self._simulator.render(self._states, self.tasks.layouts, self._px)
        return View(frames, self._goals, self.tasks, self._states, self.distance())

    def distance(self) -> Float[ndarray, " E"]:
        """Return the distance of each episode from its goal."""
        return self._simulator.distance(self._states, self.tasks.goals)

    def step(self, actions: Float[ndarray, "E A"]) -> None:
        """Carry out an action in each episode."""
        self._states = self._simulator.step(self._states, np.asarray(actions, np.float64), self.tasks.layouts)

    def close(self) -> None:
        """Do nothing: states are arrays."""


def make_world(name: str) -> World:
    """Return a world by name.

    Raises:
        BadInput: the world is unknown.
    """
    if name in WORLDS:
        return SimulatedWorld(WORLDS[name])
    if name.startswith("gym:"):
        from vjepa.planning.gym_world import GymWorld

        return GymWorld(name.removeprefix("gym:"))
    raise BadInput(f"unknown world {name!r}; give {', '.join(WORLDS)} or gym:ID for an environment of gymnasium")
