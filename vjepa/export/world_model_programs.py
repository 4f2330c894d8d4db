"""Export a world model as two programs that need none of our code: `encode` and `step`.

    latents = encode(frames)                                        uint8 [B H W C] to [B h w D], each alone
    latent, keys, values = step(latent, action, keys, values, seen)         one frame further

`keys` and `values` hold the frames before, [L B S H d], and begin with S = 0. `seen` counts all frames before.
A model with a window reads the last `window - 1` frames: drop older ones from S between steps. Actions have their own
units, and are followed by the state of the frame if the model has states.

Letters: B clips, T frames, H W pixels, h w rows and columns of tokens, N = h w, D channels of a latent, A channels of
an action, L blocks, S tokens of earlier frames.
"""

import copy
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from vjepa.export.verify import fixed_clip
from vjepa.nn.dynamics import Cache, DynamicsPredictor, Past
from vjepa.nn.encoder import MEAN, STD, View
from vjepa.nn.frame_dynamics import FrameDynamics, normed
from vjepa.nn.latent_dynamics import ActionScale, LatentDynamics
from vjepa.weights.weights import Weights
from vjepa.weights.world_model import WorldModel
from vjepa_data.rng import generator

TOLERANCE = 1e-5
STEPS = 4
"""Steps of the comparison with our own rollout."""


