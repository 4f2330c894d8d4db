"""Compare a training step with V-JEPA 2's own, on the same clips, masks and sizes.

    python benchmarks/step.py                                                ours alone
    VJEPA2_REFERENCE=/somewhere python benchmarks/step.py                    both, a step of each in turn
    python benchmarks/step.py --encoder vit_large --px 256 --frames 16 --batch 24 --precision bf16 --compile   a GPU

Data is synthetic and on the device. The reference step is V-JEPA 2's networks, wrappers, optimizer and loss in the
order of its loop, without DDP and without activation checkpointing, which its files switch on and which would slow it
down. Our step is everything that `vjepa train` does between two batches. Masks are their sampler's, cut to the fewest
tokens of the batch.
"""

import argparse
import copy
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from reference import folder, networks, reference
from torch import Tensor

from vjepa.checkpoints.checkpoint import collect_tensors
from vjepa.config import Run
from vjepa.distributed.world import World, join
from vjepa.engine.loop import sum_metrics
from vjepa.engine.optimizer import build_optimizer, update_weights
from vjepa.engine.schedule import rates_at
from vjepa.engine.trainer import build_networks
from vjepa.estimate.estimate import accelerator_of
from vjepa.estimate.step_counts import count_step
from vjepa.methods.base import MaskedClips
from vjepa.methods.mask_settings import ReferenceMask
from vjepa.methods.masking import Mask, reference_masks
from vjepa.monitoring.timers import StepTimer
from vjepa.nn.grid import Grid

KINDS = (ReferenceMask(blocks=8, spatial_scale=(0.15, 0.15)), ReferenceMask(blocks=2, spatial_scale=(0.7, 0.7)))
WARM_UP, BLOCK = 3, 5

Step = Callable[[], float]


def main() -> None:
    run, args = parse()
    with join(run.parallel) as world:
        frames = torch.randn(run.batch_size, 3, args.frames, args.px, args.px, device=world.device)
        grid = Grid.of(args.frames, args.px, args.px, run.model)
        masks = draw_masks(run, grid, world.device)
        with ours(run, world, frames, grid, masks) as (our_step, clock, _):
            steps = {"ours": our_step}
            if folder():
                with reference():
                    steps["theirs"] = their_step(run, world.device, frames, masks)
            seconds = measure(steps, args.steps, world.device, clock)
            report(run, grid, masks, seconds, clock.read(), args.steps, world.device)


def parse() -> tuple[Run, argparse.Namespace]:
    """The run that the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="vit_tiny")
    parser.add_argument("--px", type=int, default=64)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--recompute", default="off", choices=("off", "selective", "full"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=30, help="steps of each, in blocks of 5 (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    args = parser.parse_args()
    if args.steps < 2 * BLOCK:
        parser.error(f"--steps ({args.steps}) must be at least {2 * BLOCK}: two blocks of {BLOCK}")
    torch.set_num_threads(args.threads)
    settings = {
        "name": "step",
        "steps": 10**6,
        "batch_size": args.batch,
        "precision": args.precision,
        "data": {"sources": [{"shards": "none"}], "clip": {"frames": args.frames}, "crop": {"px": args.px}},
        "model": {"encoder": args.encoder, "predictor": {"width": 384, "depth": 12, "heads": 12}},
        "masks": [kind.model_dump() for kind in KINDS],
        "optim": {"lr": 5.25e-4, "decay": "constant", "ema": 0.99925},
        "parallel": {"compile": args.compile, "recompute": args.recompute},
    }
    return Run.model_validate(settings), args


def draw_masks(run: Run, grid: Grid, device: torch.device) -> list[tuple[Tensor, ...]]:
    """Visible and hidden tokens of all clips, for each kind of mask."""
    places = torch.Generator().manual_seed(0)
    drawn = [reference_masks(kind, grid, clips=run.batch_size, size_seed=0, places=places) for kind in KINDS]
    return [tuple(ids.to(device) for ids in pair) for pair in drawn]


@contextmanager
def ours(
    run: Run, world: World, frames: Tensor, grid: Grid, masks: list[tuple[Tensor, ...]]
) -> Iterator[tuple[Step, StepTimer, dict[str, Tensor]]]:
    """Time our step, as in `vjepa.engine.loop.train_steps`, by part, and yield it with its tensors."""
    method, networks = build_networks(run, world)
    optimizer = build_optimizer(networks.trained, run.optim)
    timer = StepTimer(world.device)
    rows = tuple(range(run.batch_size))
    clips = MaskedClips(frames, grid, [Mask(kind, rows, *ids) for kind, ids in enumerate(masks)], 0, rows)

    def step() -> float:
        rates = rates_at(0, run)
        with timer.part("forward"):
            loss = method.loss(networks, [clips], step=0)
        with timer.part("backward"):
            loss.value.backward()
        metrics = sum_metrics([loss], world)
        update = update_weights(optimizer, metrics["total"], rates, clip_norm=None)
        method.after_update(networks, ema=rates.ema, applied=update.applied)
        return 0.0  # nothing is read: the record does that every few steps

    yield step, timer, collect_tensors(networks, optimizer)


def their_step(run: Run, device: torch.device, frames: Tensor, masks: list[tuple[Tensor, ...]]) -> Step:
    """V-JEPA 2's step: app/vjepa/engine/trainer.py of the clone."""
    encoder, predictor = networks(run.model, px=frames.shape[-1], frames=frames.shape[2])
    wrappers = importlib.import_module("src.utils.wrappers")
    encoder = wrappers.MultiSeqWrapper(encoder).to(device)
    predictor = wrappers.PredictorMultiSeqWrapper(predictor).to(device)
    target = copy.deepcopy(encoder).requires_grad_(False)
    optimizer, *_ = importlib.import_module("app.vjepa.utils").init_opt(
        is_anneal=False,
        encoder=encoder,
        predictor=predictor,
        iterations_per_epoch=300,
        start_lr=1e-4,
        ref_lr=5.25e-4,
        warmup=1,
        num_epochs=10,
        mixed_precision=False,
    )
    half = torch.autocast(device.type, torch.bfloat16) if run.precision == "bf16" else nullcontext()
    clips, visible, hidden = [frames], [[m[0] for m in masks]], [[m[1] for m in masks]]

    def step() -> float:
        with half:
            with torch.no_grad():
                h = [F.layer_norm(each, (each.size(-1),)) for each in target(clips)]
            predictions = predictor(encoder(clips, visible), visible, hidden)
            loss, terms = torch.zeros((), device=device), 0
            for prediction, wanted, ids in zip(predictions, h, hidden, strict=True):
                for one, where in zip(prediction, ids, strict=True):
                    gathered = wanted.gather(1, where[..., None].expand(-1, -1, wanted.size(-1)))
                    loss, terms = loss + (one - gathered).abs().mean(), terms + 1
            loss = loss / terms
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            slow, fast = list(target.parameters()), list(encoder.parameters())
            torch._foreach_mul_(slow, 0.99925)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_add_(slow, fast, alpha=1 - 0.99925)  # pyright: ignore[reportPrivateImportUsage]
        return float(loss)  # as theirs does in every step

    return step


