"""`vjepa plan`: a model, a world and a planner, with the agents that they are compared with.

    plan.json        settings, task counts, and a row for each agent and group of tasks
    episodes.jsonl   every distance and every action, a line for each batch; an interrupted evaluation continues here

The agents of `--against`:

    random      uniform actions
    straight    a straight line to the goal, from true states
    oracle      the same planner with the true dynamics and the true distance
    cloning     goal-conditioned behaviour cloning on the model's latents
    inverse     an inverse model on the model's latents
    untrained   the same planner with the model's initial weights
    shuffled    the same planner, but each plan gets the cost of another
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch

import vjepa
from vjepa.atomic import check_free, new_file
from vjepa.evals.untrained import untrained_model
from vjepa.planning.agents import Agent, PlannerAgent, Planning, RandomAgent, StraightAgent
from vjepa.planning.costs import CostName
from vjepa.planning.goal_nets import (
    STEPS,
    CloningAgent,
    Examples,
    GoalNet,
    fit_cloning,
    fit_inverse,
    fit_readout,
    fit_temporal,
    make_examples,
    temporal_distance,
)
from vjepa.planning.harness import GROUP, RECORDS, Records, TaskSet, draw_tasks, run_agents
from vjepa.planning.planners import DEFAULT_EFFORT, Effort, PlannerName
from vjepa.planning.results import Row, format_rows, make_rows
from vjepa.planning.scoring import (
    LatentDistance,
    LearnedScorer,
    OracleScorer,
    ShuffledScorer,
    TrueDistanceScorer,
    TrueDynamicsScorer,
    check_model,
    squared_error,
)
from vjepa.planning.worlds import SimulatedWorld, World, make_world
from vjepa.progress import progress
from vjepa.version import __version__
from vjepa.weights.world_model import WorldModel
from vjepa_data.errors import BadInput
from vjepa_data.worlds.base import LayoutKind

Against = Literal["random", "straight", "oracle", "cloning", "inverse", "untrained", "shuffled"]
AGAINST: tuple[Against, ...] = get_args(Against)
NEEDS_SIMULATOR: tuple[Against, ...] = ("straight", "oracle", "cloning", "inverse")
NEEDS_MODEL: tuple[Against, ...] = ("cloning", "inverse", "untrained", "shuffled")

RESULT = "plan.json"
DISTANCE_AGENTS = ("model", "oracle")
"""Agents that are played at goals of each distance."""

TRUE_LATENT, LEARNED_TRUE = "true dynamics, latent cost", "learned dynamics, true cost"


@dataclass(frozen=True)
class PlanSettings:
    """Everything that an evaluation depends on, the model excepted."""

    world: str = "two_room"
    layout: LayoutKind = "fixed"
    planner: PlannerName | Literal["inverse"] = "cem"
    cost: CostName = "min"
    effort: Effort = DEFAULT_EFFORT["cem"]
    horizon: int = 20
    execute: int = 4
    budget: int = 40
    episodes: int = 200
    against: tuple[Against, ...] = ("random", "straight", "oracle")
    distances: tuple[int, ...] = (5, 10, 20, 40)
    per_distance: int = 0
    diagnose: int = 0
    """Hard tasks on which the two mixed forms of the diagnosis are played, the first of them."""

    seed: int = 0
    data_seed: int = 0
    """Seed of the episodes that cloning, the inverse model, the temporal distance and the readout learn from."""

    data_episodes: int = 400
    data_updates: int = STEPS
    """Training steps of each of these networks."""


def effort_of(planner: str, **changes: Any) -> Effort:
    """Return the effort of a planner by default, with the given changes. None changes nothing."""
    given = {name: value for name, value in changes.items() if value is not None}
    default = DEFAULT_EFFORT["cem" if planner == "inverse" else planner]  # pyright: ignore[reportArgumentType]
    if "samples" in given and "elites" not in given:
        given["elites"] = min(default.elites, given["samples"])
    return replace(default, **given)


class Contenders:
    """Makes the agents of an evaluation when they are needed."""

    def __init__(self, settings: PlanSettings, world: World, model: WorldModel | None) -> None:
        """Check that every agent can be made.

        Raises:
            BadInput: an agent needs a model or a simulator that there is not, or the model and the world do not fit.
        """
        self.settings, self.world, self.model = settings, world, model
        if model is not None:
            check_model(model)
            check_fit(world, channels=action_channels(model), fps=model.fps)
        needs_data = settings.cost == "temporal" or settings.planner == "inverse" or settings.diagnose
        for name in settings.against:
            if name in NEEDS_MODEL and model is None:
                raise BadInput(f"--against {name} needs a model; give one, or leave {name} out")
            if name in NEEDS_SIMULATOR and world.simulator is None:
                raise BadInput(f"--against {name} needs a world that can be simulated; leave it out for {world.name}")
        if needs_data and not isinstance(world, SimulatedWorld):
            raise BadInput(f"cost temporal, planner inverse and --diagnose need a simulated world, not {world.name}")
        flat = [name for name in ("oracle", "shuffled") if name in settings.against]
        if settings.planner == "adam" and (flat or settings.diagnose):
            raise BadInput(f"adam follows gradients, and {flat or '--diagnose'} has none; leave it out")

    def agents(self) -> dict[str, Callable[[], Agent]]:
        """Return makers of all agents by name, the model first."""
        settings, world = self.settings, self.world
        makers: dict[str, Callable[[], Agent]] = {
            "random": lambda: RandomAgent(world, seed=settings.seed),
            "straight": lambda: StraightAgent(self._simulator),
            "oracle": lambda: self._planner(OracleScorer(self._simulator, self._true_cost)),
            "cloning": self._cloning,
            "inverse": self._inverse,
            "untrained": self._untrained,
            "shuffled": lambda: self._planner(ShuffledScorer(self._model, settings.cost, self._distance)),
        }
        chosen = {name: makers[name] for name in settings.against}
        if self.model is None:
            return chosen
        own = self._inverse if settings.planner == "inverse" else self._learned
        found: dict[str, Callable[[], Agent]] = {"model": own, **chosen}
        if settings.diagnose:
            found[TRUE_LATENT] = lambda: self._planner(
                TrueDynamicsScorer(self._model, self._simulator, settings.cost, self._distance)
            )
            found[LEARNED_TRUE] = lambda: self._planner(
                TrueDistanceScorer(self._model, self._simulator, self._true_cost, fit_readout(self._examples))
            )
        return found

    def _learned(self) -> PlannerAgent:
        return self._planner(LearnedScorer(self._model, self.settings.cost, self._distance))

    def _untrained(self) -> PlannerAgent:
        device = next(self._model.parameters()).device
        return self._planner(LearnedScorer(untrained_model(self._model, seed=0).to(device), self._latent_cost))

    def _cloning(self) -> CloningAgent:
        settings = self.settings
        return CloningAgent(self._model, fit_cloning(self._examples, seed=settings.seed, updates=settings.data_updates))

    def _inverse(self) -> CloningAgent:
        net = fit_inverse(self._examples, seed=self.settings.seed, updates=self.settings.data_updates)
        return CloningAgent(self._model, net, temporal=self._temporal)

    def _planner(self, scorer: Any) -> PlannerAgent:
        settings = self.settings
        name = "cem" if settings.planner == "inverse" else settings.planner
        planning = Planning(name, settings.effort, settings.horizon, settings.execute, settings.seed)
        device = "cpu" if self.model is None else next(self.model.parameters()).device
        return PlannerAgent(scorer, planning, low=self.world.low, high=self.world.high, device=device)

    @property
    def _model(self) -> WorldModel:
        assert self.model is not None, "checked in __init__"
        return self.model

    @property
    def _simulator(self) -> Any:
        assert self.world.simulator is not None, "checked in __init__"
        return self.world.simulator

    @property
    def _true_cost(self) -> CostName:
        """A true distance replaces the learned distance: `min` has the same form as `temporal`."""
        return "min" if self.settings.cost == "temporal" else self.settings.cost

    @property
    def _latent_cost(self) -> CostName:
        return self._true_cost

    @property
    def _distance(self) -> LatentDistance:
        return temporal_distance(self._temporal) if self.settings.cost == "temporal" else squared_error

    @cached_property
    def _temporal(self) -> GoalNet:
        return fit_temporal(self._examples, seed=self.settings.seed, updates=self.settings.data_updates)

    @cached_property
    def _examples(self) -> Examples:
        assert isinstance(self.world, SimulatedWorld), "checked in __init__"
        settings = self.settings
        layout: LayoutKind = "random" if settings.layout == "held_out" else settings.layout
        return make_examples(
            self._model, self.world, layout=layout, seed=settings.data_seed, episodes=settings.data_episodes
        )


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that is done."""

    contenders: Contenders
    tasks: TaskSet
    lines: Sequence[Mapping[str, Any]]
    """The records, a line for each batch of an agent."""

    rows: Sequence[Row]