class _FrameFeatures(nn.Module):
    """The part of `VideoEncoder` that `latents` needs, without checks that a trace cannot hold."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: WorldModel) -> None:
        super().__init__()
        self.encoder, self.tubelet_frames = model.encoder.encoder, model.model.tubelet_frames
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None, None])

    def features(self, frames: Tensor) -> Tensor:
        pixels = (frames.movedim(-1, 1).float() / 255 - self.mean) / self.std
        return self.encoder([View(pixels.expand(-1, -1, self.tubelet_frames, -1, -1))])[0]


class _Encode(nn.Module):
    def __init__(self, model: WorldModel) -> None:
        super().__init__()
        self.frames, self.dynamics = _FrameFeatures(model), dynamics_of(model)

    def forward(self, frames: UInt8[Tensor, "B H W C"]) -> Float[Tensor, "B h w D"]:
        return self.dynamics.latents(self.frames, frames[:, None])[:, 0]


class _Step(nn.Module):
    """A step of a rollout. The window is left to the caller, who drops old keys and values."""

    def __init__(self, dynamics: FrameDynamics | LatentDynamics, grid: tuple[int, int]) -> None:
        super().__init__()
        self.dynamics, self.grid = copy.copy(dynamics), grid
        self.dynamics.window = None

    def forward(
        self,
        latent: Float[Tensor, "B h w D"],
        action: Float[Tensor, "B A"],
        keys: Float[Tensor, "L B S H d"],
        values: Float[Tensor, "L B S H d"],
        seen: Int64[Tensor, ""],
    ) -> tuple[Tensor, Tensor, Tensor]:
        dynamics, states = self.dynamics, None
        if isinstance(dynamics, FrameDynamics):
            conditions = dynamics.scales(action[:, None])
            channels = conditions.shape[-1] - dynamics.states
            actions, states = conditions[..., :channels], conditions[..., channels:] if dynamics.states else None
        else:
            actions = dynamics.actions(action[:, None])
        cache = Cache(tuple(map(Past, keys.unbind(0), values.unbind(0))), cast(int, seen.item()))
        predicted, after = dynamics.predict(latent.flatten(1, 2)[:, None], actions, states, cache=cache, grid=self.grid)
        predicted = normed(predicted) if isinstance(dynamics, FrameDynamics) else predicted
        return (
            predicted[:, 0].unflatten(1, self.grid),
            torch.stack([past.keys for past in after.blocks]),
            torch.stack([past.values for past in after.blocks]),
        )


def dynamics_of(model: WorldModel) -> FrameDynamics | LatentDynamics:
    """Return the dynamics predictor of a model that has it."""
    dynamics = model.parts["dynamics"]
    assert isinstance(dynamics, (FrameDynamics, LatentDynamics))
    return dynamics


def scale_of(dynamics: FrameDynamics | LatentDynamics) -> ActionScale:
    """Return the scale of the actions, and of the states if there are any."""
    return dynamics.scales if isinstance(dynamics, FrameDynamics) else dynamics.actions


def empty_past(dynamics: DynamicsPredictor, clips: int) -> Float[Tensor, "L B S H d"]:
    """Return keys or values before the first frame."""
    size = dynamics.size
    return torch.zeros(size.depth, clips, 0, size.heads, size.width // size.heads)


def tokens_per_frame(dynamics: DynamicsPredictor, grid: tuple[int, int]) -> int:
    """Return the tokens of a past frame, with `condition: token` also the tokens of its action and state."""
    extra = 1 + bool(dynamics.states) if dynamics.condition == "token" else 0
    return grid[0] * grid[1] + extra


@torch.no_grad()
def write_world_model_programs(folder: Path, weights: Weights) -> dict[str, Any]:
    """Write `encode.pt2` and `step.pt2`, load them back, and compare a rollout with ours.

    Raises:
        ValueError: latents differ by more than 1e-5.
    """
    model = weights.world_model()
    dynamics = dynamics_of(model)
    clip = fixed_clip(weights)
    clips = torch.cat([clip, clip.flip(1)])[:, : max(2, STEPS)]
    batch = torch.export.Dim("clips")
    encode = torch.export.export(_Encode(model), (clips[:, 0].contiguous(),), dynamic_shapes=({0: batch},), strict=True)
    torch.export.save(encode, folder / "encode.pt2")
    latents = model.latents(clips)
    grid = (latents.shape[2], latents.shape[3])
    channels = scale_of(dynamics).mean.shape[0]
    actions = torch.from_numpy(generator(0, "export check of a rollout").normal(size=(2, 1 + STEPS, channels))).float()
    tokens = tokens_per_frame(dynamics, grid)
    past = empty_past(dynamics, 2)
    example = torch.zeros(*past.shape[:2], 2 * tokens, *past.shape[3:])
    dynamic = ({0: batch}, {0: batch}, *[{1: batch, 2: torch.export.Dim.DYNAMIC}] * 2, None)
    step = torch.export.export(
        _Step(dynamics, grid),
        (latents[:, 0].contiguous(), actions[:, 0].contiguous(), example, example.clone(), torch.tensor(2)),
        dynamic_shapes=dynamic,
        strict=False,
    )
    torch.export.save(step, folder / "step.pt2")
    return _compare(folder, model, clips, actions, window=dynamics.window, tokens=tokens, past=past)


def _compare(
    folder: Path,
    model: WorldModel,
    clips: UInt8[Tensor, "B T H W C"],
    actions: Float[Tensor, "B V A"],
    *,
    window: int | None,
    tokens: int,
    past: Tensor,
) -> dict[str, Any]:
    """Roll out with the loaded programs and with ours, from two known frames."""
    encode, step = (torch.export.load(folder / f"{name}.pt2").module() for name in ("encode", "step"))
    latents, keys, values = model.latents(clips), past, past
    differences = [
        (encode(clips[:count, number]) - latents[:count, number]).abs().max().item()
        for count, number in ((2, 0), (1, 1))
    ]
    known = torch.stack([encode(frames) for frames in clips[:, :2].unbind(1)], dim=1)
    expected = model.rollout(clips[:, :2], actions)
    latent, found = known[:, 0], []
    for number in range(actions.shape[1]):
        latent = known[:, number] if number < 2 else latent
        latent, keys, values = step(latent, actions[:, number], keys, values, torch.tensor(number))
        if window is not None:
            keys, values = (each[:, :, max(0, each.shape[2] - (window - 1) * tokens) :] for each in (keys, values))
        found.append(latent)
    differences.append((torch.stack(found[1:], dim=1) - expected).abs().max().item())
    if max(differences) > TOLERANCE:
        raise ValueError(f"the loaded programs' latents differ by {differences}; nothing was written")
    return {
        "latents_max_abs_difference": max(differences[:2]),
        "rollout_max_abs_difference": differences[2],
        "past": [past.shape[0], "clips", "tokens", *past.shape[3:]],
        "tokens_per_frame": tokens,
        "window": window,
        "torch": torch.__version__,
    }
