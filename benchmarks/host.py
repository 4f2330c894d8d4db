"""Measure the host's work in a training step: CPU time of the thread that queues it, and growth of memory.

    python benchmarks/host.py                                one tree
    python benchmarks/host.py --before PATH                  another tree too, a block of steps of each in turn
    python benchmarks/host.py --leak 3000                    objects and memory over 3,000 steps

The model has the depth of ViT-L (24 blocks, predictor of 12) and a tiny width, so that nearly all of the time is the
host's, to queue a step on a GPU. The process group is pretended: rank 0 of `--ranks`, whose messages go nowhere. A
GPU's driver costs more for each kernel, so that these are lower bounds.
"""

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vjepa.config import Run

BLOCKS, STEPS, WARM_UP = 4, 10, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="root of another tree")
    parser.add_argument("--ranks", type=int, default=16)
    parser.add_argument("--leak", type=int, help="steps over which growth is measured")
    parser.add_argument("--depth", type=int, nargs=2, default=(24, 12), help="blocks of encoder and predictor")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child or args.leak:
        work(args)
        return
    trees = {"now": Path(__file__).resolve().parents[1]} | ({"before": args.before.resolve()} if args.before else {})
    parts: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in trees}
    for _ in range(BLOCKS if args.before else 1):
        for name, tree in trees.items():
            path = os.pathsep.join([str(tree), str(tree / "data"), str(tree / "launch")])
            command = [sys.executable, __file__, "--child", "--ranks", str(args.ranks)]
            command += ["--depth", *map(str, args.depth)]
            environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            for part, values in json.loads(done.stdout.splitlines()[-1]).items():
                parts[name][part] += values
    for name, found in parts.items():
        medians = {part: statistics.median(values) for part, values in found.items()}
        print(f"{name:7} {medians.pop('step'):7.1f} CPU ms a step: "
              + ", ".join(f"{part} {value:.1f}" for part, value in medians.items()))  # fmt: skip
    if args.before:
        ratio = statistics.median(parts["before"]["step"]) / statistics.median(parts["now"]["step"])
        print(f"before / now: {ratio:.2f}")


def narrow_run(ranks: int, depth: Sequence[int]) -> "Run":
    """Return a run with the depth of a real model, and so few channels that a step costs the host's work alone."""
    from vjepa.config import Run

    return Run.model_validate(
        {
            "name": "host",
            "steps": 10**6,
            "batch_size": 2 * ranks,
            "precision": "fp32",  # bf16 arithmetic of a CPU takes longer than everything that is measured here
            "data": {"sources": [{"shards": "none"}], "clip": {"frames": 4}, "crop": {"px": 32}},
            "model": {
                "encoder": {"name": "custom", "width": 64, "depth": depth[0], "heads": 1},
                "predictor": {"width": 32, "depth": depth[1], "heads": 1},
                "patch_px": 8,
            },
            "optim": {"lr": 1e-4, "decay": "constant", "ema": 0.99925},
        }
    )


def work(args: argparse.Namespace) -> None:
    """Make steps as a pretended rank, and print the CPU ms of each part of each step, or the growth."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from vjepa.distributed import sharding
    from vjepa.distributed.world import World
    from vjepa.engine import loop
    from vjepa.engine.optimizer import build_optimizer, update_weights
    from vjepa.engine.schedule import rates_at
    from vjepa.engine.trainer import build_networks
    from vjepa_data.reader.batch import Batch, Clips

    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=args.ranks, store=FakeStore())
    mesh = init_device_mesh("cpu", (args.ranks,), mesh_dim_names=("shard",))
    group = dist.group.WORLD
    assert group is not None
    world = World(0, args.ranks, torch.device("cpu"), mesh, control=group, storage=group)
    run = narrow_run(args.ranks, args.depth)
    # As many units of sharding as ViT-L has: 4 of its 24 blocks in one, and all of the predictor in another.
    sharding.UNIT_PARAMETERS = 4 * (12 * 64**2 + 13 * 64)  # pyright: ignore[reportAttributeAccessIssue]
    method, networks = build_networks(run, world)
    optimizer = build_optimizer(networks.trained, run.optim)
    frames = torch.zeros(2, 4, 32, 32, 3, dtype=torch.uint8)
    clips = Clips(frames, slots=(0, 1), signals={}, keys=("", ""), sources=(0, 0), start_s=(0.0, 0.0))
    spent: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def part(name: str) -> Iterator[None]:
        start = time.thread_time()
        yield
        spent[name].append(1e3 * (time.thread_time() - start))

    def step(number: int) -> None:
        rates = rates_at(number, run)
        with part("step"):
            with part("prepare"):
                inputs = method.prepare(Batch(number, (clips,)), world.device)
            with part("forward"):
                loss = method.loss(networks, inputs, step=number)
            with part("backward"):
                (loss.value * world.size).backward()
            with part("loss sum"):
                metrics = loop.sum_metrics([loss], world)
            with part("update"):
                update = update_weights(optimizer, metrics["total"], rates, clip_norm=run.optim.clip_norm)
            with part("averages"):
                method.after_update(networks, ema=rates.ema, applied=update.applied)
            if hasattr(loop, "forget_forwards"):  # earlier trees lack it
                loop.forget_forwards(networks)

    # Stops the garbage collector, as training does.
    gc.disable()
    for number in range(WARM_UP):
        step(number)
    spent.clear()
    if args.leak:
        gc.collect()
        seen = len(gc.get_objects()), resident_mib()
        for number in range(args.leak):
            step(number)
            if (number + 1) % 100 == 0:
                gc.collect()
        print(f"{args.leak} steps: {len(gc.get_objects()) - seen[0]:+d} objects, "
              f"{resident_mib() - seen[1]:+.1f} MiB resident")  # fmt: skip
        return
    for number in range(STEPS):
        step(number)
    print(json.dumps(spent))


def resident_mib() -> float:
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


if __name__ == "__main__":
    main()
