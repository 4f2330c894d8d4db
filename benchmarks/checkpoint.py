"""Measure how long training waits for a save, and its share of training at the default cadence.

    python benchmarks/checkpoint.py                                             ViT-S on a CPU, clips of 8 x 64 px
    python benchmarks/checkpoint.py --encoder vit_large --px 256 --frames 16 --batch 24 --precision bf16      a GPU

Training waits until `save` returns. With `checkpoint.background` the rest runs during the next steps, and their
slowdown is counted too.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import step as benchmark
import torch

from vjepa.checkpoints.checkpoint import CheckpointMetadata
from vjepa.checkpoints.manager import CheckpointManager
from vjepa.config import Checkpoint
from vjepa.distributed.world import join
from vjepa.nn.grid import Grid

STEPS, SAVES = 8, 3


def main() -> None:
    if "--encoder" not in sys.argv:
        sys.argv += ["--encoder", "vit_small"]
    run, args = benchmark.parse()
    with join(run.parallel) as world, tempfile.TemporaryDirectory() as folder:
        frames = torch.randn(run.batch_size, 3, args.frames, args.px, args.px, device=world.device)
        grid = Grid.of(args.frames, args.px, args.px, run.model)
        masks = benchmark.draw_masks(run, grid, world.device)
        with benchmark.ours(run, world, frames, grid, masks) as (one_step, _, tensors):
            for _ in range(benchmark.WARM_UP):
                one_step()
            step_s = statistics.median(seconds(one_step) for _ in range(STEPS))
            size = sum(tensor.nbytes for tensor in tensors.values())
            every = Checkpoint().every_steps
            print(f"{run.model.encoder.name}: {size / 2**20:.0f} MiB, step {step_s:.3f} s, a save every {every} steps")
            for background in (False, True):
                saver = CheckpointManager(Path(folder), Checkpoint(background=background), world)
                lost = []
                for number in range(1, SAVES + 1):
                    facts = CheckpointMetadata(number + 100 * background, 1, {}, "", [], None, {})
                    blocked_s = seconds(lambda facts=facts, saver=saver: saver.save(tensors, facts))
                    beside_s = 0.0
                    while background and saver.is_writing:
                        beside_s += seconds(one_step) - step_s
                    saver.wait()
                    lost.append((blocked_s, max(0.0, beside_s)))
                blocked_s, beside_s = (statistics.median(column) for column in zip(*lost, strict=True))
                share = (blocked_s + beside_s) / (every * step_s)
                print(
                    f"background={background}: training waits {blocked_s:.2f} s, steps meanwhile take {beside_s:.2f} s "
                    f"longer in all; {share:.2%} of the time"
                )


def seconds(action: Callable[[], object]) -> float:
    """Measure and print."""
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
