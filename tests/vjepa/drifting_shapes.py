"""A world of one drifting shape, without files, to try objectives on.

A disc or a square of random contrast (bright or dark, so that no pixel's mean tells anything) moves over noise.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from vjepa.config import Run
from vjepa.distributed.sharding import shard
from vjepa.distributed.world import join
from vjepa.engine.optimizer import build_optimizer, update_weights
from vjepa.engine.schedule import rates_at
from vjepa.methods.base import Average, Loss, MaskedClips, create_method
from vjepa.methods.masking import sample_masks
from vjepa.nn.grid import Grid
from vjepa_data.rng import generator

PX, FRAMES, PATCH = 32, 8, 8


def scenes(number: int, n: int) -> Float[Tensor, "n 3 T Y X"]:
    """Some clips, as a function of a number."""
    rng = generator(0, "toy world", number)
    start, velocity = rng.uniform(6, PX - 6, (n, 1, 2)), rng.uniform(-1.5, 1.5, (n, 1, 2))
    contrast, radius, square = rng.choice([-1.5, 1.5], n), rng.uniform(3, 6, n), rng.integers(0, 2, n)
    centres = start + velocity * (np.arange(FRAMES) - FRAMES / 2)[:, None]
    places = np.arange(PX) + 0.5
    down = np.abs(places[:, None] - centres[..., 0, None, None])
    across = np.abs(places - centres[..., 1, None, None])
    far = np.where(square[:, None, None, None] == 1, np.maximum(down, across) * 1.1, np.hypot(down, across))
    inside = 1 / (1 + np.exp(2 * (far - radius[:, None, None, None])))
    grey = contrast[:, None, None, None] * inside + 0.1 * rng.standard_normal(inside.shape)
    return torch.from_numpy(grey.astype(np.float32))[:, None].expand(-1, 3, -1, -1, -1)


def toy_run(**changes: Any) -> Run:
    """A run on this world. Nested settings replace single names."""
    values: dict[str, Any] = {
        "name": "toy",
        "steps": 150,
        "batch_size": 24,
        "precision": "fp32",
        "data": {"sources": [{"shards": "none"}], "clip": {"frames": FRAMES}, "crop": {"px": PX}},
        "model": {
            "encoder": {"name": "custom", "width": 48, "depth": 4, "heads": 2},
            "predictor": {"width": 24, "depth": 2, "heads": 2},
            "patch_px": PATCH,
        },
        "objective": {
            "masks": [
                {"mode": "balanced", "blocks": 2, "block_share": 0.25},
                {"mode": "balanced", "blocks": 1, "block_share": 0.6},
            ]
        },
        "optim": {"lr": 2e-3, "warmup_steps": 30, "decay": "constant", "ema": 0.99},
    }
    for name, value in changes.items():
        old = values.get(name)
        values[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return Run.model_validate(values)


def masked_clips(run: Run, step: int) -> MaskedClips:
    frames = scenes(step, run.batch_size)
    if run.data.sources[0].frames == 1:
        frames = frames[:, :, :1].expand(-1, -1, run.model.tubelet_frames, -1, -1)
    grid = Grid.of(frames.shape[2], PX, PX, run.model)
    masks = sample_masks(run.objective.mask_kinds, grid, seed=run.seed, step=step, slots=range(run.batch_size))
    return MaskedClips(frames, grid, masks, step, tuple(range(run.batch_size)))


def learn(run: Run, *, stop_gradient: bool = True) -> list[Loss]:
    """Train as a run does, in a single process.

    Args:
        run: the run.
        stop_gradient: without it the encoder is its own target, and the gradient goes through both sides. No setting
            does that.
    """
    with join(run.parallel) as world:
        method = create_method(run)
        networks = method.build()
        shard(networks, run.parallel, mesh=world.mesh, dtype=torch.float32)
        if not stop_gradient:
            networks = dataclasses.replace(networks, averages={"target": Average(networks["encoder"], of="encoder")})
        optimizer = build_optimizer(networks.trained, run.optim)
        losses = []
        for step in range(run.steps):
            rates = rates_at(step, run)
            with nullcontext() if stop_gradient else _gradients_everywhere():
                loss = method.loss(networks, [masked_clips(run, step)], step=step)
            loss.value.backward()
            update = update_weights(optimizer, loss.value.detach(), rates, clip_norm=run.optim.clip_norm)
            if stop_gradient:
                method.after_update(networks, ema=rates.ema, applied=update.applied)
            losses.append(loss)
        return losses


@contextmanager
def _gradients_everywhere() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "no_grad", nullcontext)
        yield


OBJECTIVES: dict[str, dict[str, Any]] = {
    "vjepa2": {},
    "vjepa2_1": {
        "model": {"levels": [0, 1, 2, 3], "predict_context": True, "rope": "interleaved"},
        "objective": {"name": "vjepa2_1", "context_ramp": [20, 60]},
    },
    "stills": {"data": {"sources": [{"shards": "none", "frames": 1}]}},
    "levjepa": {
        "objective": {
            "name": "levjepa",
            "local_views": 2,
            "local_px": 16,
            "local_scale": [0.3, 0.6],
            "projector": [64, 16],
            "slices": 64,
            "weight": 0.2,
            "masks": [{"mode": "random", "visible_share": 0.5}],
        },
    },
}
