"""Count the compiled graphs of some runs, in a process without type checks, which would break the graphs.

    python compiled_shapes.py NAME.json     {mode: {"settings": ..., "steps": ..., "backend": ...}, ...}

Prints a line of JSON: {mode: number of graphs after each step}. The ranks are simulated, and the compiler stops after
its front end, which decides on recompilation.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

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

RANKS = 4


def graphs_of(run: Run, *, steps: int, backend: Any) -> list[int]:
    """Train rank 0 with compiled blocks, and count the compiled graphs after each step."""
    torch._dynamo.reset()
    counters.clear()
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("shard",))
    method = create_method(run)
    networks = method.build(backend)
    shard(networks, run.parallel, mesh=mesh, dtype=torch.float32, fixed_shapes=run.has_fixed_shapes)
    grid, found = Grid.of(4, 32, 32, run.model), []
    slots = tuple(range(0, run.batch_size, RANKS))
    for step in range(steps):
        masks = sample_masks(run.objective.mask_kinds, grid, seed=0, step=step, slots=slots)
        clips = MaskedClips(torch.zeros(len(slots), 3, 4, 32, 32), grid, masks, step, slots)
        method.loss(networks, [clips], step=step).value.backward()
        found.append(counters["stats"]["unique_graphs"])
    dist.destroy_process_group()
    assert not counters["graph_break"], counters["graph_break"]
    return found


def without_kernel(q: Tensor, k: Tensor, v: Tensor, segments: attention.Segments) -> Tensor:
    """Take the place of varlen's kernel, which needs a GPU, and depend on the same numbers."""
    assert segments.starts is not None
    return v + segments.starts.sum() + segments.longest


if __name__ == "__main__":
    torch.compile = functools.partial(torch.compile, backend="eager")
    attention._varlen = without_kernel
    jobs = json.loads(Path(sys.argv[1]).read_text())
    settings = {mode: Run.model_validate(job.pop("settings")) for mode, job in jobs.items()}
    print(json.dumps({mode: graphs_of(settings[mode], **job) for mode, job in jobs.items()}))