def check_fit(world: World, *, channels: int, fps: float) -> None:
    """Check that a model's actions match the actions of a world.

    Args:
        world: the world.
        channels: columns of the model's actions.
        fps: frames per second of its clips.

    Raises:
        BadInput: the number of columns or the rate differs.
    """
    if channels != len(world.low):
        raise BadInput(f"the model has actions of {channels} channels, {world.name} of {len(world.low)}")
    if abs(fps - world.fps) > 1e-6:
        raise BadInput(
            f"the model has seen clips of {fps:g} frames per second, and {world.name} acts {world.fps:g} times "
            f"per second; train with data.clip.fps={world.fps:g}"
        )


def action_channels(model: WorldModel) -> int:
    """Return the columns of a model's actions."""
    part = model.parts["dynamics"]
    scale = part.actions if hasattr(part, "actions") else part.scales
    return len(scale.mean)  # pyright: ignore[reportArgumentType]


def fingerprint(model: WorldModel) -> str:
    """Return a hash of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def evaluate(
    model_path: Path | None,
    settings: PlanSettings,
    out: Path,
    *,
    part: Literal["target", "encoder"] = "target",
    batch: int = 25,
    device: str | None = None,
    overwrite: bool = False,
) -> Evaluation:
    """Play all agents, and write the result.

    Args:
        model_path: a run, a checkpoint or an export with a dynamics predictor. None plays the other agents alone.
        settings: the evaluation.
        out: folder of the result. An evaluation that was interrupted there continues.
        part: weights of a run to use.
        batch: episodes that are played between two records. Results do not depend on it.
        device: device of the model. By default a GPU, if any.
        overwrite: replace an earlier result.

    Raises:
        BadInput: the model cannot plan, the settings do not fit the world, or `out` holds something else.
    """
    result = out / RESULT
    check_free(result, overwrite=overwrite)
    if out.exists() and any(out.iterdir()) and not (out / RECORDS).exists():
        raise BadInput(f"{out} is not empty and holds no {RECORDS}; give another folder with --out")
    if overwrite and out.exists():
        shutil.rmtree(out)
    world = make_world(settings.world)
    model = None
    if model_path is not None:
        model = vjepa.load(model_path, part).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    contenders = Contenders(settings, world, model)
    agents = contenders.agents()
    tasks = draw_tasks(
        world,
        episodes=settings.episodes,
        seed=settings.seed,
        layout=settings.layout,
        budget=settings.budget,
        distances=settings.distances,
        per_distance=settings.per_distance,
    )
    if settings.diagnose:
        tasks.groups["diagnosis"] = tasks.groups[GROUP].take(slice(0, settings.diagnose))
    key = asdict(settings) | {"model": None if model is None else fingerprint(model), "version": __version__}
    records = Records(out, key)
    px = 64 if model is None else model.px
    with progress("play episodes") as bar:
        run_agents(
            world, agents, tasks, records, px=px, budget=settings.budget, batch=batch, skip=_is_skipped, advance=bar
        )
    rows = make_rows(records.lines, agents=list(agents), groups=list(tasks.groups), goal_distance=world.goal_distance)
    content = {
        "format": 1,
        "model": None if model_path is None else str(model_path),
        "provenance": None if model is None else {k: v for k, v in model.provenance.items() if k in ("run", "step")},
        "settings": key,
        "tasks": task_counts(tasks),
        "goal_distance": world.goal_distance,
        "rows": [row.to_json() for row in rows],
    }
    with new_file(result, overwrite=True) as file:
        file.write_text(json.dumps(content, indent=1) + "\n")
    return Evaluation(contenders, tasks, records.lines, rows)


def _is_skipped(agent: str, group: str) -> bool:
    """The diagnosis is for planners alone, and goals at each distance for the model and the oracle."""
    if agent in (TRUE_LATENT, LEARNED_TRUE):
        return group != "diagnosis"
    if group == "diagnosis" or group.endswith("away"):
        return agent not in DISTANCE_AGENTS
    return False


def task_counts(tasks: TaskSet) -> Mapping[str, int]:
    """Return how many tasks were drawn, left out and played."""
    return {"drawn": tasks.drawn, "solved": tasks.solved} | {name: len(group) for name, group in tasks.groups.items()}


__all__ = ["AGAINST", "PlanSettings", "effort_of", "evaluate", "format_rows"]
