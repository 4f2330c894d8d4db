"""Measure the CPU seconds of the plans of a save and of a restore on many pretended ranks, on the meta device.

    python benchmarks/checkpoint_plan.py vitg16_256px_16f --ranks 512               a tensor has one owner
    python benchmarks/checkpoint_plan.py vitg16_256px_16f --ranks 512 --slices      each rank writes its slices

With `--slices` the plans are those of torch's DCP for sharded tensors, as this project made them until November 2026:
rank 0 merges a slice of each tensor from each rank, and each rank reads the metadata twice.
"""

import argparse
import dataclasses
import pickle
import tempfile
from collections.abc import Mapping
from math import ceil
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from vjepa.checkpoints.safe_unpickle import unpickle_metadata
from vjepa.config import load
from vjepa.engine import rehearsal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--slices", action="store_true")
    args = parser.parse_args()
    run = load(args.config, []).settings
    for rank in (0,) if args.slices else (0, args.ranks - 1):
        with rehearsal.pretended(args.ranks, 1, rank) as world:
            with world.stage("networks"):
                tensors = rehearsal.sharded_tensors(run, world)
            (plan_slices if args.slices else rehearsal.rehearse_checkpoint)(tensors, world)
        print(f"{run.name}, rank {rank} of {args.ranks}, {len(tensors):,} tensors")
        for name, cost in world.costs.items():
            print(f"  {name:24}{cost.cpu_s:9.2f} CPU s, {(cost.sent + cost.received) / 1e6:10.1f} MB")


def plan_slices(tensors: Mapping[str, Tensor], world: rehearsal.PretendedWorld) -> None:
    """Plan a save and a restore of the slices of all ranks."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(dict(tensors), is_coordinator=True)
    with world.stage("save, own plan"):
        plan = planner.create_local_plan()
    sent = [pickle.dumps(slices_of(plan, rank, world.size)) for rank in range(world.size)]
    with tempfile.TemporaryDirectory() as folder:
        with world.stage("save, rank 0"):
            rehearsal.write_metadata(sent, world, Path(folder))
        del sent
        with world.stage("restore, any rank"):
            metadata = [unpickle_metadata(Path(folder)) for _ in range(2)][-1]
            loader = DefaultLoadPlanner()
            loader.set_up_planner(materialised(tensors), metadata, is_coordinator=True)
            data = pickle.dumps(loader.create_local_plan())
            world.count(sent=len(data), received=2 * (Path(folder) / ".metadata").stat().st_size)
        with world.stage("restore, rank 0 besides"):
            plans = [pickle.loads(data) for _ in range(world.size)]
            answers = [pickle.dumps(plan) for plan in plans]
            world.count(sent=sum(map(len, answers)), received=len(data) * world.size)


def slices_of(plan: SavePlan, rank: int, ranks: int) -> SavePlan:
    """Return rank 0's plan with the offsets and sizes of another rank."""

    def move(item: WriteItem) -> WriteItem:
        data = item.tensor_data
        if data is None or not data.size or data.chunk.sizes == data.size:
            return item
        rows = ceil(data.size[0] / ranks)
        start = min(rank * rows, data.size[0])
        sizes = torch.Size((min(rows, data.size[0] - start), *data.size[1:]))
        chunk = ChunkStorageMetadata(torch.Size((start, *data.chunk.offsets[1:])), sizes)
        return dataclasses.replace(
            item,
            index=MetadataIndex(item.index.fqn, chunk.offsets),
            tensor_data=dataclasses.replace(data, chunk=chunk),
        )

    return dataclasses.replace(plan, items=[move(item) for item in plan.items])


def materialised(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with slices in memory, which the planner would allocate on the device itself."""
    return {name: torch.empty_like(tensor, device="cpu") for name, tensor in tensors.items()}


if __name__ == "__main__":
    main()
