"""Networks on frozen latents that reach goals without search: cloning, an inverse model, a temporal distance.

    cloning            (z_t, z_{t+k})    -> a_t       goal-conditioned behaviour cloning with goals in hindsight
    inverse model      (z_t, z_{t+k}, k) -> a_t       the same with the number of steps (GC-IDM, arXiv:2605.08732)
    temporal distance  (z_t, z_{t+k})    -> k         a low quantile of k: the steps that a good policy needs

All are trained on pairs of frames of the same episodes, k steps apart. They are the honest comparison for a planner:
they see what the world model's encoder saw, and need no search.

Letters: E episodes, F frames of an episode, B pairs, D channels of a latent, all tokens side by side, A columns of an
action, S columns of a state.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor, nn

from vjepa.nn.init import init_weights
from vjepa.planning.agents import Counts
from vjepa.planning.scoring import device_of, encode
from vjepa.planning.worlds import SimulatedWorld, View
from vjepa.progress import track
from vjepa.weights.world_model import WorldModel
from vjepa_data.rng import generator
from vjepa_data.worlds.base import LayoutKind
from vjepa_data.worlds.episodes import simulate

HIDDEN = 256
STEPS, BATCH, LEARNING_RATE = 1500, 256, 1e-3
"""Training of a network. Chosen by hand; not revisited."""

FARTHEST = 32
"""Largest number of steps between a frame and its goal."""

LOW_QUANTILE = 0.1
"""Quantile of the steps that the temporal distance predicts: wandering episodes take longer than needed."""

ENCODED_TOGETHER = 256


@dataclass(frozen=True)
class Examples:
    """Latents of episodes with their actions and states."""

    latents: Float[Tensor, "E F h w C"]
    actions: Float[Tensor, "E F-1 A"]
    states: Float[Tensor, "E F S"]

    @property
    def flat(self) -> Float[Tensor, "E F D"]:
        """Latents with all tokens side by side."""
        return self.latents.flatten(2)


def make_examples(
    model: WorldModel, world: SimulatedWorld, *, layout: LayoutKind, seed: int, episodes: int, frames: int = 33
) -> Examples:
    """Simulate and encode episodes of the `mixed` policy: those that `vjepa synthesize` writes for the same seed."""
    simulator = world.simulator
    found = simulate(simulator, policy="mixed", layout=layout, seed=seed, episodes=range(episodes), frames=frames)
    layouts = np.repeat(found.layouts, frames, axis=0)
    states = found.states.reshape(episodes * frames, -1)
    parts = [slice(first, first + ENCODED_TOGETHER) for first in range(0, len(states), ENCODED_TOGETHER)]
    latents = [
        encode(model, simulator.render(states[part], layouts[part], model.px), alone=False)[0]
        for part in track(parts, "encode episodes", len(parts))
    ]
    device = device_of(model)
    return Examples(
        torch.cat(latents).unflatten(0, (episodes, frames)),
        torch.from_numpy(found.actions).float().to(device),
        torch.from_numpy(found.states).to(device),
    )


class GoalNet(nn.Module):
    """An MLP of a latent, the latent of a goal, and perhaps the number of steps between them."""

    def __init__(self, latent: int, out: int, *, takes_steps: bool = False) -> None:
        super().__init__()
        self.takes_steps = takes_steps
        self.mean, self.std = (nn.Buffer(value) for value in (torch.zeros(latent), torch.ones(latent)))
        self.layers = nn.Sequential(
            nn.Linear(2 * latent + takes_steps, HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, out),
        )

    def forward(
        self, now: Float[Tensor, "B D"], goal: Float[Tensor, "B D"], steps: Float[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B out"]:
        parts = [(z - self.mean) / self.std for z in (now, goal)]
        if self.takes_steps:
            assert steps is not None, "this network takes the number of steps"
            parts.append(steps[:, None] / FARTHEST)
        return self.layers(torch.cat(parts, dim=-1))


def fit(
    examples: Examples,
    *,
    name: str,
    seed: int,
    updates: int,
    out: int,
    takes_steps: bool,
    loss: Callable[..., Tensor],
) -> GoalNet:
    """Train a network on pairs of frames.

    Args:
        examples: what to train on.
        name: name of the network, which separates its draws and is shown.
        seed: seed of the weights and the pairs.
        updates: steps of training.
        out: outputs of the network.
        takes_steps: whether it reads the number of steps.
        loss: loss of (outputs [B out], actions [B A], steps [B]).
    """
    z = examples.flat
    net = GoalNet(z.shape[-1], out, takes_steps=takes_steps).to(z.device)
    init_weights(net, seed=seed, name=f"plan {name}", std=0.05)
    net.mean.copy_(z.mean((0, 1)))
    net.std.copy_(z.std((0, 1)) + 1e-3)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE)
    episodes, frames = z.shape[:2]
    for step in track(range(updates), f"train {name}", updates):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * step / updates))
        u = generator(seed, f"plan {name} pairs", step).random((3, BATCH))
        episode = np.minimum((u[0] * episodes).astype(np.int64), episodes - 1)
        first = np.minimum((u[1] * (frames - 1)).astype(np.int64), frames - 2)
        longest = np.minimum(frames - 1 - first, FARTHEST)
        apart = 1 + np.minimum((u[2] * longest).astype(np.int64), longest - 1)
        now, goal, actions = z[episode, first], z[episode, first + apart], examples.actions[episode, first]
        steps = torch.from_numpy(apart).to(z)
        value = loss(net(now, goal, steps if takes_steps else None), actions, steps)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def fit_cloning(examples: Examples, *, seed: int, updates: int = STEPS) -> GoalNet:
    """Train the network of `CloningAgent`."""
    return _fit_actions(examples, name="cloning", seed=seed, updates=updates, takes_steps=False)


def fit_inverse(examples: Examples, *, seed: int, updates: int = STEPS) -> GoalNet:
    """Train the inverse model of `InverseAgent`."""
    return _fit_actions(examples, name="inverse model", seed=seed, updates=updates, takes_steps=True)


def _fit_actions(examples: Examples, *, name: str, seed: int, updates: int, takes_steps: bool) -> GoalNet:
    scale = examples.actions.std((0, 1)) + 1e-6

    def loss(found: Tensor, actions: Tensor, steps: Tensor) -> Tensor:
        return (found - actions / scale).square().mean()

    net = fit(examples, name=name, seed=seed, updates=updates, out=len(scale), takes_steps=takes_steps, loss=loss)
    last = net.layers[-1]
    assert isinstance(last, nn.Linear)
    last.weight.mul_(scale[:, None])  # so that the network gives actions in their own units
    last.bias.mul_(scale)
    return net


def fit_temporal(examples: Examples, *, seed: int, updates: int = STEPS) -> GoalNet:
    """Train a temporal distance: a low quantile of the number of steps between two frames (pinball loss)."""

    def loss(found: Tensor, actions: Tensor, steps: Tensor) -> Tensor:
        error = steps / FARTHEST - found[:, 0]
        return torch.maximum(LOW_QUANTILE * error, (LOW_QUANTILE - 1) * error).mean()

    return fit(examples, name="temporal distance", seed=seed, updates=updates, out=1, takes_steps=False, loss=loss)


def steps_between(net: GoalNet, now: Float[Tensor, "B D"], goal: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
    """Return the temporal distance in steps, at least 0."""
    return (FARTHEST * net(now, goal)[:, 0]).clamp_min(0)


def temporal_distance(net: GoalNet) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a network's temporal distance of latents [R H h w C] to goals [R h w C]."""

    def distance(latents: Tensor, goals: Tensor) -> Tensor:
        wide = goals[:, None].expand_as(latents)
        return steps_between(net, latents.flatten(2).flatten(0, 1), wide.flatten(2).flatten(0, 1)).view(
            latents.shape[:2]
        )

    return distance


