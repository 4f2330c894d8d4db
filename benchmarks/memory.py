"""Recall against delay of trained memories, three seeds, on features that are encoded once.

    vjepa synthesize curtain --out videos --videos 400
    vjepa shard videos --out curtains encode.short_side_px=48 encode.max_fps=6 split.val_share=0.3
    vjepa train demo --out encoder 'data.sources=[{shards: curtains}]' data.crop.scale=[1,1] data.crop.flip=0
    python benchmarks/memory.py encoder curtains --out memory.json

The loss, its pairs and the networks are those of `vjepa train memory_curtain`; batches are whole videos.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

import vjepa
from vjepa.config import Model
from vjepa.evals.base import Result, open_context
from vjepa.evals.memory import MemoryEvalSettings, Recording, curve, record, score_memories
from vjepa.methods.memory.method import forecast_errors
from vjepa.nn.memory import ClipMemory, Pairs

BATCH, PAIRS, SHOWN, SIDE = 16, 16, 2, 4


def fit_memory(model: Model, recording: Recording, *, clips: int, steps: int, seed: int) -> ClipMemory:
    """Train a memory on sequences of `clips` clips of cached features."""
    memory = ClipMemory(model, cells=SIDE**2, seed=seed)
    optimizer = torch.optim.AdamW(memory.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    draw = np.random.default_rng(seed)
    long = [video for video in recording.clips if len(video) >= clips]
    for step in range(steps):
        videos = [long[n] for n in draw.choice(len(long), BATCH)]
        starts = [draw.integers(len(video) - clips + 1) for video in videos]
        batch = torch.stack([video[start : start + clips] for video, start in zip(videos, starts, strict=True)])
        distance = draw.integers(1, clips, (BATCH, PAIRS))
        first = (draw.random((BATCH, PAIRS)) * (clips - distance)).astype(np.int64)
        shown = draw.random((BATCH, PAIRS, SIDE**2)).argsort(-1).argsort(-1) < SHOWN
        pairs = Pairs(*(torch.from_numpy(each) for each in (first, first + distance, shown)))
        errors = forecast_errors(memory, batch, batch, pairs)
        optimizer.zero_grad()
        torch.stack([error.mean() for error in errors.values()]).sum().backward()
        torch.nn.utils.clip_grad_norm_(memory.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(seed, step, {name: round(error.mean().item(), 4) for name, error in errors.items()}, flush=True)
    return memory.requires_grad_(False)


def main() -> None:
    """Train, evaluate and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("encoder", type=Path)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=36)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--supervised-steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=96)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    encoder = vjepa.load(arguments.encoder)
    size = {"width": arguments.width, "depth": 2, "heads": 4}
    model = encoder.model.model_copy(update={"predictor": type(encoder.model.predictor).model_validate(size)})
    settings = MemoryEvalSettings(seeds=arguments.seeds, supervised_steps=arguments.supervised_steps)
    with open_context(arguments.out, overwrite=True) as context:
        fit, report = (record(encoder, SIDE, arguments.shards, split, None, context) for split in ("train", "val"))
        print(len(fit.questions), len(report.questions), "questions", flush=True)
        trained = [
            fit_memory(model, fit, clips=arguments.clips, steps=arguments.steps, seed=seed)
            for seed in range(arguments.seeds)
        ]
        rows = score_memories(trained, model, fit, report, settings, context)
    protocol = {name: str(value) for name, value in vars(arguments).items()}
    arguments.out.write_text(json.dumps(Result(protocol, rows, {"curve": curve(rows)}).to_json(), indent=1) + "\n")
    for (task, metric), cells in Result({}, rows).tasks.items():
        print(task, metric, {name: f"{row.value:.3f} {row.uncertainty}" for name, row in cells.items()})


if __name__ == "__main__":
    main()