def measure(steps: dict[str, Step], count: int, device: torch.device, clock: StepTimer) -> dict[str, list[float]]:
    """Seconds of a step in each of `count / BLOCK` blocks of steps.

    Blocks of each kind are taken in turn, so that a busy machine is equally busy for both. Nothing waits for the device
    within a block: in training the host is ahead of it too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    clock.read()
    for _ in range(count // BLOCK):
        for name, step in steps.items():
            _wait(device)
            start = time.perf_counter()
            for _ in range(BLOCK):
                step()
            _wait(device)
            seconds[name].append((time.perf_counter() - start) / BLOCK)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def report(
    run: Run,
    grid: Grid,
    masks: list[tuple[Tensor, ...]],
    seconds: dict[str, list[float]],
    parts: dict[str, float],
    count: int,
    device: torch.device,
) -> None:
    """Print the numbers."""
    counts = count_step(run)
    flops = counts.flops_per_clip * run.batch_size
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{where}, torch {torch.__version__}, {run.precision}, compile={run.parallel.compile}")
    print(
        f"{run.model.encoder.name} ({counts.parameters['encoder'] / 1e6:.1f} M), {grid.tokens} tokens, "
        f"{run.batch_size} clips, {flops / 1e9:.1f} GFLOP a step; "
        f"{counts.visible:.0f} tokens of a clip are visible and {counts.hidden:.0f} predicted, over all masks"
    )
    for name, values in seconds.items():
        tenths = statistics.quantiles(values, n=10)
        median = statistics.median(values)
        print(
            f"{name:7} {1e3 * median:9.2f} ms median of {len(values)} blocks  (10th to 90th percentile "
            f"{1e3 * tenths[0]:.2f} to {1e3 * tenths[-1]:.2f}, fastest {1e3 * min(values):.2f})  "
            f"{run.batch_size / median:8.1f} clips/s"
        )
    print("ours by part: " + ", ".join(f"{name} {1e3 * value / count:.2f} ms" for name, value in parts.items()))
    if "theirs" in seconds:
        ratios = {
            "median": statistics.median(seconds["theirs"]) / statistics.median(seconds["ours"]),
            "fastest": min(seconds["theirs"]) / min(seconds["ours"]),
        }
        print("ours is faster by " + ", ".join(f"{ratio:.2f}x ({name})" for name, ratio in ratios.items()))
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        kind = accelerator_of(where)
        share = f", MFU {flops / statistics.median(seconds['ours']) / kind.flops:.1%}" if kind else ""
        print(f"peak memory {peak:.1f} GiB (both, if both were run){share}")


if __name__ == "__main__":
    main()
