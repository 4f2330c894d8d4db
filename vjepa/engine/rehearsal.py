"""The start of a run on many ranks, rehearsed in one process: the real code, on pretended ranks.

Messages go nowhere. A gather returns copies of this rank's own message, so that their number and size are real. Weights
are on the meta device. Where the shards of a run are missing, pretended clips take their place.

    agree -> plan of samples -> draws and masks -> networks -> save -> restore -> record

Every stage is made as rank 0, which has the most to do, and as the last rank.
"""

import json
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.device_mesh import init_device_mesh

from vjepa.checkpoints.checkpoint import collect_tensors, split_metadata
from vjepa.checkpoints.owners import bytes_of, owners_of
from vjepa.checkpoints.safe_unpickle import unpickle_metadata
from vjepa.compat import pretended_store, write_results
from vjepa.config import Run
from vjepa.distributed.sharding import shard
from vjepa.distributed.world import World
from vjepa.engine.loop import sum_metrics
from vjepa.engine.optimizer import build_optimizer
from vjepa.engine.rank_consistency import check_program
from vjepa.methods.base import Loss, create_method
from vjepa.methods.masking import sample_masks
from vjepa.monitoring.throughput import Throughput
from vjepa.monitoring.timers import StepTimer
from vjepa.nn.grid import clip_grid
from vjepa_data.errors import BadInput
from vjepa_data.reader.batch import Batch, Clips
from vjepa_data.reader.pipeline import open_plan
from vjepa_data.reader.plan import Plan

T = TypeVar("T")
CLIPS_PER_SHARD = 1000


@dataclass
class Cost:
    """The work of a rank in a stage."""

    cpu_s: float = 0.0
    messages: int = 0
    sent: int = 0
    received: int = 0
    """Bytes. Those of device messages are listed too."""
    files: int = 0
    """Files opened."""


@dataclass(frozen=True)
class PretendedWorld(World):
    """A rank whose messages go nowhere, and which counts them."""

    costs: dict[str, Cost] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[Cost]:
        """Count the work of a block as a stage."""
        cost = self.costs[name] = Cost()
        start_s = time.process_time()
        with _counting_files(cost):
            yield cost
        cost.cpu_s += time.process_time() - start_s

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Leave out a block that another rank would run."""
        cost, start_s = self._cost, time.process_time()
        files = cost.files
        yield
        cost.cpu_s -= time.process_time() - start_s
        cost.files = files

    @property
    def _cost(self) -> Cost:
        return self.costs[next(reversed(self.costs))]

    def count(self, *, sent: int, received: int) -> None:
        """Count a message of the present stage."""
        cost = self._cost
        cost.messages += 1
        cost.sent += sent
        cost.received += received

    def gather(self, value: T) -> list[T]:
        data = pickle.dumps(value)
        self.count(sent=len(data), received=(self.size - 1) * len(data))
        return [pickle.loads(data) for _ in range(self.size)]

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        self.count(sent=4 * len(numbers), received=4 * len(numbers) * (self.size - 1))
        return torch.tensor([numbers] * self.size, dtype=torch.float32).tolist()

    def first(self, function: Callable[[], T]) -> T:
        return self._from_first(function, hands=1)

    def deal(self, function: Callable[[], list[T]]) -> T:
        return self._from_first(function, hands=self.size)[self.rank]

    def _from_first(self, function: Callable[[], T], *, hands: int) -> T:
        """Return a value of rank 0, and count its way: to all ranks alike, or a part of it to each."""
        if self.is_first:
            value = function()
            size = sum(len(pickle.dumps(hand)) for hand in value) if hands > 1 else len(pickle.dumps(value))  # pyright: ignore[reportGeneralTypeIssues]
            self.count(sent=size, received=0)
            return value
        with self.elsewhere():
            value = function()
            data = pickle.dumps(value[self.rank] if hands > 1 else value)  # pyright: ignore[reportIndexIssue]
        self.count(sent=0, received=len(data))
        pickle.loads(data)
        return value

    def sum(self, value: Tensor) -> Tensor:
        self.count(sent=value.nbytes, received=value.nbytes)
        return value

    def from_first(self, value: Tensor) -> Tensor:
        self.count(sent=value.nbytes * self.is_first, received=value.nbytes * (not self.is_first))
        return value


@dataclass
class PretendedClips:
    """A source of clips that do not exist, in shards of 1,000."""

    clips: int
    name: str

    @property
    def counts(self) -> np.ndarray:
        return np.full(-(-self.clips // CLIPS_PER_SHARD), CLIPS_PER_SHARD, dtype=np.int64)

    def members(self, shard: int) -> np.ndarray:
        return shard * CLIPS_PER_SHARD + np.arange(CLIPS_PER_SHARD)


@dataclass(frozen=True)
class Rehearsal:
    """The costs of a start."""

    name: str
    ranks: int
    copies: int
    clips: int
    """Clips of the pretended corpus, or 0 if the run's own was read."""
    plan_mib: float
    """Memory that a process needs for the plan of samples, besides the index, which is mapped."""
    costs: dict[int, dict[str, Cost]]
    """Of rank 0 and of the last rank, by stage."""
    sockets: dict[int, int]

    def json(self) -> str:
        """Return all numbers."""
        return json.dumps(asdict(self), indent=1)

    def text(self) -> str:
        """Format the costs as a table."""
        first, last = self.costs.values()
        copies = "copy" if self.copies == 1 else "copies"
        source = f"{self.clips:,} pretended clips" if self.clips else "the run's corpora"
        lines = [
            f"{self.name} on {self.ranks:,} pretended ranks, {self.copies:,} {copies} of the model, {source}",
            "",
            f"{'':18}{'CPU s':>16}{'messages':>12}{'MB sent':>20}{'MB received':>20}{'files':>12}",
            f"{'':18}{'rank 0    last':>16}{'rank 0':>12}" + f"{'rank 0      last':>20}" * 2 + f"{'rank 0':>12}",
        ]
        for name, one in first.items():
            other = last[name]
            lines.append(
                f"{name:18}{one.cpu_s:8.2f}{other.cpu_s:8.2f}{one.messages:12,}"
                f"{one.sent / 1e6:10.2f}{other.sent / 1e6:10.2f}{one.received / 1e6:10.2f}{other.received / 1e6:10.2f}"
                f"{one.files:12,}"
            )
        total = [sum(cost.cpu_s for cost in costs.values()) for costs in (first, last)]
        lines += [
            f"{'together':18}{total[0]:8.2f}{total[1]:8.2f}",
            "",
            f"sockets of gloo    {', '.join(f'rank {rank}: {count:,}' for rank, count in self.sockets.items())}",
            f"plan of samples    {self.plan_mib:.0f} MiB in each process",
        ]
        return "\n".join(lines)


