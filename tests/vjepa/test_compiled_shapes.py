"""Compiled blocks see the shapes of a run once, whatever the masks: by the compiler's front end, on pretended ranks."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from vjepa.config import Run
from vjepa.distributed.sharding import shard
from vjepa.methods.base import MaskedClips, create_method
from vjepa.methods.masking import sample_masks
from vjepa.nn import attention
from vjepa.nn.grid import Grid

MakeRun = Callable[..., Run]

REFERENCE = {"mode": "reference", "blocks": 2, "spatial_scale": [0.1, 0.5], "batch": 2}
KINDS: dict[str, list[dict[str, Any]]] = {
    "balanced": [{"mode": "balanced", "blocks": n, "block_share": share} for n, share in ((2, 0.15), (1, 0.5))],
    "random": [{"mode": "random", "visible_share": 0.3}],
    "tube": [{"mode": "tube", "visible_share": 0.3}],
    "causal": [{"mode": "causal", "visible_tubelets": 1}],
    "reference": [{**REFERENCE, "groups": 4}],
}


def graphs_of(run: Run, steps: int, backend: attention.Backend = "sdpa") -> list[int]:
    """Train rank 0 of four with compiled blocks, and count the compiled graphs after each step."""
    torch._dynamo.reset()
    counters.clear()
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("shard",))
        method = create_method(run)
        networks = method.build(backend)
        shard(networks, run.parallel, mesh=mesh, dtype=torch.float32, fixed_shapes=run.has_fixed_shapes)
        grid, found = Grid.of(4, 32, 32, run.model), []
        slots = tuple(range(0, run.batch_size, 4))
        for step in range(steps):
            masks = sample_masks(run.objective.mask_kinds, grid, seed=0, step=step, slots=slots)
            clips = MaskedClips(torch.zeros(len(slots), 3, 4, 32, 32), grid, masks, step, slots)
            method.loss(networks, [clips], step=step).value.backward()
            found.append(counters["stats"]["unique_graphs"])
        assert not counters["graph_break"]
        return found
    finally:
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def front_end_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("mode", KINDS)
def test_no_block_is_compiled_again_in_200_steps(mode: str, tiny_run: MakeRun) -> None:
    run = tiny_run(batch_size=8, objective={"masks": KINDS[mode]}, parallel={"compile": True})
    found = graphs_of(run, 200 if mode == "reference" else 20)
    if run.has_fixed_shapes:
        assert found[0] == found[-1] == 3  # target, encoder, predictor
    else:
        assert found[20] == found[-1] <= 12


@pytest.mark.filterwarnings("ignore")
def test_varlen_blocks_do_not_depend_on_the_number_of_runs(tiny_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbouring slots fall into groups of their own. The kernel needs a GPU, so that a stand-in takes its place."""

    def by_starts(q: Tensor, k: Tensor, v: Tensor, segments: attention.Segments) -> Tensor:
        assert segments.starts is not None
        return v + segments.starts.sum() + segments.longest

    monkeypatch.setattr(attention, "_varlen", by_starts)
    run = tiny_run(batch_size=32, objective={"masks": [REFERENCE]}, parallel={"compile": True})
    found = graphs_of(run, 30, "varlen")
    assert found[10] == found[-1] <= 12
