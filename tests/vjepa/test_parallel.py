"""Models are sharded, recomputed and offloaded, in a single process. tests/distributed has several ranks."""

import operator
import os
import resource
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen  # registers its operation
from torch.utils._python_dispatch import TorchDispatchMode

from vjepa.config import Run
from vjepa.distributed import numa
from vjepa.distributed import world as worlds
from vjepa.distributed.sharding import PRODUCTS, mark_updated, shard
from vjepa.distributed.world import interface_addresses, join
from vjepa.engine.open_files import allow_open_files
from vjepa.engine.trainer import open_clips
from vjepa.methods.base import MaskedClips, create_method
from vjepa.methods.masking import sample_masks
from vjepa.nn.grid import Grid
from vjepa_data.reader.pipeline import open_plan
from vjepa_data.settings import BadInput

MakeRun = Callable[..., Run]
ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu.default"


class Counting(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def attentions(run: Run) -> int:
    """Count computations of attention in a forward and a backward pass."""
    with join(run.parallel) as world:
        method = create_method(run)
        networks = method.build()
        shard(networks, run.parallel, mesh=world.mesh, dtype=torch.float32)
    grid = Grid.of(4, 32, 32, run.model)
    masks = sample_masks(run.objective.mask_kinds, grid, seed=0, step=0, slots=(0, 1))
    clips = MaskedClips(torch.randn(2, 3, 4, 32, 32), grid, masks, 0, (0, 1))
    with Counting() as counting:
        method.loss(networks, [clips], step=0).value.backward()
    return counting.counts[ATTENTION]


def test_only_full_recomputation_repeats_attention(tiny_run: MakeRun) -> None:
    off, selective, full = (attentions(tiny_run(parallel={"recompute": how})) for how in ("off", "selective", "full"))
    assert off == selective
    assert off < full < 2 * off  # the target has no backward pass


def test_the_products_that_are_kept_are_known_to_this_torch() -> None:
    assert varlen.varlen_attn
    names = [name for name in PRODUCTS if not name.startswith("xformers")]
    assert {name: str(operator.attrgetter(name)(torch.ops)) for name in names} == {name: name for name in names}


def test_a_process_without_a_gpu_of_its_own_says_so(tiny_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(BadInput, match="local rank 2 sees 2 GPUs"),
        join(tiny_run().parallel),
    ):
        pass


def test_the_loader_is_told_how_many_ranks_share_this_machine(
    tiny_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # left by a launcher outside: this process is alone
    run = tiny_run(loader={"workers": 1})
    with join(run.parallel) as world:
        assert world.ranks_here == 1
        plan = open_plan(run.data, seed=run.seed, batch_size=run.batch_size)
        with pytest.raises(BadInput, match="1000000000 ranks of 1 workers"):
            open_clips(run, plan, tmp_path, replace(world, ranks_here=10**9), 0)


def test_gloo_gets_the_interface_to_the_first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert interface_addresses()["127.0.0.1"] == "lo"
    monkeypatch.setattr(worlds, "interface_addresses", lambda: {"127.0.0.1": "lo", "10.0.0.7": "ib0"})
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for name, value in {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)  # the first node's own name is often a loopback address
    worlds.choose_interface()
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == "ib0"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    worlds.choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth9"


def test_the_next_gathers_wait_for_the_update_alone(tiny_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    event = object()
    stream = SimpleNamespace(record_event=lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    run = tiny_run(precision="bf16")
    with join(run.parallel) as world:
        networks = create_method(run).build()
        shard(networks, run.parallel, mesh=world.mesh, dtype=torch.bfloat16)
        mark_updated(networks, torch.device("cpu"))
        found = [network._get_fsdp_state()._state_ctx for _, network in networks.items()]  # pyright: ignore
        assert all(context.post_optim_event is None for context in found)
        mark_updated(networks, torch.device("cuda", 0))
        assert all(context.post_optim_event is event for context in found)


def test_a_rank_is_bound_to_the_cores_of_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0000:1b:00.0").mkdir()
    (tmp_path / "0000:1b:00.0" / "local_cpulist").write_text("0-3,8,10-11\n")
    assert numa.near_cores("0000:1b:00.0", tmp_path) == {0, 1, 2, 3, 8, 10, 11}
    assert numa.near_cores("0000:ff:00.0", tmp_path) == set()
    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    bound: list[set[int]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: bound.append(cores))
    for allowed in ({2, 3, 4}, {5}):  # the scheduler's choice
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, allowed=allowed: allowed)
        numa.bind_to_device(torch.device("cuda", 0), tmp_path)
    numa.bind_to_device(torch.device("cpu"), tmp_path)
    assert bound == [{2, 3}]


def test_open_files_grow_with_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: given.append(limits))
    allow_open_files(4, ranks=512)
    assert given == [(4096, 4096)]
    with pytest.raises(BadInput, match="1023 other ranks needs up to 4316 open files, and the limit is 4096"):
        allow_open_files(4, ranks=1024)