def rehearse(run: Run, *, ranks: int, per_node: int = 8, clips: int = 100_000_000) -> Rehearsal:
    """Rehearse the start of a run.

    Args:
        run: the run. The sizes of its shards count if all of them exist.
        ranks: number of pretended ranks.
        per_node: ranks of a node.
        clips: clips of the pretended corpus, if shards are missing.

    Raises:
        BadInput: the ranks do not divide the batch, or `parallel.replicate` does not divide the ranks.
    """
    run.check_ranks(ranks)
    copies = run.parallel.copies(ranks, per_node)
    if ranks % copies:
        raise BadInput(f"parallel.replicate ({copies}) must divide the number of ranks ({ranks})")
    is_real = all(Path(source.shards).exists() for source in run.data.sources)
    costs, plan_mib = {}, 0.0
    for rank in dict.fromkeys((0, ranks - 1)):
        with pretended(ranks, copies, rank) as world:
            with world.stage("agree"):
                check_program(run, world)
            before = _resident_mib()
            with world.stage("plan of samples"):
                plan = _plan_of(run, None if is_real else clips)
                world.gather({"plan": plan.fingerprint})
            with world.stage("draws and masks"):
                _draw(run, plan, world)
            plan_mib = max(plan_mib, _resident_mib() - before)
            with world.stage("networks"):
                tensors = sharded_tensors(run, world)
            rehearse_checkpoint(tensors, world, copies=copies)
            with world.stage("record"):
                _record(run, world)
        costs[rank] = world.costs
    sockets = {rank: sockets_of(ranks, rank, groups=3 if run.parallel.offload else 2) for rank in costs}
    return Rehearsal(run.name, ranks, copies, 0 if is_real else clips, plan_mib, costs, sockets)


def sockets_of(ranks: int, rank: int, *, groups: int) -> int:
    """Return the sockets of a rank: one for each other rank and gloo group, and those of the store.

    Args:
        ranks: number of ranks.
        rank: this rank. Rank 0 serves the store to all ranks.
        groups: gloo groups of all ranks: 2 on GPUs, 3 with `parallel.offload` or on CPUs.
    """
    return groups * (ranks - 1) + groups + 1 + (ranks + 1 if rank == 0 else 0)


