"""The evaluation of planning: the same tasks for every agent, in lock step, resumable.

    tasks   numbers 0, 1, 2, ... are drawn and sorted into three kinds
              solved     already at the goal: counted and never played
              straight   a straight line reaches the goal within the budget: played, reported apart
              hard       everything else: the score
    play    plan, carry out some steps, plan again, until the budget of steps is used up, whatever happens
    score   first step at the goal, and whether an episode is at the goal when its budget ends

The world's distance decides about success and nothing else: no agent stops or changes when it arrives.

Letters: E episodes, B steps of the budget, A columns of an action.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from vjepa.planning.agents import Agent, StraightAgent
from vjepa.planning.worlds import Tasks, World
from vjepa_data.errors import BadInput
from vjepa_data.worlds.base import LayoutKind

DRAWN_TOGETHER = 256
PROCESSES = 8
"""Tasks of a world that cannot be simulated that are drawn together: each has a process."""

MOST_DRAWN = 100
"""Tasks that are drawn for each task that is wanted, before the search ends with an error."""

GROUP = "hard"


@dataclass(frozen=True)
class TaskSet:
    """Tasks by kind."""

    groups: dict[str, Tasks]
    drawn: int
    solved: int
    """Drawn tasks that were at the goal from the start."""


def draw_tasks(
    world: World,
    *,
    episodes: int,
    seed: int,
    layout: LayoutKind,
    budget: int,
    distances: Sequence[int] = (),
    per_distance: int = 0,
) -> TaskSet:
    """Draw the tasks of an evaluation.

    Args:
        world: the world.
        episodes: number of hard tasks, and the largest number of straight tasks: a quarter of it.
        seed: seed of the tasks.
        layout: which layouts to draw.
        budget: steps of an episode.
        distances: further groups: goals so many steps away.
        per_distance: tasks of each of these groups.

    Raises:
        BadInput: hardly any task is hard.
    """
    kinds: dict[str, list[Tasks]] = {"hard": [], "straight": []}
    counts, drawn, solved = {"hard": 0, "straight": 0}, 0, 0
    together = DRAWN_TOGETHER if world.simulator is not None else min(episodes, PROCESSES)
    while counts["hard"] < episodes:
        if drawn >= MOST_DRAWN * episodes + DRAWN_TOGETHER:
            raise BadInput(
                f"only {counts['hard']} of {drawn} tasks of {world.name} cannot be solved by a straight line; give "
                "fewer --episodes, or a smaller --budget"
            )
        tasks = world.tasks(range(drawn, drawn + together), seed=seed, layout=layout)
        at_goal, is_straight = _easy(world, tasks, budget)
        last = np.flatnonzero(~at_goal & ~is_straight)[: episodes - counts["hard"]]
        end = int(last[-1]) + 1 if counts["hard"] + len(last) == episodes else together
        within = np.arange(together) < end
        for name, rows in (("hard", ~at_goal & ~is_straight), ("straight", ~at_goal & is_straight)):
            found = tasks.take(within & rows)
            kinds[name].append(found)
            counts[name] += len(found)
        drawn, solved = drawn + end, solved + int((at_goal & within).sum())
    groups = {name: Tasks.join(parts) for name, parts in kinds.items()}
    groups["straight"] = groups["straight"].take(slice(0, -(-episodes // 4)))
    for steps in distances if per_distance else ():
        at_distance = world.tasks_at(range(4 * per_distance), seed=seed, layout=layout, steps=steps)
        away = _distance(world, at_distance) >= world.goal_distance
        groups[f"{steps} steps away"] = at_distance.take(np.flatnonzero(away)[:per_distance])
    return TaskSet({name: tasks for name, tasks in groups.items() if len(tasks)}, drawn, solved)


def _easy(world: World, tasks: Tasks, budget: int) -> tuple[ndarray, ndarray]:
    """Return which tasks are solved at the start, and which a straight line solves."""
    at_goal = _distance(world, tasks) < world.goal_distance
    if world.simulator is None:
        return at_goal, np.zeros_like(at_goal)
    straight = play(world, StraightAgent(world.simulator), tasks, px=16, budget=budget)
    return at_goal, np.any(straight.distances < world.goal_distance, axis=1)


def _distance(world: World, tasks: Tasks) -> Float[ndarray, " E"]:
    episodes = world.play(tasks, 16)
    try:
        return episodes.distance()
    finally:
        episodes.close()


@dataclass(frozen=True)
class Played:
    """Episodes that were played to the end of their budget."""

    distances: Float[ndarray, "E steps"]
    """Distance from the goal before each step and at the end, budget + 1 numbers."""

    actions: Float[ndarray, "E B A"]
    replan_steps: tuple[int, ...]


def play(world: World, agent: Agent, tasks: Tasks, *, px: int, budget: int) -> Played:
    """Play tasks in lock step to the end of the budget."""
    episodes = world.play(tasks, px)
    try:
        distances, actions, replans = [episodes.distance()], [], []
        while len(actions) < budget:
            replans.append(len(actions))
            chosen = agent.act(episodes.view(), len(actions))
            for step in range(min(chosen.shape[1], budget - len(actions))):
                actions.append(chosen[:, step])
                episodes.step(chosen[:, step])
                distances.append(episodes.distance())
    finally:
        episodes.close()
    return Played(np.stack(distances, 1), np.stack(actions, 1), tuple(replans))


# Results on disk

RECORDS = "episodes.jsonl"


class Records:
    """The episodes that are done, in a file with a line for each batch of an agent. A torn last line is dropped."""

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        """Open the records of an evaluation.

        Args:
            folder: its folder, created if it does not exist.
            key: everything that changes a result. The first line of the file holds it.

        Raises:
            BadInput: the folder holds the records of another evaluation.
        """
        self._path, self.lines = folder / RECORDS, []
        folder.mkdir(parents=True, exist_ok=True)
        key = json.loads(json.dumps(key))
        if self._path.exists():
            text = self._path.read_text()
            whole = text[: text.rfind("\n") + 1]
            found = [json.loads(line) for line in whole.splitlines()]
            if found and found[0] != key:
                changed = sorted(name for name in {*key, *found[0]} if key.get(name) != found[0].get(name))
                raise BadInput(
                    f"{folder} holds an evaluation with another {', '.join(changed)}; give another folder with --out, "
                    "or replace it with --overwrite"
                )
            if len(whole) < len(text):
                os.truncate(self._path, len(whole.encode()))
            self.lines = found[1:]
            if found:
                return
        self._append(key)

    def done(self, agent: str, group: str) -> int:
        """Return the number of episodes of an agent that are done, from the first on."""
        return sum(len(line["episodes"]) for line in self.lines if (line["agent"], line["group"]) == (agent, group))

    def add(self, line: Mapping[str, Any]) -> None:
        """Write the episodes of a batch."""
        self._append(line)
        self.lines.append(line)

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def run_agents(
    world: World,
    agents: Mapping[str, Callable[[], Agent]],
    tasks: TaskSet,
    records: Records,
    *,
    px: int,
    budget: int,
    batch: int,
    skip: Callable[[str, str], bool] = lambda agent, group: False,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Play all groups of tasks with all agents, except batches that are on record.

    Args:
        world: the world.
        agents: makers of agents by name. An agent is made when it has something to play.
        tasks: the tasks.
        records: finished episodes, and the place of new results.
        px: height and width of the frames.
        budget: steps of an episode.
        batch: episodes that are played together. Results do not depend on it.
        skip: which groups an agent does not play.
        advance: called with the number of episodes that are done and of all.
    """
    jobs = [(name, group) for name in agents for group in tasks.groups if not skip(name, group)]
    total = sum(len(tasks.groups[group]) for _, group in jobs)
    finished = sum(records.done(*job) for job in jobs)
    made: dict[str, Agent] = {}
    for name, group in jobs:
        all_tasks = tasks.groups[group]
        for first in range(records.done(name, group), len(all_tasks), batch):
            agent = made.setdefault(name, agents[name]()) if name not in made else made[name]
            before, began = (agent.counts.plans, agent.counts.calls), time.perf_counter()
            some = all_tasks.take(slice(first, first + batch))
            found = play(world, agent, some, px=px, budget=budget)
            records.add(
                {
                    "agent": name,
                    "group": group,
                    "episodes": some.numbers.tolist(),
                    "distances": found.distances.round(6).tolist(),
                    "actions": found.actions.round(7).tolist(),
                    "seconds": round(time.perf_counter() - began, 3),
                    "plans": agent.counts.plans - before[0],
                    "calls": agent.counts.calls - before[1],
                }
            )
            finished += len(some)
            advance(finished, total)
