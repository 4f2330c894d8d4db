"""How well does LeWM predict two rooms? Train on one corpus, roll out on held-out episodes, one table.

    python benchmarks/two_room.py --out runs/two_room --seeds 3 [--episodes 2000] [key=value ...]

A linear readout of the state is fitted on latents of training episodes, by least squares. It reads the predicted
latents of held-out episodes, 1 to 16 steps after the last frame that was seen. The error is the distance to the true
position, in pixels of a frame of 64. Beside it: the readout of the true latents (the floor), the same rollout under the
actions of other episodes, an untrained model with its own readout, and the position of the last frame that was seen
(copy-last). Corpus and runs that exist are used again.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import vjepa
from vjepa.config import load
from vjepa.methods.base import create_method
from vjepa.methods.lewm.method import LeWM
from vjepa.weights.tensors import InMemory
from vjepa.weights.world_model import WorldModel
from vjepa_data.worlds.episodes import Episodes, simulate
from vjepa_data.worlds.two_room import TwoRoom

PX, FRAMES = 64, 33
HORIZONS = (1, 4, 8, 16)
STARTS = (0, 5, 10, 15)
"""Frames from which a rollout of an episode starts."""

HELD_OUT_SEED = 1_000_000
WORLD = TwoRoom()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=2000)
    parser.add_argument("--config", default="lewm_two_room")
    args, settings = parser.parse_known_args()
    torch.set_num_threads(1)
    corpus = make_corpus(args.out, args.episodes)
    settings = [f"data.sources=[{{shards: {corpus}}}]", "track.wandb=off", *settings]
    rows = []
    for seed in range(args.seeds):
        folder = args.out / f"seed_{seed}"
        seconds = train(args.config, folder, [*settings, f"seed={seed}"])
        model = vjepa.load(folder)
        untrained = untrained_model(args.config, [*settings, f"seed={seed}"], model)
        found = {"trained": evaluate(model), "untrained": evaluate(untrained), "cpu_s": seconds}
        (args.out / f"seed_{seed}.json").write_text(json.dumps(found, indent=1) + "\n")
        rows.append(found)
    print(table(rows))


def make_corpus(out: Path, episodes: int) -> Path:
    """Write the videos and the shards, unless they exist."""
    videos, corpus = out / "videos", out / "shards"
    if not (corpus / "report.html").exists():
        vjepa_command("synthesize", "two_room", "--out", videos, "--videos", episodes)
        vjepa_command("shard", videos, "--spec", videos / "spec.yaml", "--out", corpus)
    return corpus


def train(config: str, folder: Path, settings: list[str]) -> float | None:
    """Train unless it is done, and return the CPU seconds of the trainer and its loader."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    vjepa_command("train", config, "--out", folder, *settings)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds if seconds > 30 else None  # a run that was done takes a few seconds


def vjepa_command(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "vjepa", *map(str, words)], check=True)


def untrained_model(config: str, settings: list[str], like: WorldModel) -> WorldModel:
    """Return the model as it was before training, with the same scale of actions."""
    method = create_method(load(config, settings).settings)
    assert isinstance(method, LeWM)
    networks = method.build()
    tensors = {
        f"{name}.{path}": parameter.detach()
        for name in ("encoder", "dynamics", "dynamics.actions")
        for path, parameter in networks[name].named_parameters()
    }
    return WorldModel(like.model, InMemory(tensors), px=PX, frames=like.frames, fps=like.fps, provenance={})


def episodes(seed: int, count: int) -> tuple[Episodes, Tensor]:
    """Return episodes and their frames, uint8 [E F P P 3], as they are before encoding."""
    found = simulate(WORLD, policy="mixed", layout="fixed", seed=seed, episodes=range(count), frames=FRAMES)
    frames = [
        WORLD.render(s, np.tile(place, (FRAMES, 1)), PX) for s, place in zip(found.states, found.layouts, strict=True)
    ]
    return found, torch.from_numpy(np.stack(frames))


@torch.no_grad()
def evaluate(model: WorldModel, *, fit: int = 100, test: int = 200) -> dict[str, dict[str, float]]:
    """Return the median error in pixels at each horizon, of each kind of prediction.

    Args:
        model: the model.
        fit: training episodes of the readout; they are the first of the corpus.
        test: held-out episodes.
    """
    known, frames = episodes(0, fit)
    readout = fit_readout(latents_of(model, frames).flatten(0, 1), torch.from_numpy(known.states).flatten(0, 1))
    held_out, frames = episodes(HELD_OUT_SEED, test)
    states, actions = torch.from_numpy(held_out.states), torch.from_numpy(held_out.actions).float()
    latents = latents_of(model, frames)
    far = max(HORIZONS)
    errors: dict[str, list[Tensor]] = {"rollout": [], "other actions": [], "true latents": [], "copy last": []}
    for start in STARTS:
        truth, span = states[:, start + 1 : start + far + 1], actions[:, start : start + far]
        seen = frames[:, start : start + 1]
        for name, given in (("rollout", span), ("other actions", span.roll(1, 0))):
            predicted = model.rollout(seen, given).flatten(2)
            errors[name].append((read(readout, predicted) - truth).norm(dim=-1))
        errors["true latents"].append((read(readout, latents[:, start + 1 : start + far + 1]) - truth).norm(dim=-1))
        errors["copy last"].append((states[:, start, None] - truth).norm(dim=-1))
    return {
        name: {str(k): PX * torch.cat(parts)[:, k - 1].median().item() for k in HORIZONS}
        for name, parts in errors.items()
    }


def latents_of(model: WorldModel, frames: Tensor) -> Tensor:
    """Return the latents of frames, [E F E]."""
    return torch.cat([model.latents(part).flatten(2) for part in frames.split(20)])


def fit_readout(latents: Tensor, states: Tensor) -> Tensor:
    """Return the least-squares map from latents and 1 to states."""
    return torch.linalg.lstsq(with_one(latents), states).solution


def read(readout: Tensor, latents: Tensor) -> Tensor:
    """Return the states that a readout finds in latents."""
    return with_one(latents) @ readout


def with_one(latents: Tensor) -> Tensor:
    return torch.cat((latents.double(), torch.ones_like(latents[..., :1], dtype=torch.float64)), dim=-1)


def table(rows: list[dict]) -> str:
    """Return a table in Markdown: mean over seeds, and the range."""
    lines = [f"| median error, px | {' | '.join(f'{k} steps' for k in HORIZONS)} |", "|---" * (len(HORIZONS) + 1) + "|"]
    for part, name in (
        ("trained", "rollout"),
        ("trained", "true latents"),
        ("trained", "other actions"),
        ("untrained", "rollout"),
        ("untrained", "true latents"),
        ("trained", "copy last"),
    ):
        cells = []
        for k in HORIZONS:
            values = [row[part][name][str(k)] for row in rows]
            cells.append(f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        lines.append(f"| {name}{', untrained model' if part == 'untrained' else ''} | {' | '.join(cells)} |")
    seconds = [row["cpu_s"] for row in rows if row["cpu_s"]]
    if seconds:
        lines.append(f"\nCPU seconds of training with its loader: {', '.join(f'{s:.0f}' for s in seconds)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