def rehearse_checkpoint(tensors: Mapping[str, Tensor], world: PretendedWorld, *, copies: int = 1) -> None:
    """Rehearse the plans of a save and of a restore, without the tensors' bytes on the disk."""
    here = world.size // copies
    group = range(world.rank // here * here, world.rank // here * here + here)
    with tempfile.TemporaryDirectory() as folder:
        with world.stage("save"):
            owners = owners_of(tensors, world.size)
            received = sum(bytes_of(tensor) for name, tensor in tensors.items() if owners[name] in group)
            world.count(sent=received // here, received=received)  # the exchange of slices, over the device
            _plan_save(tensors, owners, world, Path(folder))
        with world.stage("restore"):
            owners = owners_of(tensors, world.size)
            metadata = world.deal(lambda: split_metadata(unpickle_metadata(Path(folder)), owners, world.size))
            owned = {name: torch.empty(tensors[name].shape) for name in tensors if owners[name] == world.rank}
            planner = DefaultLoadPlanner()
            planner.set_up_planner(dict(owned), metadata, is_coordinator=True)
            planner.create_local_plan()
            everything = sum(map(bytes_of, tensors.values()))
            world.count(sent=sum(map(bytes_of, owned.values())), received=everything)


def _plan_save(tensors: Mapping[str, Tensor], owners: Mapping[str, int], world: PretendedWorld, folder: Path) -> None:
    """Make the plans of all ranks and the metadata, as DCP does: gather, merge, scatter, gather, write."""

    def plan_of(rank: int) -> SavePlan:
        planner = DefaultSavePlanner()
        mine = {
            name: torch.empty(t.shape, dtype=t.dtype, device="meta")
            for name, t in tensors.items()
            if owners[name] == rank
        }
        planner.set_up_planner(mine, is_coordinator=rank == 0)
        return planner.create_local_plan()

    own = pickle.dumps(plan_of(world.rank))
    with world.elsewhere():
        sent = [pickle.dumps(plan_of(rank)) for rank in range(world.size)]
    if world.is_first:
        write_metadata(sent, world, folder)
        return
    world.count(sent=len(own), received=len(own))
    with world.elsewhere():
        write_metadata(sent, world, folder, is_counted=False)


def write_metadata(sent: Sequence[bytes], world: PretendedWorld, folder: Path, *, is_counted: bool = True) -> None:
    """Merge the plans that all ranks sent, as rank 0 of DCP does, and write the metadata."""
    planner, writer = DefaultSavePlanner(), FileSystemWriter(folder)
    plans = [pickle.loads(plan) for plan in sent]
    plans, metadata = planner.create_global_plan(plans)
    plans = writer.prepare_global_plan(plans)
    answers = [pickle.dumps(plan) for plan in plans]
    results = [pickle.dumps(write_results(plan)) for plan in plans]  # made by the other ranks
    writer.finish(metadata, [pickle.loads(result) for result in results])
    if is_counted:
        world.count(sent=sum(map(len, answers)), received=sum(map(len, sent)) + sum(map(len, results)))


@contextmanager
def pretended(ranks: int, copies: int, rank: int) -> Iterator[PretendedWorld]:
    """Join a pretended process group as a rank."""
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=pretended_store())
    try:
        flat = copies == 1
        shape, names = (copies, ranks // copies), ("replicate", "shard")
        mesh = init_device_mesh("cpu", shape[flat:], mesh_dim_names=names[flat:])
        group = dist.group.WORLD
        assert group is not None
        yield PretendedWorld(rank, ranks, torch.device("cpu"), mesh, control=group, storage=group)
    finally:
        dist.destroy_process_group()


def _plan_of(run: Run, clips: int | None) -> Plan:
    if clips is None:
        return open_plan(run.data, seed=run.seed, batch_size=run.batch_size, loader=run.loader)
    weights = [source.weight for source in run.data.sources]
    sources = [
        PretendedClips(max(1, round(clips * weight / sum(weights))), f"pretended {number}")
        for number, weight in enumerate(weights)
    ]
    return Plan(sources, weights, seed=run.seed, batch_size=run.batch_size, lanes=run.data.lanes)


def _draw(run: Run, plan: Plan, world: PretendedWorld) -> None:
    """Draw the first batch, as every rank does to compare it, and the masks of this rank's slots."""
    draws = [str(plan.draw(0, slot)) for slot in range(run.batch_size)]
    world.gather({"draws": str(hash(tuple(draws)))})
    grid = clip_grid(run.data.clip.frames, run.data.crop.px, run.model)
    slots = plan.slots(world.rank, world.size)
    sample_masks(run.objective.mask_kinds, grid, seed=run.seed, step=0, slots=slots)


def sharded_tensors(run: Run, world: PretendedWorld) -> dict[str, Tensor]:
    """Build and shard the networks on the meta device, and return the tensors of a checkpoint."""
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    with torch.device("meta"):
        networks = create_method(run).build()
        plain = run.parallel.model_copy(update={"compile": False, "offload": False})
        shard(networks, plain, mesh=world.mesh, dtype=dtype)
        return collect_tensors(networks, build_optimizer(networks.trained, run.optim))


def _record(run: Run, world: PretendedWorld) -> None:
    """Sum the loss of a step, and gather the numbers of a record."""
    loss = Loss(torch.zeros(()), {"prediction": torch.zeros(())}, torch.zeros(1, 1))
    sum_metrics([loss], world)
    throughput = Throughput(run, world)
    frames = torch.zeros(1, 1, 1, 1, 3, dtype=torch.uint8)
    clips = Clips(frames, slots=(0,), keys=("",), sources=(0,), start_s=(0.0,))
    throughput.count(Batch(0, (clips,)), [loss])
    throughput.read(StepTimer(world.device))


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@contextmanager
def _counting_files(cost: Cost) -> Iterator[None]:
    """Count the files that a block opens."""
    if not _counters:
        sys.addaudithook(_see)  # a hook stays until the process ends
    _counters.append(cost)
    try:
        yield
    finally:
        _counters[-1] = None


_counters: list[Cost | None] = []


def _see(event: str, _: Any) -> None:
    if event == "open" and _counters[-1] is not None:
        _counters[-1].files += 1
