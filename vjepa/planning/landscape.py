"""The energy of actions: is the least energy where the true action is?

An action is held for a few steps from a state, and the frame that follows is the goal. The energy of every action of a
grid is the distance of the predicted latent from that goal. A model that knows its actions has its minimum at the true
action. Source of the picture: V-JEPA 2-AC (arXiv:2506.09985), figure 9.

Letters: E starts, G points of the grid along an axis, A columns of an action.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from vjepa.planning.scoring import LearnedScorer, device_of, encode
from vjepa.planning.worlds import SimulatedWorld
from vjepa.weights.world_model import WorldModel
from vjepa_data.rng import generator
from vjepa_data.worlds.base import LayoutKind

POINTS, STEPS, STARTS = 21, 3, 16


@dataclass(frozen=True)
class Landscape:
    """Energies over the first two columns of an action, of several starts."""

    values: tuple[Float[ndarray, " G"], Float[ndarray, " G"]]
    """Actions along each axis."""

    energies: Float[ndarray, "E G G"]
    """First axis: the first column of an action."""

    true: Float[ndarray, "E 2"]
    best: Float[ndarray, "E 2"]

    @property
    def distances(self) -> Float[ndarray, " E"]:
        """Distance of the minimum from the true action, relative to the largest action."""
        return np.linalg.norm(self.best - self.true, axis=1) / max(axis[-1] for axis in self.values)

    @property
    def angles(self) -> Float[ndarray, " E"]:
        """Angle between the minimum and the true action, in degrees."""
        best, true = (np.arctan2(each[:, 1], each[:, 0]) for each in (self.best, self.true))
        return np.degrees(np.abs((best - true + np.pi) % (2 * np.pi) - np.pi))


def energy_landscape(model: WorldModel, world: SimulatedWorld, *, layout: LayoutKind, seed: int) -> Landscape:
    """Compute the energy of a grid of actions from several starts. True actions are at 70 % of the largest."""
    simulator = world.simulator
    tasks = world.tasks(range(STARTS), seed=seed, layout=layout)
    angle = 2 * np.pi * np.array([generator(seed, "landscape", e).random() for e in range(STARTS)])
    true = 0.7 * world.high[:2] * np.stack((np.cos(angle), np.sin(angle)), axis=1)
    after = tasks.starts
    for _ in range(STEPS):
        after = simulator.step(after, true, tasks.layouts)
    now, goals = encode(model, *(simulator.render(states, tasks.layouts, model.px) for states in (tasks.starts, after)))
    axes = [np.linspace(low, high, POINTS) for low, high in zip(world.low[:2], world.high[:2], strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 1, 2).repeat(STEPS, axis=1)
    actions = torch.from_numpy(grid).float().to(device_of(model))[None]
    scorer = LearnedScorer(model, "last")
    with torch.no_grad():
        rows = [scorer.cost_of_latents(now[e : e + 1], goals[e : e + 1])(actions)[0] for e in range(STARTS)]
    energies = torch.stack(rows).cpu().numpy()
    best = grid[energies.argmin(1), 0]
    return Landscape((axes[0], axes[1]), energies.reshape(STARTS, POINTS, POINTS), true, best)
