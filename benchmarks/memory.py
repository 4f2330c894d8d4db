"""Recall against delay of trained memories, three seeds, on features that are encoded once.

    vjepa synthesize curtain --out videos --videos 400
    vjepa shard videos --out curtains encode.short_side_px=48 encode.max_fps=6 split.val_share=0.3
    vjepa train demo --out encoder 'data.sources=[{shards: curtains}]' data.crop.scale=[1,1] data.crop.flip=0
    python benchmarks/memory.py encoder curtains --out memory.json

The loss, its pairs and the networks are as in `vjepa train memory_curtain`. Batches are whole videos. Features and
trained memories are kept in the folder `--cache`, from which an interrupted command continues.
"""

import argparse
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import vjepa
from vjepa.config import Model
from vjepa.evals.base import EvaluationContext, Result, open_context
from vjepa.evals.memory.evaluation import MemoryEvalSettings, Recording, curve, record, score_memories
from vjepa.methods.memory.method import at_returns, forecast_errors, set_whitening
from vjepa.nn.memory import ClipMemory, Pairs, Whitening, pool_cells

BATCH, SHOWN, WHITENING_CLIPS = 16, 2, 4096


def encode(arguments: argparse.Namespace, context: EvaluationContext) -> tuple[Model, list[Recording]]:
    """Return the model's settings and the whitened features of both splits."""
    file = arguments.cache / "features.pt"
    if not file.exists():
        encoder = vjepa.load(arguments.encoder)
        pool = partial(pool_cells, side=arguments.side)
        splits = [record(encoder, pool, arguments.shards, split, None, context) for split in ("train", "val")]
        whiten = Whitening(encoder.width)
        set_whitening(whiten, torch.cat(list(splits[0].clips))[:WHITENING_CLIPS].flatten(0, 1))
        splits = [replace(split, clips=[whiten(clips) for clips in split.clips]) for split in splits]
        torch.save((encoder.model, splits), file)
    model, splits = torch.load(file, weights_only=False)
    size = {"width": arguments.width, "depth": 1, "heads": 2, "mlp_ratio": 1}
    return model.model_copy(update={"predictor": type(model.predictor).model_validate(size)}), splits


def fit_memory(model: Model, recording: Recording, arguments: argparse.Namespace, seed: int) -> ClipMemory:
    """Train a memory on sequences of `--clips` clips of cached features, or read it from the cache."""
    memory = ClipMemory(model, cells=arguments.side**2, seed=seed)
    file = arguments.cache / f"memory_{seed}.pt"
    if file.exists():
        memory.load_state_dict(torch.load(file))
        return memory.requires_grad_(False)
    optimizer = torch.optim.AdamW(memory.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=arguments.steps, pct_start=0.1)
    draw, clips, start_s = np.random.default_rng(seed), arguments.clips, time.process_time()
    long = [video for video in recording.clips if len(video) >= clips]
    for step in range(arguments.steps):
        videos = [long[n] for n in draw.choice(len(long), BATCH)]
        starts = [draw.integers(len(video) - clips + 1) for video in videos]
        batch = torch.stack([video[start : start + clips] for video, start in zip(videos, starts, strict=True)])
        pairs = draw_pairs(draw, arguments)
        places = draw.random((BATCH, arguments.pairs), dtype=np.float32)
        errors = forecast_errors(memory, batch, batch, at_returns(pairs, batch, torch.from_numpy(places)))
        optimizer.zero_grad()
        torch.stack([error.mean() for error in errors.values()]).sum().backward()
        torch.nn.utils.clip_grad_norm_(memory.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == arguments.steps - 1:
            found = {name: round(error.mean().item(), 4) for name, error in errors.items()}
            print(f"seed {seed}, step {step}: {found}, {time.process_time() - start_s:.0f} CPU s", flush=True)
    torch.save(memory.state_dict(), file)
    return memory.requires_grad_(False)


def draw_pairs(draw: np.random.Generator, arguments: argparse.Namespace) -> Pairs:
    """Draw pairs of clips as the method does, with uniform distances."""
    size, clips, cells = (BATCH, arguments.pairs), arguments.clips, arguments.side**2
    distance = draw.integers(1, clips, size)
    first = (draw.random(size) * (clips - distance)).astype(np.int64)
    shown = draw.random((*size, cells)).argsort(-1).argsort(-1) < SHOWN
    return Pairs(*(torch.from_numpy(each) for each in (first, first + distance, shown)))


def main() -> None:
    """Train, evaluate and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("encoder", type=Path)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("memory_cache"))
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--supervised-steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--side", type=int, default=3)
    parser.add_argument("--width", type=int, default=64)
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    settings = MemoryEvalSettings(seeds=arguments.seeds, supervised_steps=arguments.supervised_steps)
    with open_context(arguments.out, overwrite=True) as context:
        model, (fit, report) = encode(arguments, context)
        print(len(fit.questions), len(report.questions), "questions", flush=True)
        trained = [fit_memory(model, fit, arguments, seed) for seed in range(arguments.seeds)]
        rows = score_memories(trained, model, fit, report, settings, context)
    protocol = {name: str(value) for name, value in vars(arguments).items()}
    arguments.out.write_text(json.dumps(Result(protocol, rows, {"curve": curve(rows)}).to_json(), indent=1) + "\n")
    for (task, metric), cells in Result({}, rows).tasks.items():
        print(task, metric, {name: f"{row.value:.3f} {row.uncertainty}" for name, row in cells.items()})


if __name__ == "__main__":
    main()
