"""Every objective has the same value and gradient on one rank and on two.

The file is its own program: `python test_objectives_on_ranks.py OUT` runs a rank and writes its results.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vjepa.config import Run
from vjepa.distributed.sharding import shard
from vjepa.distributed.world import join
from vjepa.methods.actions import ActedClips
from vjepa.methods.base import MaskedClips, Method, create_method
from vjepa.methods.masking import sample_masks
from vjepa.methods.memory.method import ClipSequences, Memory
from vjepa.nn.encoder import Encoder
from vjepa.nn.grid import Grid
from vjepa.weights.tensors import write_safetensors
from vjepa_data.rng import generator

CLIPS, PX = 4, 16

LEVJEPA: dict[str, Any] = {
    "objective": {
        "name": "levjepa",
        "local_views": 2,
        "local_px": 8,
        "projector": [16, 8],
        "slices": 16,
        "weight": 1.0,
        "masks": [{"mode": "random", "visible_share": 0.5}],
    },
}
CASES: dict[str, dict[str, Any]] = {
    "vjepa2": {},
    "vjepa2_1": {
        "model": {"levels": [0, 1], "predict_context": True},
        "objective": {"name": "vjepa2_1", "context_ramp": [0, 0]},
    },
    # Rank 0 has pictures only and rank 1 clips only: each would leave parameters unused.
    "pictures and clips": {"model": {"still_tokens": True}},
    **{
        f"levjepa {variety}": {**LEVJEPA, "objective": {**LEVJEPA["objective"], "regularizer": variety}}
        for variety in ("sigreg", "vicreg", "barlow")
    },
    "levjepa class token": {**LEVJEPA, "model": {"class_token": True, "causal": True}},
    "lewm": {
        "data": {"signals": ["action"]},
        "model": {"tubelet_frames": 1, "rope": "sincos"},
        "objective": {
            "name": "lewm",
            "normalise": "none",
            "latent": [16, 8],
            "rollout_steps": 2,
            "slices": 16,
            "temporal_weight": 0.1,
            "straight_weight": 0.1,
        },
    },
    **{
        f"dynamics {condition}": {
            "data": {"signals": ["action"]},
            "model": {"condition": condition, "init_std": 0.1},
            "objective": {"name": "dynamics", "action_channels": 2, "normalise": "none"},
        }
        for condition in ("token", "adaln")
    },
    "memory": {
        "data": {"clip": {"frames": 2, "sequence": 3}},
        "model": {"tubelet_frames": 1, "init_std": 0.1},
        "objective": {"name": "memory", "side": 2, "shown": 1, "pairs": 3},
    },
    "memory, whitened": {
        "data": {"clip": {"frames": 2, "sequence": 3}},
        "model": {"init_std": 0.1},
        "objective": {"name": "memory", "side": 2, "shown": 1, "pairs": 3, "whiten": True, "returns": 0.7},
    },
}
ACTED = ("lewm", "dynamics")


def settings(case: str) -> Run:
    values: dict[str, Any] = {
        "name": "ranks",
        "steps": 1,
        "batch_size": CLIPS,
        "precision": "fp32",
        "data": {"sources": [{"shards": "none"}], "clip": {"frames": 4}, "crop": {"px": PX}},
        "model": {
            "encoder": {"name": "custom", "width": 24, "depth": 2, "heads": 2},
            "predictor": {"width": 12, "depth": 1, "heads": 1},
            "patch_px": 4,
        },
        "objective": {
            "masks": [{"mode": "balanced", "blocks": 2, "block_share": 0.25}, {"mode": "tube", "visible_share": 0.3}]
        },
        "optim": {"lr": 1e-3},
    }
    for name, change in CASES[case].items():
        if change.get("name") in (*ACTED, "memory"):
            values[name] = {}  # a method without masks
        if change.get("name") == "dynamics" or change.get("whiten"):
            values[name] = {"encoder": os.environ["ENCODER_FOLDER"]}
        values[name] = {**values[name], **change}
    return Run.model_validate(values)


def masked_clips(run: Run, slots: range) -> list[MaskedClips]:
    """Clips of some slots. With pictures, the first half of all slots are pictures."""
    found = []
    stills = range(CLIPS // 2) if run.model.still_tokens else range(0)
    for frames, own in ((1, [s for s in slots if s in stills]), (4, [s for s in slots if s not in stills])):
        if own:
            drawn = [generator(0, "frames", slot).standard_normal((3, frames, PX, PX), dtype="float32") for slot in own]
            grid = Grid.of(frames, PX, PX, run.model)
            masks = sample_masks(run.objective.mask_kinds, grid, seed=0, step=0, slots=own)
            found.append(MaskedClips(torch.from_numpy(np.stack(drawn)), grid, masks, 0, tuple(own)))
    return found


def acted_clips(run: Run, slots: range) -> ActedClips:
    """Clips of some slots with actions, of which one is invalid."""
    draws = [generator(0, "acted", slot) for slot in slots]
    frames = np.stack([draw.standard_normal((4, 3, PX, PX), dtype="float32") for draw in draws])
    actions = np.stack([draw.standard_normal((3, 2), dtype="float32") for draw in draws])
    valid = torch.tensor([[True, True, slot != 1] for slot in slots])
    return ActedClips(torch.from_numpy(frames), torch.from_numpy(actions), valid, 0, tuple(slots))


def clip_sequences(method: Memory, slots: range) -> ClipSequences:
    """Three clips of the video in each of some slots, and the pairs that a run would draw."""
    clip = method.run.data.clip
    size = (clip.sequence, 3, clip.frames, PX, PX)
    frames = np.concatenate([generator(0, "clips", slot).standard_normal(size, dtype="float32") for slot in slots])
    cpu, grid = torch.device("cpu"), Grid.of(clip.frames, PX, PX, method.run.model)
    pairs, places = method.draw_pairs(0, tuple(slots), clip.sequence, cpu), method.draw_places(0, tuple(slots), cpu)
    return ClipSequences(torch.from_numpy(frames), grid, pairs, len(slots), places)


def example_inputs(run: Run, method: Method, slots: range) -> Any:
    """The inputs of a method for some slots."""
    if isinstance(method, Memory):
        return clip_sequences(method, slots)
    return acted_clips(run, slots) if run.objective.name in ACTED else masked_clips(run, slots)


def write_encoder(folder: Path) -> None:
    """Write the tensors of a native export."""
    encoder = Encoder(settings("vjepa2").model, seed=1)
    write_safetensors(folder / "model.safetensors", ((f"encoder.{n}", p) for n, p in encoder.state_dict().items()))


def main(out: Path) -> None:
    """Compute the loss and all gradients of every case on this rank."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, torch.Tensor]] = {}
    with join(settings("vjepa2").parallel) as world:
        share = CLIPS // world.size
        for case in CASES:
            run = settings(case)
            method = create_method(run)
            networks = method.build()
            shard(networks, run.parallel, mesh=world.mesh, dtype=torch.float32)
            mine = range(world.rank * share, (world.rank + 1) * share)
            loss = method.loss(networks, example_inputs(run, method, mine), step=0)
            (loss.value * world.size).backward()
            found[case] = {
                "loss": world.sum(loss.value.detach()),
                "metrics": world.sum(torch.stack(list(loss.metrics.values()))),
            }
            for part, model in networks.trained.items():
                for name, parameter in model.named_parameters():
                    assert parameter.grad is not None, f"{case}: {part}.{name} has no gradient"
                    found[case][f"{part}.{name}"] = getattr(
                        parameter.grad, "full_tensor", lambda grad=parameter.grad: grad
                    )()
        if world.is_first:
            torch.save(found, out)


def start(world: int, out: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "ENCODER_FOLDER": str(out.parent),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(out)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(errors)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    write_encoder(folder)
    for world in (1, 2):
        start(world, folder / f"{world}.pt")
    return {world: torch.load(folder / f"{world}.pt", weights_only=True) for world in (1, 2)}


@pytest.mark.parametrize("case", sorted(CASES))
def test_two_ranks_are_one(case: str, found: dict[int, dict[str, dict[str, torch.Tensor]]]) -> None:
    one, two = found[1][case], found[2][case]
    assert one.keys() == two.keys()
    assert one["loss"] > 0
    largest = max(value.abs().max().item() for name, value in one.items() if "." in name)
    # The products of levjepa's terms cancel more digits.
    allowed, share = (1e-5, 0.1) if case.startswith("levjepa") else (1e-6, 1.0)
    for name, value in one.items():
        scale = value.abs().max().item()
        # A bias before a norm over clips has no effect: its gradient is nothing but rounding.
        assert scale > 0 or name == "predictor.blocks.0.bias", f"{name} has no gradient"
        assert (two[name] - value).abs().max().item() <= allowed * max(scale, share * largest), name


if __name__ == "__main__":
    main(Path(sys.argv[1]))