def fit_readout(examples: Examples) -> Callable[[Tensor], Tensor]:
    """Return the linear map from latents [.. h w C] to states [.. S] of least squares."""

    def with_one(z: Tensor) -> Tensor:
        flat = z.flatten(-3).double()
        return torch.cat((flat, torch.ones_like(flat[..., :1])), dim=-1)

    inputs = with_one(examples.latents.flatten(0, 1))
    ridge = 1e-6 * len(inputs) * torch.eye(inputs.shape[1], dtype=inputs.dtype, device=inputs.device)
    weights = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ examples.states.flatten(0, 1))
    return lambda latents: with_one(latents) @ weights


class CloningAgent:
    """Does what the training data did between a frame and its goal."""

    def __init__(self, model: WorldModel, net: GoalNet, *, temporal: GoalNet | None = None) -> None:
        """Args:
        model: the encoder.
        net: cloning, or an inverse model.
        temporal: for an inverse model: the distance that tells how many steps are left.
        """
        self.counts, self._model, self._net, self._temporal = Counts(), model, net, temporal

    @torch.no_grad()
    def act(self, view: View, step: int) -> Float[ndarray, "E 1 A"]:
        """Return the action of each episode, each computed alone."""
        actions = []
        for row in range(len(view)):
            one = view.take(slice(row, row + 1))
            now, goal = (z.flatten(1) for z in encode(self._model, one.frames, one.goals))
            steps = None if self._temporal is None else steps_between(self._temporal, now, goal).clamp(1, FARTHEST)
            actions.append(self._net(now, goal, steps))
        return torch.stack(actions).double().cpu().numpy()
